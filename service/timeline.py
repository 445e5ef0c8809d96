"""One task's story: the state changes of its document and the log lines of all its attempts, in one order.

The order is that of the document and of the stored log, never that of the clocks: state changes carry the server's
time, log lines that of the worker which wrote them, and a worker's clock may be hours off.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from handlers.store.database import Document
from schemas.task import admitted

T = TypeVar("T")

#: The event of an entry that is a state change of the document, and not a log line.
STATE = "task state"


class Timeline:
    """Fed with the document and the log as they stand, again and again; gives what is new since the last time."""

    def __init__(self) -> None:
        self._changes: list[Any] = []
        self._lines: list[str] = []
        #: State changes seen, whose place is after log lines that may still come.
        self._held: list[Document] = []

    def feed(self, document: Mapping[str, Any], lines: Sequence[str]) -> list[Document]:
        """New entries, oldest first: each a log line as it was logged, or a state change (its event is STATE)."""
        history = document.get("history") if admitted(document) else None
        changes = [change for change in history if isinstance(change, Mapping)] if isinstance(history, list) else []
        self._held += [_entry(change) for change in _new(self._changes, changes)]
        if self._held and self._held[-1]["status"] == document.get("status"):
            _explain(self._held[-1], document)
        entries = []
        for line in map(_parsed, _new(self._lines, lines)):
            # A claim stands before the lines of its attempt, and what ended an attempt after them.
            while self._held and _before(self._held[0], line):
                entries.append(self._held.pop(0))
            entries.append(line)
        entries += self._held
        self._held, self._changes, self._lines = [], list(changes), list(lines)
        return entries


def _new(before: Sequence[T], now: Sequence[T]) -> Sequence[T]:
    """What was appended to a list from whose front items fall off."""
    for dropped in range(len(before)):
        kept = before[dropped:]
        if kept == list(now[: len(kept)]):
            return now[len(kept) :]
    return now


def _entry(change: Mapping[str, Any]) -> Document:
    named = {name: change[name] for name in ("attempt", "owner", "reason") if name in change}
    return {"event": STATE, "status": change.get("status"), "timestamp": change.get("at"), **named}


def _explain(entry: Document, document: Mapping[str, Any]) -> None:
    """Say why a task ended, where its history does not: the document's own error is that of its last state."""
    error = document.get("error")
    if "reason" not in entry and isinstance(error, Mapping):
        entry["reason"] = f"{error.get('kind')}: {error.get('message')}"


def _before(change: Document, line: Document) -> bool:
    begun, of = _number(change.get("attempt")), _number(line.get("attempt"))
    return begun < of or (begun == of and change["status"] in ("PENDING", "RUNNING") and not _ends(change))


def _ends(change: Document) -> bool:
    # An attempt that gives its task back says why.
    return "reason" in change


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else 0


def _parsed(line: str) -> Document:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return {"event": line}  # of version 0.1.0, which cut lines wherever that was
