"""W3C Trace Context in a task document: what is one, and what is passed over (https://www.w3.org/TR/trace-context/)."""

from typing import Any

import pytest

from schemas.task import read_trace
from schemas.trace import trace_of

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


def test_a_trace_is_carried_on_as_it_came() -> None:
    """Trace and span for the log, both fields for the child."""
    trace = trace_of(PARENT, "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE")
    assert trace is not None
    assert trace.bound == {"trace_id": TRACE, "span_id": SPAN}
    assert trace.environment == {"TRACEPARENT": PARENT, "TRACESTATE": "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"}
    assert trace_of(None, "rojo=1") is None


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    """It may have more at its end; version 00 goes on, with the flag that is known."""
    for text in (f"cc-{TRACE}-{SPAN}-03", f"cc-{TRACE}-{SPAN}-09-what-the-future-will-be-like"):
        trace = trace_of(text)
        assert trace is not None
        assert trace.environment == {"TRACEPARENT": PARENT}


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "x",
        PARENT.upper(),
        PARENT + "\n",
        " " + PARENT,
        PARENT + "-00",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"cc-{TRACE}-{SPAN}-01.more",
        f"00-{'٣' * 32}-{SPAN}-01",
        5,
        {"$gt": ""},
        PARENT.encode(),
        [PARENT],
        "x" * 100_000,
    ],
)
def test_what_is_none_is_said_and_passed_over(parent: Any) -> None:
    """No document is turned away for it."""
    with pytest.raises(ValueError, match=r"^traceparent is "):
        trace_of(parent)
    trace, problem = read_trace({"traceparent": parent, "tracestate": "a=1"})
    assert trace is None
    assert problem is not None
    assert len(problem) < 200


@pytest.mark.parametrize("state", ["", "a=1\nB=2", "ä=1", "a" * 513, 5, None, ["a=1"], "a=\x00"])
def test_a_state_that_is_none_is_left_out(state: Any) -> None:
    """The trace goes on without."""
    trace = trace_of(PARENT, state)
    assert trace is not None
    assert trace.environment == {"TRACEPARENT": PARENT}
