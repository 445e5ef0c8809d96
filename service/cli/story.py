"""`dltask logs`: one task's story as lines, once or until the task has ended."""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import anyio

from handlers.store import Store
from handlers.store.database import Document, StoreError
from schemas.enums import END_STATES
from schemas.numbers import bson_uint64
from service.show import iso, json_text, log_text, printable, state, why_waiting
from service.timeline import STATE, Timeline

#: Seconds between two looks, and between two at why a task waits, which reads the whole queue.
_POLL_SECONDS, _WHY_SECONDS = 1.0, 5.0

#: Looks after the end: the last lines of an attempt are stored just after it.
_LAST_LOOKS = 3

#: Looks in a row that may fail: a fail-over takes up to half a minute, and a database that is gone must be said.
_FAILED_LOOKS = 5

#: The event of the entry that says why a task waits.
_WAITS = "task waits"

_ENDED = {status.name for status in END_STATES}
_LAST_WORDS = ("task succeeded", "task failed", "task cancelled")


async def tell(store: Store, task_id: int, say: Callable[[Document], None], *, follow: bool) -> bool:
    """Call `say` with each entry of the story, so far or (`follow`) until the task has ended; False: no such task.

    Raises StoreError; when following, once five looks in a row have failed.
    """
    timeline, why = Timeline(), _Why(store)
    failed = looks_left = 0
    while True:
        try:
            document = await store.tasks.get(bson_uint64(task_id))
            if document is None:
                return False
            entries = timeline.feed(document, await store.traces.log(bson_uint64(task_id)))
            entries += await why.news(document)
            failed = 0
        except StoreError:
            failed += 1
            if not follow or failed == _FAILED_LOOKS:
                raise
        else:
            for entry in entries:
                say(entry)
            if state(document) in _ENDED:
                looks_left = looks_left - 1 if looks_left else _LAST_LOOKS
                told = any(entry.get("event") in _LAST_WORDS for entry in entries)
                if told or looks_left == 1 or not document.get("attempt"):
                    return True
            if not follow:
                return True
        await anyio.sleep(_POLL_SECONDS)


class _Why:
    """Why the task waits, each time that the answer is another one."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._said = ""
        self._next = 0.0

    async def news(self, document: Document) -> list[Document]:
        if state(document) not in ("NEW", "PENDING"):
            self._said, self._next = "", 0.0
            return []
        if time.monotonic() < self._next:
            return []
        self._next = time.monotonic() + _WHY_SECONDS
        (queue, waiting), workers = await self._store.overview.queue(), await self._store.workers.all()
        now = datetime.now(UTC)
        if (reason := why_waiting(document, queue, workers, now, waiting=waiting)) == self._said:
            return []
        self._said = reason
        return [{"event": _WAITS, "timestamp": now, "reason": reason}] if reason else []


def entry_text(entry: Mapping[str, Any]) -> str:
    """One entry for people: a line with the time, the level or the new state, and what there is to say."""
    if entry.get("event") == STATE:
        attempt, owner, reason = (entry.get(name) for name in ("attempt", "owner", "reason"))
        parts = [f"attempt {attempt}" if attempt else "accepted" if entry["status"] == "PENDING" else ""]
        parts += [f" on {owner}" if owner else "", f"{': ' if parts[0] else ''}{reason}" if reason else ""]
        return printable(f"{_time(entry)} {entry['status']!s:9} {''.join(parts)}".rstrip())
    if entry.get("event") == _WAITS:
        return printable(f"{_time(entry)} {'waits':9} {entry['reason']}")
    return log_text(json_text(entry)) if len(entry) > 1 else log_text(str(entry.get("event")))


def _time(entry: Mapping[str, Any]) -> Any:
    time = entry.get("timestamp")
    return iso(time) if isinstance(time, datetime) else time
