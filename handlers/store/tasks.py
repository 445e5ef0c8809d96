"""DL_TASK: every write to the task collection, one method each.

The collection is the truth; everything else (change stream, timers, memory) only decides when to look. Two rules hold
throughout. A write of a running task filters on `_id`, `owner` and `attempt`, the fence: whoever lost the task matches
nothing and learns it. And a state change is one update that also writes `history`, with the server's clock (`$$NOW`);
values that came from users stand under `$literal`, since a pipeline would expand `'$status'` in them.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import bson
from bson.raw_bson import RawBSONDocument
from pymongo import ASCENDING, DESCENDING, ReturnDocument
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DocumentTooLarge, DuplicateKeyError, OperationFailure

from handlers.errors import LostTask
from handlers.store.database import CODEC, Database, Document, StoreError, refused
from schemas.enums import TaskErrorCode, TaskStatus
from schemas.task import ID_LISTS, SERVICE_FIELDS, Task

#: Seconds without a renewal after which another worker may take the task over.
LEASE_SECONDS = 45

#: State changes kept in a document.
HISTORY_LENGTH = 50

#: Best first: the order of the queue.
QUEUE_ORDER = [("priority", DESCENDING), ("create_time", ASCENDING)]

#: Admission is one update filtered on this; a copy of an admitted document carries another document's id.
_NOT_ADMITTED: Document = {"$expr": {"$ne": ["$admitted_id", "$_id"]}}
_ADMITTED: Document = {"$expr": {"$eq": ["$admitted_id", "$_id"]}}

#: What the index `queue` holds, all waiting and running tasks among it; a query that does not say so cannot use it.
_IN_QUEUE_INDEX: Document = {"error_code": int(TaskErrorCode.OK)}

_WITHOUT_LISTS = dict.fromkeys(ID_LISTS, False)

#: Codes of an update whose outcome would be over 16 MB.
_TOO_LARGE = (17419, 10334, 17280)


@dataclass(frozen=True)
class Rejection:
    """Why a document is not accepted. The message names field, value and expectation."""

    code: TaskErrorCode
    field: str
    message: str


@dataclass(frozen=True)
class TaskError:
    """Why an attempt ended: `kind` is one word for programs, `message` a sentence for people."""

    kind: str
    message: str
    field: str | None = None
    code: TaskErrorCode = TaskErrorCode.OK

    def document(self) -> Document:
        """As stored in `error`, bounded in size."""
        return {"kind": self.kind, "message": self.message[:2000], "field": self.field}


CANCELLED = TaskError("cancelled", "the client set cancel_requested")


@dataclass(frozen=True)
class Waiting:
    """A task taken off a worker: what became of it, and after how many faults."""

    status: str
    failures: int


@dataclass(frozen=True)
class Expired:
    """A running task whose owner has not renewed its lease in time."""

    key: Any
    task_id: Any
    owner: str
    attempt: int


def _history(status: Any, **fields: Any) -> Document:
    """The expression that appends one state change, keeping the newest."""
    entry = {"status": status, "at": "$$NOW", **fields}
    return {"$slice": [{"$concatArrays": [{"$ifNull": ["$history", []]}, [entry]]}, -HISTORY_LENGTH]}


#: The iteration of the snapshot that the next attempt would go on from, and the furthest one of any fault so far.
_KEPT: Document = {"$ifNull": ["$snapshot.iteration", 0]}
_KEPT_BEFORE: Document = {"$ifNull": ["$failed_at", 0]}

#: One fault more, or the first one since a snapshot got further than at any fault before. Else a long training on
#: machines that are often lost would use up its attempts although each of them got on. One that dies at the same place
#: again and again does not begin anew, also when its snapshot was unusable and it had to come that far once more.
_COUNTED_FAULT: Document = {
    "failures": {"$cond": [{"$gt": [_KEPT, _KEPT_BEFORE]}, 1, {"$add": ["$failures", 1]}]},
    "failed_at": {"$max": [_KEPT, _KEPT_BEFORE]},
}


def _literal(value: Any) -> Document:
    return {"$literal": value}


class Tasks:
    """The task collection. `lease_seconds` is a setting of tests; every worker of a fleet needs the same."""

    def __init__(self, database: Database, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self._db = database
        self._tasks = database.collection("DL_TASK")
        self.lease_seconds = lease_seconds
        self._lease_ms = int(lease_seconds * 1000)

    # ---- a client's writes

    async def insert(self, document: Mapping[str, Any]) -> bool:
        """Insert a client's document; False if its `task_id` is taken."""
        try:
            await self._db.call(self._tasks.insert_one, dict(document))
        except DuplicateKeyError:
            return False
        return True

    async def request_cancel(self, task_id: Any) -> bool:
        """Ask for the task to be cancelled; False if there is none with that number."""
        found = await self._db.call(self._tasks.update_one, {"task_id": task_id}, {"$set": {"cancel_requested": True}})
        return bool(found.matched_count)

    # ---- reading

    async def get(self, task_id: Any) -> Document | None:
        """The document with that `task_id`, without its id lists."""
        return await self._db.call(self._tasks.find_one, {"task_id": task_id}, _WITHOUT_LISTS)

    async def newest(self, limit: int) -> list[Document]:
        """The newest documents, running and waiting ones first, without id lists and reports."""
        found: list[Document] = []
        fields = {**_WITHOUT_LISTS, "history": False, "result.metrics.per_class": False}
        for which in (
            {"admitted_id": None},
            {"status": {"$in": ["RUNNING", "PENDING"]}, "admitted_id": {"$ne": None}, **_IN_QUEUE_INDEX},
            {"status": {"$in": ["SUCCEEDED", "FAILED", "CANCELLED", "REJECTED"]}, "admitted_id": {"$ne": None}},
        ):
            cursor = self._tasks.find(which, fields).sort("create_time", DESCENDING)
            found += await self._db.call(cursor.limit(limit - len(found)).to_list) if len(found) < limit else []
        return found

    async def counts(self) -> dict[str, int]:
        """How many documents are in each state."""
        cursor = await self._db.call(self._tasks.aggregate, [{"$group": {"_id": "$status", "n": {"$sum": 1}}}])
        return {str(row["_id"]): row["n"] for row in await self._db.call(cursor.to_list)}

    async def image_ids(self, key: Any, field: str) -> list[Any]:
        """One id list of a document; empty if it has none."""
        document = await self._db.call(self._tasks.find_one, {"_id": key}, {field: True, "_id": False})
        ids = (document or {}).get(field)
        return ids if isinstance(ids, list) else []

    # ---- admission

    async def unadmitted(self, key: Any) -> tuple[Document, int] | None:
        """The whole document and its size in bytes, if it is there and not yet admitted or rejected."""
        raw = self._tasks.with_options(codec_options=CODEC.with_options(document_class=RawBSONDocument))
        found = await self._db.call(raw.find_one, {"_id": key, **_NOT_ADMITTED})
        if found is None:
            return None
        return bson.decode(found.raw, CODEC), len(found.raw)

    async def new_keys(self, limit: int) -> list[Any]:
        """`_id`s of documents that no worker has looked at, copies of admitted ones apart (see `copied_keys`)."""
        cursor = self._tasks.find({"admitted_id": None}, {"_id": True}).limit(limit)
        return [document["_id"] for document in await self._db.call(cursor.to_list)]

    async def copied_keys(self) -> AsyncGenerator[Any, None]:
        """`_id`s of all documents that no worker has admitted, those with a forged or copied state included.

        Reads the index `admitted` from end to end (no documents), so it is for starts and lost stream history. The
        comparison is computed after the projection, lest the planner move it in front and fetch every document.
        """
        pipeline: list[Document] = [{"$project": {"new": {"$ne": ["$admitted_id", "$_id"]}}}, {"$match": {"new": True}}]
        try:
            cursor = await self._db.call(self._tasks.aggregate, pipeline, hint="admitted")
        except StoreError as error:
            if not refused(error):
                raise
            # The index is not there, and could not be made: slowly, then, but none is missed.
            cursor = await self._db.call(self._tasks.aggregate, pipeline)
        async with aclosing(self._db.batches(cursor)) as batches:
            async for batch in batches:
                for document in batch:
                    yield document["_id"]

    async def admit(self, key: Any, fields: Mapping[str, Any]) -> bool:
        """Make the document PENDING, with these normalised `fields`; False if somebody else has admitted it."""
        return await self._answer(
            key,
            TaskStatus.PENDING,
            {**{name: _literal(value) for name, value in fields.items()}, "error_code": int(TaskErrorCode.OK)},
            unset=(),
        )

    async def reject(self, key: Any, rejection: Rejection, *, drop_lists: bool = False) -> bool:
        """Make the document REJECTED; False if somebody else has answered it.

        `drop_lists` unsets the id lists in the same write, to make room for the answer.
        """
        error = TaskError(rejection.code.name, rejection.message, rejection.field, rejection.code)
        fields = {"error_code": int(rejection.code), "error": _literal(error.document()), "end_time": "$$NOW"}
        try:
            return await self._answer(key, TaskStatus.REJECTED, fields, unset=ID_LISTS if drop_lists else ())
        except (OperationFailure, DocumentTooLarge) as failure:
            if getattr(failure, "code", None) not in _TOO_LARGE:
                raise
            # Full to the brim with fields of the client's own: only what identifies the task can be kept.
            return await self._answer(key, TaskStatus.REJECTED, fields, keep=("task_id", "task_type"))

    async def _answer(
        self,
        key: Any,
        status: TaskStatus,
        fields: Mapping[str, Any],
        *,
        unset: Sequence[str] = (),
        keep: Sequence[str] | None = None,
    ) -> bool:
        owned: Document = {
            "admitted_id": "$_id",
            "status": status.name,
            "attempt": 0,
            "failures": 0,
            "create_time": "$$NOW",
            # A literal list, not `_history`: what stands there was forged or belongs to the copied document.
            "history": [{"status": status.name, "at": "$$NOW", "attempt": 0}],
            **fields,
        }
        cleared = [name for name in (*SERVICE_FIELDS, *unset) if name not in owned]
        pipeline: list[Document] = [{"$unset": cleared}, {"$set": owned}]
        if keep is not None:
            # Unless it is one of these that fills the document.
            kept = {
                name: {"$cond": [{"$lt": [{"$bsonSize": {"it": f"${name}"}}, 1000]}, f"${name}", "$$REMOVE"]}
                for name in keep
            }
            pipeline.insert(0, {"$replaceWith": {"_id": "$_id", **kept}})
        answered = await self._db.call(self._tasks.update_one, {"_id": key, **_NOT_ADMITTED}, pipeline)
        return bool(answered.modified_count)

    # ---- claim

    async def claim(self, owner: str, free: Mapping[str, int]) -> Document | None:
        """Take the best PENDING task that fits into `free` devices (`{"CPU": 1, "GPU": 4}`), or None.

        Atomic: of many claimers one gets it. Raises nothing for a queue that holds only what does not fit.
        """
        needs = [_fits(kind, number) for kind, number in free.items() if number > 0]
        if not needs:
            return None
        update: list[Document] = [
            {
                "$set": {
                    "status": TaskStatus.RUNNING.name,
                    "owner": _literal(owner),
                    "attempt": {"$add": ["$attempt", 1]},
                    "lease_renewed_at": "$$NOW",
                    "start_time": {"$ifNull": ["$start_time", "$$NOW"]},
                    "progress": {
                        "$ifNull": [
                            "$progress",
                            {"iteration": 0, "max_num_iters": "$param_request.max_num_iters", "updated_at": "$$NOW"},
                        ]
                    },
                    "history": _history(
                        TaskStatus.RUNNING.name, attempt={"$add": ["$attempt", 1]}, owner=_literal(owner)
                    ),
                }
            },
            {"$unset": ["not_before", "error"]},
        ]
        return await self._db.call(
            self._tasks.find_one_and_update,
            {
                "status": TaskStatus.PENDING.name,
                "$or": needs,
                **_IN_QUEUE_INDEX,
                "$expr": {"$and": [_ADMITTED["$expr"], _due()]},
                # What the update counts up and appends to. A document whose own was changed by hand into something
                # else would fail each claim, and as the first of the queue stop them all.
                "attempt": {"$type": "number"},
                "history": {"$type": "array"},
            },
            update,
            sort=QUEUE_ORDER,
            projection=_WITHOUT_LISTS,
            return_document=ReturnDocument.AFTER,
        )

    async def running_of(self, owner: str) -> list[Document]:
        """What a claim of `owner` took and none of its attempts has given back, as `claim` returns it.

        A claim can be done although it raised: the answer was lost, or the members did not confirm it in time.
        """
        cursor = self._tasks.find(
            {"status": TaskStatus.RUNNING.name, "owner": owner, **_IN_QUEUE_INDEX, **_ADMITTED}, _WITHOUT_LISTS
        )
        return await self._db.call(cursor.to_list)

    async def head(self, kind: str, total: int, patience_seconds: float) -> tuple[int, bool] | None:
        """The best due task that fits into `total` devices of a kind: (devices needed, waited longer than patience)."""
        found = await self._db.call(
            self._tasks.find_one,
            {
                "status": TaskStatus.PENDING.name,
                **_fits(kind, total),
                **_IN_QUEUE_INDEX,
                "$expr": {"$and": [_ADMITTED["$expr"], _due()]},
            },
            {
                "needed": "$param_request.device_num",
                "waited": {"$subtract": ["$$NOW", {"$ifNull": ["$not_before", "$create_time"]}]},
            },
            sort=QUEUE_ORDER,
        )
        return (found["needed"], found["waited"] > patience_seconds * 1000) if found else None

    # ---- the owner's writes, each behind the fence

    async def renew(self, task: Task, progress: Mapping[str, Any] | None) -> bool:
        """Renew the lease, with the newest progress if there is any; returns whether a cancel is requested.

        It does not ask whether the lease has expired: after an outage every lease has, and only another claim fences.
        Plain operators, since this is the frequent write. Raises LostTask.
        """
        update: Document = {"$currentDate": {"lease_renewed_at": True}}
        if progress:
            update["$set"] = {f"progress.{name}": value for name, value in progress.items()}
            update["$currentDate"]["progress.updated_at"] = True
        found = await self._db.call(
            self._tasks.find_one_and_update, self._fence(task), update, projection={"cancel_requested": True}
        )
        if found is None:
            raise LostTask(task.task_id)
        return found.get("cancel_requested") is True

    async def note_message(self, task: Task, message_id: str) -> None:
        """Record the request message that this task runs on, for this attempt and those after it. Raises LostTask."""
        await self._fenced(task, {"$set": {"json_mongodb_id": message_id}})

    async def note_snapshot(self, task: Task, file_id: Any, iteration: int, sha256: str) -> Any:
        """Make a stored snapshot the one to resume from; returns the file id of the one before, or None.

        Raises LostTask: then the file is nobody's, and the caller removes it.
        """
        before = await self._db.call(
            self._tasks.find_one_and_update,
            self._fence(task),
            {
                "$set": {
                    "snapshot": {
                        "file_id": file_id,
                        "iteration": iteration,
                        "sha256": sha256,
                        "attempt": task.attempt,
                    }
                }
            },
            projection={"snapshot": True},
        )
        if before is None:
            raise LostTask(task.task_id)
        return (before.get("snapshot") or {}).get("file_id")

    async def drop_snapshot(self, task: Task) -> None:
        """Forget a snapshot that cannot be read: the next attempt begins at the start. Raises LostTask."""
        await self._fenced(task, {"$unset": {"snapshot": ""}})

    async def finish(
        self,
        task: Task,
        status: TaskStatus,
        *,
        result: Mapping[str, Any] | None = None,
        error: TaskError | None = None,
        session: AsyncClientSession | None = None,
    ) -> bool:
        """End the task, with `end_time` in the same write; False if an earlier call did so and its answer got lost.

        Raises LostTask: then nothing was written.
        """
        fields: Document = {
            "status": status.name,
            "end_time": "$$NOW",
            "error_code": int(error.code if error else TaskErrorCode.OK),
            "history": _history(status.name, attempt=task.attempt),
        }
        if result is not None:
            fields["result"] = _literal(dict(result))
        if error is not None:
            fields["error"] = _literal(error.document())
        if status is TaskStatus.FAILED:
            fields |= _COUNTED_FAULT
        update: list[Document] = [{"$set": fields}, {"$unset": ["owner", "lease_renewed_at"]}]
        changed = await self._db.call(self._tasks.update_one, self._fence(task), update, session=session)
        if changed.matched_count:
            return True
        # Only the owner of an attempt ends it as SUCCEEDED, so one that stands there is this attempt's own.
        ended = {"_id": task.key, "attempt": task.attempt, "status": status.name}
        if await self._db.call(self._tasks.find_one, ended, {"_id": True}, session=session) is None:
            raise LostTask(task.task_id)
        return False

    async def release(self, task: Task, reason: str, *, delay: float = 0) -> None:
        """Give the task back without blame (drain, preemption, database away): PENDING, due in `delay` seconds.

        Raises LostTask.
        """
        update: list[Document] = [
            {
                "$set": {
                    "status": TaskStatus.PENDING.name,
                    "not_before": {"$add": ["$$NOW", int(delay * 1000)]},
                    "history": _history(TaskStatus.PENDING.name, attempt=task.attempt, reason=_literal(reason[:300])),
                }
            },
            {"$unset": ["owner", "lease_renewed_at"]},
        ]
        await self._fenced(task, update)

    async def retry(
        self, task: Task, error: TaskError, *, delay: float | None = None, batch_size_limit: int | None = None
    ) -> Waiting:
        """Give the task back after a fault; FAILED once `max_attempts` faults are used up. Raises LostTask.

        `delay` is in seconds; without it the delay doubles with each fault, from 1 s to 5 min.
        """
        return await self._fault(self._fence(task), task.attempt, error, delay, batch_size_limit)

    # ---- anybody's writes

    async def expired(self) -> list[Expired]:
        """Running tasks whose lease is over."""
        cursor = self._tasks.find(
            {"status": TaskStatus.RUNNING.name, **_IN_QUEUE_INDEX, "$expr": self._lease_over()},
            {"task_id": True, "owner": True, "attempt": True},
        )
        return [
            Expired(found["_id"], found.get("task_id"), str(found.get("owner")), found.get("attempt", 0))
            for found in await self._db.call(cursor.to_list)
        ]

    async def recover(self, lost: Expired) -> Waiting:
        """Take a task from a worker that stopped renewing: PENDING again, or FAILED. Raises LostTask if it renewed."""
        fence = {
            "_id": lost.key,
            "status": TaskStatus.RUNNING.name,
            "owner": lost.owner,
            "attempt": lost.attempt,
            "$expr": self._lease_over(),
        }
        error = TaskError(
            "lost_worker", f"worker {lost.owner} stopped renewing its lease during attempt {lost.attempt}"
        )
        return await self._fault(fence, lost.attempt, error, None, None)

    async def cancel_waiting(self, key: Any = None) -> int:
        """End PENDING tasks whose client asked for that: the one with this `_id`, or all. Returns how many."""
        only = {} if key is None else {"_id": key}
        ended = await self._db.call(
            self._tasks.update_many,
            {"status": TaskStatus.PENDING.name, "cancel_requested": True, **_IN_QUEUE_INDEX, **_ADMITTED, **only},
            [
                {
                    "$set": {
                        "status": TaskStatus.CANCELLED.name,
                        "end_time": "$$NOW",
                        # Instead of that of an attempt before, if there was one.
                        "error": _literal(CANCELLED.document()),
                        "error_code": int(CANCELLED.code),
                        "history": _history(TaskStatus.CANCELLED.name, attempt="$attempt"),
                    }
                },
                {"$unset": ["not_before"]},
            ],
        )
        return ended.modified_count

    async def files_named(self, task_ids: Sequence[Any], message_ids: Sequence[str]) -> set[str]:
        """Hex ids of all files that these tasks name, and of these messages those that any task names."""
        named: set[str] = set()
        cursor = self._tasks.find(
            {"$or": [{"task_id": {"$in": list(task_ids)}}, {"json_mongodb_id": {"$in": list(message_ids)}}]},
            {"snapshot.file_id": True, "json_mongodb_id": True, "result.reports": True},
        )
        async with aclosing(self._db.batches(cursor)) as batches:
            async for batch in batches:
                for document in batch:
                    reports = (document.get("result") or {}).get("reports") or {}
                    snapshot = (document.get("snapshot") or {}).get("file_id")
                    named.update(map(str, (snapshot, document.get("json_mongodb_id"), *reports.values())))
        return named

    # ---- shared pieces

    def _fence(self, task: Task) -> Document:
        return {
            "_id": task.key,
            "owner": task.owner,
            "attempt": task.attempt,
            "status": TaskStatus.RUNNING.name,
        }

    def _lease_over(self) -> Document:
        # The status says RUNNING: a lease that is missing was forged away, and is over.
        return {"$lt": [{"$ifNull": ["$lease_renewed_at", "$create_time"]}, {"$subtract": ["$$NOW", self._lease_ms]}]}

    async def _fenced(self, task: Task, update: Document | list[Document]) -> None:
        changed = await self._db.call(self._tasks.update_one, self._fence(task), update)
        if not changed.matched_count:
            raise LostTask(task.task_id)

    async def _fault(
        self, fence: Document, attempt: int, error: TaskError, delay: float | None, batch_size_limit: int | None
    ) -> Waiting:
        over: Document = {"$gte": ["$failures", "$max_attempts"]}
        doubling = {"$min": [300_000, {"$multiply": [1000, {"$pow": [2, {"$subtract": ["$failures", 1]}]}]}]}
        fields: Document = {
            "status": {"$cond": [over, TaskStatus.FAILED.name, TaskStatus.PENDING.name]},
            "error": _literal(error.document()),
            "error_code": int(error.code),
            "history": _history(
                {"$cond": [over, TaskStatus.FAILED.name, TaskStatus.PENDING.name]},
                attempt=attempt,
                reason=_literal(f"{error.kind}: {error.message}"[:300]),
            ),
            # Adding a missing field's value to a document is how a pipeline leaves a field out.
            "end_time": {"$cond": [over, "$$NOW", "$$REMOVE"]},
            "not_before": {
                "$cond": [over, "$$REMOVE", {"$add": ["$$NOW", doubling if delay is None else int(delay * 1000)]}]
            },
        }
        if batch_size_limit is not None:
            fields["batch_size_limit"] = batch_size_limit
        after = await self._db.call(
            self._tasks.find_one_and_update,
            fence,
            [{"$set": _COUNTED_FAULT}, {"$set": fields}, {"$unset": ["owner", "lease_renewed_at"]}],
            projection={"status": True, "failures": True},
            return_document=ReturnDocument.AFTER,
        )
        if after is None:
            raise LostTask(str(fence["_id"]))
        return Waiting(after["status"], after["failures"])


def _fits(kind: str, number: int) -> Document:
    return {"param_request.device_type": kind, "param_request.device_num": {"$lte": number}}


def _due() -> Document:
    """Whether the task may run now: a retry waits until `not_before`, and a cancelled one is not begun."""
    return {
        "$and": [
            {"$lte": [{"$ifNull": ["$not_before", "$$NOW"]}, "$$NOW"]},
            {"$ne": ["$cancel_requested", True]},
        ]
    }
