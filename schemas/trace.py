"""The trace that a task is a part of: W3C Trace Context, as a client may put it into its document.

https://www.w3.org/TR/trace-context/ : `traceparent` names the trace and the client's span in it, `tracestate` is the
tracing system's own. The service makes no spans: its log lines and the child's environment carry the client's.
"""

import re
from typing import Any

from pydantic import BaseModel, ConfigDict

from schemas.params import shown

_PARENT = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?P<trace_id>(?!0{32})[0-9a-f]{32})-(?P<span_id>(?!0{16})[0-9a-f]{16})"
    r"-(?P<flags>[0-9a-f]{2})(?P<more>-.*)?",
    re.ASCII | re.DOTALL,
)

#: As much of it as every tracing system has to pass on; printable ASCII, since it becomes a variable of an environment.
_STATE = re.compile(r"[\x20-\x7e]{1,512}", re.ASCII)


class Trace(BaseModel):
    """A trace, and the span in it that asked for the task."""

    model_config = ConfigDict(frozen=True)

    trace_id: str
    span_id: str
    flags: str
    state: str | None = None

    @property
    def parent(self) -> str:
        """As `traceparent`, in version 00 of the format."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"

    @property
    def bound(self) -> dict[str, str]:
        """What log lines carry of it, named as OpenTelemetry names it in logs that are not its own."""
        return {"trace_id": self.trace_id, "span_id": self.span_id}

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which a process, and all that it starts, goes on with the trace."""
        return {"TRACEPARENT": self.parent} | ({"TRACESTATE": self.state} if self.state is not None else {})


def trace_of(traceparent: Any, tracestate: Any = None) -> Trace | None:
    """The trace that these two fields of a document name, or None where there is none.

    Raises ValueError for a `traceparent` that is none; a `tracestate` that is none is left out, as the standard has it.
    """
    if traceparent is None:
        return None
    found = _PARENT.fullmatch(traceparent) if isinstance(traceparent, str) else None
    # Later versions may add to the end, and only the first flag is known of them.
    if found is None or (found["version"] == "00" and found["more"]):
        raise ValueError(f"traceparent is {shown(traceparent)}; expected 00-<32 hex digits>-<16 hex digits>-<2>")
    flags = found["flags"] if found["version"] == "00" else f"{int(found['flags'], 16) & 1:02x}"
    state = tracestate if isinstance(tracestate, str) and _STATE.fullmatch(tracestate) else None
    return Trace(trace_id=found["trace_id"], span_id=found["span_id"], flags=flags, state=state)
