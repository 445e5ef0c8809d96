"""What the metrics show of the whole queue: one bounded look at DL_TASK and DL_WORKER, the same from every worker.

Cheap enough for each worker to do every few seconds: every read rests on an index and ends after `AT_MOST` documents,
so that neither millions of ended tasks nor a flood of waiting ones makes it slow (10,000 waiting documents: 40 ms).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pymongo

from handlers.store.database import CODEC, Database, Document
from handlers.store.expressions import IN_QUEUE_INDEX
from schemas.enums import DeviceClass, TaskStatus
from schemas.version import SCHEMA_VERSION

#: Documents of each state that are counted; a count that is so high says "or more".
AT_MOST = 10_000

#: Seconds that a look may take: it can be had again soon, and a worker that stops has not the time for more.
LOOK_SECONDS = 5.0

#: Seconds after its last renewal that a worker counts as alive: when its document expires (see `indexes.INDEXES`).
_ALIVE = timedelta(seconds=60)

#: A device need that is none, since somebody changed the document by hand.
OTHER = "other"


@dataclass(frozen=True)
class ServerTime:
    """The server's clock, as read once: `at` is what it showed when our monotonic clock showed `monotonic`.

    Off by half a round trip at most, and free of how this machine's own clock is set.
    """

    at: datetime
    monotonic: float

    def now(self) -> datetime:
        """What the server's clock shows now."""
        return self.at + timedelta(seconds=time.monotonic() - self.monotonic)


@dataclass(frozen=True)
class Need:
    """Devices that a task asks for; `number` is 0 for a number that is none."""

    kind: str
    number: int


@dataclass(frozen=True)
class QueueState:
    """The queue at one moment. Each number is at most `AT_MOST`, and then means "or more"."""

    clock: ServerTime
    #: Second of the newest write that the server knows of, in the time that change streams are told in.
    written: int
    #: Documents that no worker has answered; those that wait, back-offs included; those that run.
    new: int
    pending: int
    running: int
    #: Of the waiting ones, those whose retry is not due yet.
    backing_off: int
    #: Waiting tasks by what they need.
    waiting: Mapping[Need, int]
    #: By device kind, of those that some live worker can take and of those that none can: seconds for which the task
    #: that has been due for longest waits, since it was admitted, given back or its back-off ended.
    oldest: Mapping[tuple[str, bool], float]
    #: By device kind, the same of those that some live worker has the devices free for, and would claim.
    claimable: Mapping[str, float]
    #: Waiting tasks that no live worker has the devices for.
    unservable: Mapping[Need, int]
    #: Workers that are alive.
    workers: int


class Queue:
    """The look at the queue."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._tasks = database.collection("DL_TASK")
        self._workers = database.collection("DL_WORKER")

    async def read(self) -> QueueState:
        """The queue now. Raises StoreError, after `LOOK_SECONDS` at the latest."""
        with pymongo.timeout(LOOK_SECONDS):
            return await self._read()

    async def _read(self) -> QueueState:
        began = time.monotonic()
        hello = await self._db.call(self._db.db.command, "hello", codec_options=CODEC)
        clock = ServerTime(hello["localTime"], (began + time.monotonic()) / 2)
        groups = await self._groups()
        workers = await self._live(clock.at)
        waiting: dict[Need, int] = {}
        oldest: dict[tuple[str, bool], float] = {}
        claimable: dict[str, float] = {}
        for group in groups:
            need = Need(group["_id"]["kind"], group["_id"]["number"])
            waiting[need] = waiting.get(need, 0) + group["n"]
            since = group["since"]
            # Of no date, or one that no datetime can be, nothing can be said.
            if group["_id"]["due"] and isinstance(since, datetime):
                seconds = (clock.at - since).total_seconds()
                which = need.kind, _served(need, workers)
                oldest[which] = max(oldest.get(which, 0), seconds)
                if not group["_id"]["apart"] and _served(need, workers, "free"):
                    claimable[need.kind] = max(claimable.get(need.kind, 0), seconds)
        return QueueState(
            clock=clock,
            written=hello["operationTime"].time,
            new=await self._db.call(self._tasks.count_documents, {"admitted_id": None}, limit=AT_MOST),
            pending=sum(waiting.values()),
            running=await self._db.call(
                self._tasks.count_documents, {"status": TaskStatus.RUNNING.name, **IN_QUEUE_INDEX}, limit=AT_MOST
            ),
            backing_off=sum(group["n"] for group in groups if not group["_id"]["due"]),
            waiting=waiting,
            oldest=oldest,
            claimable=claimable,
            unservable={need: number for need, number in waiting.items() if not _served(need, workers)},
            workers=len(workers),
        )

    async def _groups(self) -> list[Document]:
        """The waiting tasks by need and by whether they are due. Total, whatever stands in a field."""
        kind = {"$cond": [{"$in": [_KIND, [kind.name for kind in DeviceClass]]}, _KIND, OTHER]}
        # What waits for a worker that runs nothing else, or for one of a newer version.
        apart = {"$or": [{"$eq": ["$runs_alone", True]}, {"$gt": ["$schema_version", SCHEMA_VERSION]}]}
        number = {"$convert": {"input": _NUMBER, "to": "int", "onError": 0, "onNull": 0}}
        cursor = await self._db.call(
            self._tasks.aggregate,
            [
                {"$match": {"status": TaskStatus.PENDING.name, **IN_QUEUE_INDEX}},
                {"$limit": AT_MOST},
                {"$set": {"since": {"$ifNull": ["$not_before", "$create_time"]}}},
                {
                    "$group": {
                        "_id": {
                            "kind": kind,
                            "number": number,
                            "due": {"$lte": ["$since", "$$NOW"]},
                            "apart": apart,
                        },
                        "n": {"$sum": 1},
                        "since": {"$min": "$since"},
                    }
                },
            ],
        )
        found: list[Document] = await self._db.call(cursor.to_list)
        return found

    async def _live(self, now: datetime) -> list[Document]:
        """The workers that have renewed in time."""
        return await self._db.call(
            self._workers.find(
                {"renewed_at": {"$gte": now - _ALIVE}}, {"devices": True, "free": True, "min_device_num": True}
            )
            .limit(AT_MOST)
            .to_list
        )


_KIND, _NUMBER = "$param_request.device_type", "$param_request.device_num"


def _served(need: Need, workers: list[Document], by: str = "devices") -> bool:
    """Whether one of them takes tasks of so many devices and has as many, or has them `free`."""
    return need.number > 0 and any(
        _whole(worker, "min_device_num") <= need.number <= _whole(worker.get(by), need.kind) for worker in workers
    )


def _whole(document: Any, field: str) -> int:
    """A number that a worker wrote of itself; 0 where there is none, as in documents of older versions."""
    number = document.get(field) if isinstance(document, Mapping) else None
    return number if isinstance(number, int) else 0
