"""What the pages read: the situation of the whole queue, shared by all who look, and one task in detail."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import anyio

from handlers.store import Store
from handlers.store.database import Document
from handlers.store.overview import Row
from schemas.numbers import bson_uint64

#: Seconds for which the situation is told again as it was: however many look, the database is asked once.
_FRESH_SECONDS = 2.0
#: Counts of hundreds of thousands cost the server more than all else here.
_COUNTS_FRESH_SECONDS = 5.0

#: How far down the queue a task is told its position, and how many running tasks are on the first page.
QUEUE_HEAD = 100
RUNNING_SHOWN = 20

#: Workers on the page of workers, and that are asked for whether one could take a task.
_WORKERS = 500

#: Log lines on the page of a task; `dltask logs` has all that are kept.
LOG_LINES = 300


@dataclass(frozen=True)
class Situation:
    """The whole queue at one moment, by the server's clock."""

    now: datetime
    total: int
    counts: Mapping[str, int]
    workers: Sequence[Document]
    #: The first PENDING tasks, in the order in which they are claimed.
    waiting: Sequence[Row]
    running: Sequence[Row]


@dataclass(frozen=True)
class Detail:
    """One task, with what it left beside its document."""

    row: Row
    curves: Sequence[Document] = ()
    log: Sequence[str] = ()
    #: How many lines are kept in all.
    log_kept: int = 0
    #: Name and version of the model that it made.
    made: tuple[Any, Any] | None = None


@dataclass
class _Cache:
    situation: Situation | None = None
    at: float = 0.0
    counts_at: float = 0.0
    #: Held while somebody reads, so that others wait for the answer and do not ask for their own.
    lock: anyio.Lock = field(default_factory=anyio.Lock)


class Reading:
    """Reads from the store for people. Raises StoreError while the database is away, after seconds at most."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._cache = _Cache()

    async def situation(self) -> Situation:
        """The situation, not older than two seconds; its counts not than five."""
        cache = self._cache
        async with cache.lock:
            now = time.monotonic()
            if cache.situation is None or now >= cache.at + _FRESH_SECONDS:
                with self.store.database.looking():
                    cache.situation = await self._read(cache.situation, counted=now < cache.counts_at)
                cache.at = time.monotonic()
            return cache.situation

    async def _read(self, before: Situation | None, *, counted: bool) -> Situation:
        overview = self.store.overview
        if before is None or not counted:
            total, counts = await overview.total(), await overview.counts()
            self._cache.counts_at = time.monotonic() + _COUNTS_FRESH_SECONDS
        else:
            total, counts = before.total, dict(before.counts)
        return Situation(
            now=await self.store.database.now(),
            total=total,
            counts=counts,
            workers=await self.store.workers.shown(_WORKERS),
            waiting=await overview.next_waiting(QUEUE_HEAD),
            running=await overview.running(RUNNING_SHOWN),
        )

    async def detail(self, word: str) -> Detail | None:
        """The task that `Row.reference` says; None if there is none."""
        with self.store.database.looking():
            row = await self.store.overview.task(word)
            if row is None:
                return None
            if not row.reference.isdigit():
                # It has never run: nothing else knows it.
                return Detail(row)
            number = bson_uint64(int(row.reference))
            lines, kept = await self.store.traces.last_lines(number, LOG_LINES)
            return Detail(
                row,
                curves=await self.store.traces.curves(number),
                log=lines,
                log_kept=kept,
                made=await self.store.models.version_of(number),
            )
