"""DL_TASK: every write to the task collection, one method each.

The collection is the truth; everything else (change stream, timers, memory) only decides when to look. Two rules hold
throughout. A write of a running task filters on `_id`, `create_time`, `owner` and `attempt`, the fence: whoever lost
the task matches nothing and learns it. And a state change is one update that also writes `history`, with the server's
clock (`$$NOW`); values that came from users stand under `$literal`, since a pipeline would expand `'$status'` in them.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bson.raw_bson import RawBSONDocument
from pymongo import ASCENDING, DESCENDING, ReturnDocument
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import DocumentTooLarge, DuplicateKeyError, WriteConcernError

from handlers.errors import LostTask
from handlers.store.database import Database, Document, StoreError, brief, refused
from handlers.store.documents import Unnameable, identity, named, readable
from handlers.store.expressions import (
    ADMITTED,
    COUNTED_FAULT,
    IN_QUEUE_INDEX,
    IS_ADMITTED,
    NOT_ADMITTED,
    NOT_UNDERSTOOD,
    ONCE,
    ONLY_WHAT_ENDED,
    UNDERSTOOD,
    bounded,
    count,
    due,
    fits,
    history,
    is_count,
    literal,
)
from handlers.store.indexes import CLAIM_INDEX
from schemas.enums import TaskErrorCode, TaskStatus
from schemas.numbers import bson_uint64
from schemas.params import shown
from schemas.task import ID_LISTS, SERVICE_FIELDS, TRACE_FIELDS, Task, read_trace
from schemas.version import SCHEMA_VERSION

#: Seconds without a renewal after which another worker may take the task over.
LEASE_SECONDS = 45

#: Best first: the order of the queue.
QUEUE_ORDER = [("priority", DESCENDING), ("create_time", ASCENDING)]


#: `admitted_id` repeats the `_id`, and both together must leave room in 16 MB: for the least of answers.
_MAX_KEY_BYTES = 8 * 1024 * 1024 - 64

_WITHOUT_LISTS = dict.fromkeys(ID_LISTS, False)

#: What a claim gives back: nothing that a client added, be it megabytes of it.
_OF_A_RUN: Document = dict.fromkeys(
    (
        *("task_id", "task_type", "param_request", "dataset", "split", "json_mongodb_id", "owner", "attempt"),
        *("create_time", "snapshot", "batch_size_limit", "runs_alone", "patience", "mirror"),
    ),
    True,
) | {name: bounded(name, 1000) for name in TRACE_FIELDS}

#: Codes of an update whose outcome, or answer, would be over 16 MB, or nested deeper than MongoDB knows.
_UNFIT = (17419, 10334, 17280, 15)


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
class Head:
    """The first of the queue: how many devices it needs, and whether it has waited longer than one should."""

    needed: int
    waited_long: bool
    #: Whether nothing may run beside it.
    runs_alone: bool


@dataclass(frozen=True)
class Waiting:
    """A task taken off a worker: what became of it, and after how many faults."""

    status: str
    failures: int


@dataclass(frozen=True)
class Expired:
    """A running task whose owner has not renewed its lease in time; each value as it stands there, of any type."""

    key: Any
    task_id: Any
    owner: Any
    attempt: Any
    #: What log lines carry of the client's trace.
    trace: Mapping[str, str] = field(default_factory=dict)


class Tasks:
    """The task collection. `lease_seconds` is a setting of tests; every worker of a fleet needs the same."""

    def __init__(self, database: Database, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self._db = database
        self._tasks = database.collection("DL_TASK")
        self.lease_seconds = lease_seconds
        self._lease_ms = int(lease_seconds * 1000)

    @cached_property
    def _raw(self) -> AsyncCollection[RawBSONDocument]:
        """DL_TASK, for what clients wrote: see `documents`."""
        return self._db.raw("DL_TASK")

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
        found = await self._db.call(self._raw.find_one, {"task_id": task_id}, _WITHOUT_LISTS)
        return None if found is None else readable(found)

    async def not_understood(self) -> int:
        """How many waiting and running tasks are left alone here, since a newer version of the service wrote them."""
        live = {"status": {"$in": [TaskStatus.PENDING.name, TaskStatus.RUNNING.name]}, **IN_QUEUE_INDEX}
        return await self._db.call(self._tasks.count_documents, {**live, **NOT_UNDERSTOOD})

    async def image_ids(self, key: Any, field: str) -> list[Any]:
        """One id list of a document; empty if it has none."""
        document = await self._db.call(self._tasks.find_one, {"_id": key}, {field: True, "_id": False})
        ids = (document or {}).get(field)
        return ids if isinstance(ids, list) else []

    # ---- admission

    async def unadmitted(self, key: Any) -> bytes | None:
        """The whole document, if it is there and not yet admitted or rejected; see `documents.strictly`."""
        found = await self._db.call(self._raw.find_one, named(key, NOT_ADMITTED))
        return None if found is None else bytes(found.raw)

    async def new_keys(self, limit: int) -> list[Any]:
        """`_id`s of documents that no worker has looked at, copies of admitted ones apart (see `copied_keys`).

        Nor those beside whose `_id` there is no room for any answer: a thousand of them would hide all others.
        """
        answerable = {"$lt": [{"$bsonSize": {"_id": "$_id"}}, _MAX_KEY_BYTES]}
        cursor = self._raw.find({"admitted_id": None, "$expr": answerable}, {"_id": True}).limit(limit)
        return [readable(document)["_id"] for document in await self._db.call(cursor.to_list)]

    async def copied_keys(self) -> AsyncGenerator[Any, None]:
        """`_id`s of all documents that no worker has admitted, those with a forged or copied state included.

        Reads the index `admitted` from end to end (no documents), so it is for starts and lost stream history. The
        comparison is computed after the projection, lest the planner move it in front and fetch every document.
        """
        pipeline: list[Document] = [{"$project": {"new": {"$ne": ["$admitted_id", "$_id"]}}}, {"$match": {"new": True}}]
        try:
            cursor = await self._db.call(self._raw.aggregate, pipeline, hint="admitted")
        except StoreError as error:
            if not refused(error):
                raise
            # The index is not there, and could not be made: slowly, then, but none is missed.
            cursor = await self._db.call(self._raw.aggregate, pipeline)
        async with aclosing(self._db.batches(cursor)) as batches:
            async for batch in batches:
                for document in batch:
                    yield readable(document)["_id"]

    async def admit(self, key: Any, fields: Mapping[str, Any]) -> bool:
        """Make the document PENDING, with these normalised `fields`; False if somebody else has admitted it."""
        return await self._answer(
            key,
            TaskStatus.PENDING,
            {**{name: literal(value) for name, value in fields.items()}, "error_code": int(TaskErrorCode.OK)},
        )

    async def reject(self, key: Any, rejection: Rejection, *, drop_all: bool = False) -> bool:
        """Make the document REJECTED; False if somebody else has answered it.

        `drop_all` drops what the client wrote, up to the task's number and type: a document can be too full for any
        answer, or of a form that readers choke on.
        """
        error = TaskError(rejection.code.name, rejection.message, rejection.field, rejection.code)
        fields = {"error_code": int(rejection.code), "error": literal(error.document()), "end_time": "$$NOW"}
        if not drop_all:
            try:
                return await self._answer(key, TaskStatus.REJECTED, fields)
            except StoreError as failure:
                if not unfit(failure):
                    raise
        found = await self._db.call(self._raw.find_one, named(key, NOT_ADMITTED), {"task_id": True, "task_type": True})
        if found is None:
            return False
        bare = identity(found)

        async def both(session: AsyncClientSession) -> bool:
            # First a replacement, which alone can be trusted with any document, then the times, by the server's clock.
            await self._db.call(self._tasks.replace_one, named(key, NOT_ADMITTED), bare, session=session)
            return await self._answer(key, TaskStatus.REJECTED, fields, session)

        try:
            return await self._db.transaction(both)
        except DuplicateKeyError:
            # Its number came twice, and the one that is left is another task's.
            bare = {}
            return await self._db.transaction(both)

    async def _answer(
        self,
        key: Any,
        status: TaskStatus,
        fields: Mapping[str, Any],
        session: AsyncClientSession | None = None,
    ) -> bool:
        owned: Document = {
            "admitted_id": "$_id",
            "schema_version": SCHEMA_VERSION,
            "status": status.name,
            "attempt": 0,
            "failures": 0,
            "create_time": "$$NOW",
            # A literal list, not `history`: what stands there was forged or belongs to the copied document.
            "history": [{"status": status.name, "at": "$$NOW", "attempt": 0}],
            **fields,
        }
        cleared = [name for name in SERVICE_FIELDS if name not in owned]
        pipeline: list[Document] = [{"$unset": cleared}, {"$set": owned}]
        answered = await self._db.call(self._tasks.update_one, named(key, NOT_ADMITTED), pipeline, session=session)
        return bool(answered.modified_count)

    # ---- claim

    async def claim(self, owner: str, free: Mapping[str, int], *, idle: bool = True, least: int = 1) -> Document | None:
        """Take the best PENDING task that fits into `free` devices (`{"CPU": 1, "GPU": 4}`), or None.

        `idle`: nothing else runs on this worker, so that it may take a task that is to run alone. Tasks that need
        fewer than `least` devices are left to others.

        Atomic: of many claimers one gets it. Raises nothing for a queue that holds only what does not fit.
        """
        # One that cannot be counted up stays, for the worker to end that task with a reason.
        raised = {"$cond": [is_count("attempt"), {"$add": ["$attempt", 1]}, "$attempt"]}
        needs = [fits(kind, number, least) for kind, number in free.items() if number > 0]
        if not needs:
            return None
        update: list[Document] = [
            {
                "$set": {
                    "status": TaskStatus.RUNNING.name,
                    "owner": literal(owner),
                    "attempt": raised,
                    "lease_renewed_at": "$$NOW",
                    "start_time": {"$ifNull": ["$start_time", "$$NOW"]},
                    # What is no document cannot take the progress to come.
                    "progress": {
                        "$cond": [
                            {"$eq": [{"$type": "$progress"}, "object"]},
                            "$progress",
                            {"iteration": 0, "max_num_iters": "$param_request.max_num_iters", "updated_at": "$$NOW"},
                        ]
                    },
                    "history": history(TaskStatus.RUNNING.name, attempt=raised, owner=literal(owner)),
                }
            },
            {"$unset": ["not_before", "error"]},
        ]
        waiting = {
            "status": TaskStatus.PENDING.name,
            "$or": needs,
            **({} if idle else {"runs_alone": {"$ne": True}}),
            **IN_QUEUE_INDEX,
            **UNDERSTOOD,
            "$expr": {"$and": [due(), IS_ADMITTED]},
        }
        while True:
            try:
                claimed = await self._by_claim_index(
                    self._raw.find_one_and_update,
                    waiting,
                    update,
                    sort=QUEUE_ORDER,
                    projection=_OF_A_RUN,
                    return_document=ReturnDocument.AFTER,
                )
            except AttributeError as error:
                # What PyMongo 4.20 raises over a write concern error in a raw answer, which it wants to complete
                # (`helpers_shared._get_wce_doc`): the claim is done, as after any other such error.
                raise WriteConcernError("the claim was not confirmed by the other members") from error
            except StoreError as error:
                if not unfit(error):
                    raise
                await self._set_aside(waiting, error)
                continue
            return None if claimed is None else _runnable(claimed)

    async def _by_claim_index(self, operation: Callable[..., Awaitable[Any]], *arguments: Any, **options: Any) -> Any:
        """`operation` on what waits. By an index that the server chooses it may pass over all for other devices."""
        try:
            return await self._db.call(operation, *arguments, hint=CLAIM_INDEX, **options)
        except StoreError as error:
            if unfit(error) or not refused(error):
                raise
            # The index is not there, and could not be made: more slowly, then.
            return await self._db.call(operation, *arguments, **options)

    async def _set_aside(self, waiting: Document, error: StoreError) -> None:
        """End the first of the queue, whose document takes no claim: else it would stop all that wait behind it."""
        first = await self._by_claim_index(self._raw.find_one, waiting, {"_id": True}, sort=QUEUE_ORDER)
        if first is not None:
            why = TaskError("document", f"the document takes no update any more: {brief(error)}")
            await self._end(named(readable(first)["_id"], waiting), _failed(why))

    async def running_of(self, owner: str) -> list[Document]:
        """What a claim of `owner` took and none of its attempts has given back, as `claim` returns it.

        A claim can be done although it raised: the answer was lost, or the members did not confirm it in time.
        """
        cursor = self._raw.find(
            {"status": TaskStatus.RUNNING.name, "owner": owner, **IN_QUEUE_INDEX, **ADMITTED}, _OF_A_RUN
        )
        return [_runnable(document) for document in await self._db.call(cursor.to_list)]

    async def head(self, kind: str, total: int, patience_seconds: float, *, least: int = 1) -> Head | None:
        """The best due task that fits into `total` devices of a kind, and needs at least `least`."""
        found = await self._by_claim_index(
            self._tasks.find_one,
            {
                "status": TaskStatus.PENDING.name,
                **fits(kind, total, least),
                **IN_QUEUE_INDEX,
                **UNDERSTOOD,
                "$expr": {"$and": [due(), IS_ADMITTED]},
            },
            {
                "_id": False,
                # 0 for a number that is none, since somebody changed it by hand: nothing is kept free for that.
                "needed": {
                    "$convert": {"input": "$param_request.device_num", "to": "int", "onError": 0, "onNull": 0},
                },
                "runs_alone": True,
                # Compared and not subtracted: so it is no error for a date that is none.
                "waited_long": {
                    "$lt": [
                        {"$ifNull": ["$not_before", "$create_time"]},
                        {"$subtract": ["$$NOW", int(patience_seconds * 1000)]},
                    ]
                },
            },
            sort=QUEUE_ORDER,
        )
        if found is None:
            return None
        return Head(found["needed"], found["waited_long"], runs_alone=found.get("runs_alone") is True)

    # ---- the owner's writes, each behind the fence

    async def renew(self, task: Task, progress: Mapping[str, Any] | None) -> bool:
        """Renew the lease, with the newest progress if there is any; returns whether a cancel is requested.

        It does not ask whether the lease has expired: after an outage every lease has, and only another claim fences.
        Plain operators, since this is the frequent write. Raises LostTask.
        """
        update: Document = {"$currentDate": {"lease_renewed_at": True}}
        if progress:
            update["$set"] = {
                # An int of a child can be larger than what BSON calls one.
                f"progress.{name}": bson_uint64(value) if type(value) is int else value
                for name, value in progress.items()
            }
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
        return _part(before, "snapshot").get("file_id")

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
            "history": history(status.name, attempt=task.attempt),
        }
        if result is not None:
            fields["result"] = literal(dict(result))
        if error is not None:
            fields["error"] = literal(error.document())
        if status is TaskStatus.FAILED:
            fields |= COUNTED_FAULT
        update: list[Document] = [{"$set": fields}, {"$unset": ["owner", "lease_renewed_at"]}]
        if await self._end(self._fence_of_pipeline(task), update, session):
            return True
        # Only the owner of an attempt ends it as SUCCEEDED, so one that stands there is this attempt's own.
        ended = {
            "_id": task.key,
            "create_time": task.create_time,
            "attempt": task.attempt,
            "status": status.name,
        }
        if await self._db.call(self._tasks.find_one, ended, {"_id": True}, session=session) is None:
            raise LostTask(task.task_id)
        return False

    async def refuse(self, claimed: Document, owner: str, error: TaskError) -> None:
        """End a document that `claim` gave to `owner`, and that is no task: FAILED. Nothing happens if it is gone."""
        fence = named(claimed["_id"], {"owner": owner, "status": TaskStatus.RUNNING.name})
        await self._end(fence, _failed(error))

    async def release(self, task: Task, reason: str) -> None:
        """Give the task back without blame (drain, preemption): PENDING at once. Raises LostTask."""
        update: list[Document] = [
            {
                "$set": {
                    "status": TaskStatus.PENDING.name,
                    "not_before": "$$NOW",
                    "history": history(TaskStatus.PENDING.name, attempt=task.attempt, reason=literal(reason[:300])),
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
        return await self._fault(self._fence_of_pipeline(task), task.attempt, error, delay, batch_size_limit)

    # ---- anybody's writes

    async def expired(self) -> list[Expired]:
        """Running tasks whose lease is over."""
        cursor = self._raw.find(
            {
                "status": TaskStatus.RUNNING.name,
                **IN_QUEUE_INDEX,
                **UNDERSTOOD,
                "$expr": {"$and": [self._lease_over(), IS_ADMITTED]},
            },
            {"task_id": True, "owner": True, "attempt": True, "traceparent": bounded("traceparent", 1000)},
        )
        expired = []
        for found in map(readable, await self._db.call(cursor.to_list)):
            trace, _ = read_trace(found)
            task_id, owner, attempt = (found.get(name) for name in ("task_id", "owner", "attempt"))
            expired.append(Expired(found["_id"], task_id, owner, attempt, trace.bound if trace else {}))
        return expired

    async def recover(self, lost: Expired) -> Waiting:
        """Take a task from a worker that stopped renewing: PENDING again, or FAILED. Raises LostTask if it renewed."""
        fence = named(
            lost.key,
            {
                "status": TaskStatus.RUNNING.name,
                # Compared as values, whatever stands there: a document or a pattern would be a question of its own.
                "owner": {"$eq": lost.owner},
                "attempt": {"$eq": lost.attempt},
                "$expr": {"$and": [self._lease_over(), IS_ADMITTED]},
            },
        )
        error = TaskError(
            "lost_worker", f"worker {shown(lost.owner)} stopped renewing its lease in attempt {shown(lost.attempt)}"
        )
        return await self._fault(fence, lost.attempt, error, None, None, worker_lost=True)

    async def cancel_waiting(self, key: Any = None) -> list[Any]:
        """End PENDING tasks whose client asked for that: the one with this `_id`, or all. Returns their `task_id`s."""
        waiting = {"status": TaskStatus.PENDING.name, **IN_QUEUE_INDEX, **UNDERSTOOD, **ADMITTED}
        asked = {**waiting, "cancel_requested": True}
        cursor = self._raw.find(asked if key is None else named(key, asked), {"task_id": True})
        found = [readable(document) for document in await self._db.call(cursor.to_list)]
        fields = {
            "status": TaskStatus.CANCELLED.name,
            "end_time": "$$NOW",
            # Instead of that of an attempt before, if there was one.
            "error": literal(CANCELLED.document()),
            "error_code": int(CANCELLED.code),
            "history": history(TaskStatus.CANCELLED.name, attempt="$attempt"),
        }
        update: list[Document] = [{"$set": fields}, {"$unset": ["not_before"]}]
        # One by one: an update of all would end at the first that has no room for its end.
        return [task.get("task_id") for task in found if await self._end(named(task["_id"], asked), update)]

    async def files_named(self, task_ids: Sequence[Any], message_ids: Sequence[str]) -> set[str]:
        """Hex ids of all files that these tasks name, and of these messages those that any task names."""
        names: set[str] = set()
        cursor = self._tasks.find(
            {"$or": [{"task_id": {"$in": list(task_ids)}}, {"json_mongodb_id": {"$in": list(message_ids)}}]},
            {"snapshot.file_id": True, "json_mongodb_id": True, "result.reports": True},
        )
        async with aclosing(self._db.batches(cursor)) as batches:
            async for batch in batches:
                for document in batch:
                    reports = _part(_part(document, "result"), "reports")
                    snapshot = _part(document, "snapshot").get("file_id")
                    names.update(map(str, (snapshot, document.get("json_mongodb_id"), *reports.values())))
        return names

    async def not_understood_of(self, task_ids: Sequence[Any]) -> list[Any]:
        """Those of these tasks that a newer version of the service wrote: what files they name cannot be known."""
        cursor = self._tasks.find({"task_id": {"$in": list(task_ids)}, **NOT_UNDERSTOOD}, {"task_id": True})
        return [document["task_id"] for document in await self._db.call(cursor.to_list)]

    # ---- shared pieces

    def _fence(self, task: Task) -> Document:
        return {
            "_id": task.key,
            "create_time": task.create_time,
            "owner": task.owner,
            "attempt": task.attempt,
            "status": TaskStatus.RUNNING.name,
        }

    def _fence_of_pipeline(self, task: Task) -> Document:
        """The fence of a state change. Not of a renewal, which plain operators make: it is frequent, and this dear."""
        return {**self._fence(task), "$expr": ONCE}

    def _lease_over(self) -> Document:
        # The status says RUNNING: a lease that is missing was forged away, and is over.
        # So was one that is no date, or lies in the future by more than the clocks of two servers can differ.
        renewed = {"$ifNull": ["$lease_renewed_at", "$create_time"]}
        held = [
            {"$gte": [renewed, {"$subtract": ["$$NOW", self._lease_ms]}]},
            {"$lte": [renewed, {"$add": ["$$NOW", self._lease_ms]}]},
        ]
        return {"$not": [{"$and": held}]}

    async def _fenced(self, task: Task, update: Document | list[Document]) -> None:
        fence = self._fence_of_pipeline(task) if isinstance(update, list) else self._fence(task)
        changed = await self._db.call(self._tasks.update_one, fence, update)
        if not changed.matched_count:
            raise LostTask(task.task_id)

    async def _end(
        self, fence: Mapping[str, Any], update: list[Document], session: AsyncClientSession | None = None
    ) -> bool:
        """Make an update that ends a task; False if none meets the fence."""
        try:
            changed = await self._db.call(self._tasks.update_one, fence, update, session=session)
        except StoreError as failure:
            # Filled by hand since it was admitted. A transaction is over now; its end in another state will fit.
            if session is not None or not unfit(failure):
                raise
            changed = await self._db.call(self._tasks.update_one, fence, [ONLY_WHAT_ENDED, *update])
        return bool(changed.matched_count)

    async def _fault(
        self,
        fence: Mapping[str, Any],
        attempt: Any,
        error: TaskError,
        delay: float | None,
        batch_size_limit: int | None,
        *,
        worker_lost: bool = False,
    ) -> Waiting:
        over: Document = {"$gte": ["$failures", count("max_attempts", 0)]}
        doubling = {"$min": [300_000, {"$multiply": [1000, {"$pow": [2, {"$subtract": ["$failures", 1]}]}]}]}
        fields: Document = {
            "status": {"$cond": [over, TaskStatus.FAILED.name, TaskStatus.PENDING.name]},
            "error": literal(error.document()),
            "error_code": int(error.code),
            "history": history(
                {"$cond": [over, TaskStatus.FAILED.name, TaskStatus.PENDING.name]},
                attempt=literal(attempt),
                reason=literal(f"{error.kind}: {error.message}"[:300]),
            ),
            # Adding a missing field's value to a document is how a pipeline leaves a field out.
            "end_time": {"$cond": [over, "$$NOW", "$$REMOVE"]},
            "not_before": {
                "$cond": [over, "$$REMOVE", {"$add": ["$$NOW", doubling if delay is None else int(delay * 1000)]}]
            },
        }
        if batch_size_limit is not None:
            fields["batch_size_limit"] = batch_size_limit
        if worker_lost:
            # A task that kills its worker takes those beside it along, and each of them is counted a fault. The last
            # attempt shows which one it was.
            fields["runs_alone"] = {"$gte": ["$failures", {"$subtract": [count("max_attempts", 0), 1]}]}
        update: list[Document] = [{"$set": COUNTED_FAULT}, {"$set": fields}, {"$unset": ["owner", "lease_renewed_at"]}]
        try:
            after = await self._db.call(
                self._tasks.find_one_and_update,
                fence,
                update,
                projection={"_id": False, "status": True, "failures": True},
                return_document=ReturnDocument.AFTER,
            )
        except StoreError as failure:
            if not unfit(failure):
                raise
            fields |= {"status": TaskStatus.FAILED.name, "end_time": "$$NOW", "not_before": "$$REMOVE"}
            after = {"status": "FAILED", "failures": 0} if await self._end(fence, update) else None
        if after is None:
            raise LostTask(str(dict(fence).get("_id")))
        return Waiting(after["status"], after["failures"])


def _failed(error: TaskError) -> list[Document]:
    """The update that ends a document of which no attempt could be made."""
    fields: Document = {
        "status": TaskStatus.FAILED.name,
        "end_time": "$$NOW",
        "error_code": int(error.code),
        "error": literal(error.document()),
        "history": history(TaskStatus.FAILED.name, attempt="$attempt"),
    }
    return [{"$set": fields}, {"$unset": ["owner", "lease_renewed_at"]}]


def _part(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = document.get(name)
    return value if isinstance(value, Mapping) else {}


def _runnable(claimed: RawBSONDocument) -> Document:
    """A claimed document; of one that admission never saw, since it would have rejected its `_id`, only that."""
    document = readable(claimed)
    return {"_id": document["_id"]} if isinstance(document["_id"], Unnameable) else document


def unfit(error: StoreError) -> bool:
    """Whether an update was refused for the size or the form of its document, and no other would be."""
    return isinstance(error, DocumentTooLarge) or getattr(error, "code", None) in _UNFIT
