"""The life cycle as a model: any order of calls by two workers, a client and time, against the real server.

A pure-Python model says what each call of `handlers/store/tasks.py` must return and what it must leave; after each step
every document is compared with it. `DLTASK_MODEL_EXAMPLES=2000` (and `DLTASK_MODEL_STEPS=80`) runs it longer, with new
examples each time: `DLTASK_MODEL_EXAMPLES=2000 pytest tests/integration/test_life_cycle.py --timeout 0`.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from bson import ObjectId
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from pymongo import MongoClient

from handlers import train
from handlers.errors import LostTask
from handlers.prepare import Uploads
from handlers.store import Store, connect_store
from handlers.store.tasks import Expired, Rejection, TaskError
from schemas.enums import TaskErrorCode, TaskStatus
from schemas.numbers import bson_uint64
from schemas.params import check_params, stored_params
from schemas.task import Task
from tests.integration.test_tasks import trained

EXAMPLES = int(os.environ.get("DLTASK_MODEL_EXAMPLES", "0"))
STEPS = int(os.environ.get("DLTASK_MODEL_STEPS", "50"))

ENDED = ("SUCCEEDED", "FAILED", "CANCELLED", "REJECTED")
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
FAR_AHEAD = datetime(2100, 1, 1, tzinfo=UTC)
FAULT = TaskError("child_died", "it died")

#: Nobody's clock runs out by itself in a test: a lease is moved into the past, and so is `not_before`.
LEASE_SECONDS = 100_000.0


@dataclass(eq=False)
class Doc:
    """What must be so of one document, from its insertion to its deletion or replacement."""

    key: ObjectId
    number: int
    #: As the client wrote it, or as it was when it ended; None while the service may change it.
    frozen: dict[str, Any] | None
    kind: str = "CPU"
    devices: int = 1
    priority: int = 0
    max_attempts: int = 3
    cancel: bool = False
    #: There, and not replaced by another one of the same `_id`.
    there: bool = True
    admitted: bool = False

    status: str | None = None
    attempt: int = 0
    failures: int = 0
    owner: str | None = None
    error: str | None = None
    code: int = 0
    kept: int = 0
    failed_at: int = 0
    snapshot: dict[str, Any] | None = None
    message: str | None = None
    batch_size_limit: int | None = None
    runs_alone: bool | None = None
    due: bool = True
    lease_over: bool = False
    changes: list[tuple[str, int]] = field(default_factory=list)

    def change(self, status: str) -> None:
        self.status = status
        self.changes = [*self.changes, (status, self.attempt)][-50:]
        if status != "RUNNING":
            self.owner, self.lease_over = None, False

    def fault(self) -> None:
        """One more since the last progress."""
        self.failures = 1 if self.kept > self.failed_at else self.failures + 1
        self.failed_at = max(self.kept, self.failed_at)

    @property
    def waiting(self) -> bool:
        return self.there and self.admitted and self.status == "PENDING"

    @property
    def running(self) -> bool:
        return self.there and self.admitted and self.status == "RUNNING"


@dataclass(frozen=True, eq=False)
class Claimed:
    """What a worker holds after a claim, however much happens to the document later."""

    task: Task
    doc: Doc
    uploads: Uploads

    @property
    def holds(self) -> bool:
        """Whether its writes must be let through."""
        doc, task = self.doc, self.task
        return doc.running and (doc.owner, doc.attempt) == (task.owner, task.attempt)


@dataclass(frozen=True, eq=False)
class Lost:
    """What a sweeper has seen of a lease that was over."""

    expired: Expired
    doc: Doc


#: One of the two workers; which one of several things; whether it is one that still holds.
WORKER = st.sampled_from([0, 1])
PICK = st.integers(0, 30)
MOSTLY = st.sampled_from([True, True, True, False])


def step(when: Callable[["LifeCycle"], object] = bool, often: int = 1, **arguments: st.SearchStrategy[Any]) -> Any:
    """Mark a method as a step that can be taken while `when` holds, with these arguments, so many times as often."""

    def mark(method: Any) -> Any:
        method.step = (when, often, st.fixed_dictionaries(arguments))
        return method

    return mark


class LifeCycle(RuleBasedStateMachine):
    """Two workers (`a` and `b`), a client, and time.

    One rule draws among the steps that can do something, and what they work on mostly among what has come furthest:
    left to chance (and to Hypothesis, which leaves out some rules of many in each example), few tasks would come
    further than their admission.
    """

    def __init__(
        self, portal: BlockingPortal, stores: tuple[Store, Store], client: MongoClient[dict[str, Any]], tmp: Path
    ) -> None:
        super().__init__()
        self.portal, self.stores, self.tmp = portal, stores, tmp
        self.db = client[stores[0].database.db.name]
        for name in ("DL_TASK", "DL_MODEL", "models.files", "models.chunks"):
            self.db[name].delete_many({})
        self.all: list[Doc] = []
        self.claimed: list[Claimed] = []
        self.sightings: list[Lost] = []
        self.numbers = 0
        #: Model names in the order of their versions.
        self.models: dict[str, list[int]] = {}

    # ---- pieces

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        async def run() -> Any:
            return await method(*args, **kwargs)

        return self.portal.call(run)

    def stored(self, doc: Doc) -> dict[str, Any] | None:
        return self.db.DL_TASK.find_one({"_id": doc.key})

    def fenced(self, held: Claimed, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make an owner's call: what it returns if it is the owner's still, else LostTask and nothing changed."""
        if held.holds:
            return self.call(method, *args, **kwargs)
        before = self.stored(held.doc)
        with pytest.raises(LostTask):
            self.call(method, *args, **kwargs)
        assert self.stored(held.doc) == before
        return None

    def fields(self, doc: Doc) -> dict[str, Any]:
        """What `handlers.admission.check` returns for it."""
        params = {"model_name": f"m{doc.number % 2}", "device_type": doc.kind, "device_num": doc.devices}
        return {
            "task_id": bson_uint64(doc.number),
            "task_type": "TRAIN",
            "param_request": stored_params(check_params(params)),
            "priority": doc.priority,
            "max_attempts": doc.max_attempts,
        }

    def next_number(self) -> int:
        self.numbers += 1
        return self.numbers

    def there(self, pick: int, only: Callable[[Doc], bool] = lambda doc: True) -> Doc | None:
        """One of the documents that are there, of these if there is one."""
        docs = [doc for doc in self.all if doc.there]
        docs = [doc for doc in docs if only(doc)] or docs
        return docs[pick % len(docs)] if docs else None

    def held(self, pick: int, holding: bool) -> Claimed:
        """One of all claims so far, of those that still hold if there is one."""
        claimed = ([held for held in self.claimed if held.holds] if holding else []) or self.claimed
        return claimed[pick % len(claimed)]

    def set_time(self, doc: Doc, **times: datetime) -> None:
        self.db.DL_TASK.update_one({"_id": doc.key}, {"$set": times})

    def not_due(self, doc: Doc, seconds: float) -> None:
        """Check the delay, and keep the clock from ending it."""
        found = self.stored(doc)
        assert found is not None
        assert found["not_before"] - found["history"][-1]["at"] == timedelta(seconds=seconds)
        doc.due = seconds == 0
        if not doc.due:
            self.set_time(doc, not_before=FAR_AHEAD)

    @rule(data=st.data())
    def do(self, data: st.DataObject) -> None:
        """One step."""
        ready: list[str] = []
        for name, method in vars(LifeCycle).items():
            if hasattr(method, "step"):
                when, often, _ = method.step
                ready += [name] * (often if when(self) else 0)
        name = data.draw(st.sampled_from(ready), label="step")
        arguments = data.draw(getattr(LifeCycle, name).step[2], label=name)
        getattr(self, name)(**arguments)

    # ---- the client

    @initialize(
        devices=st.lists(st.sampled_from([1, 1, 2]), min_size=1, max_size=3), max_attempts=st.sampled_from([3, 3, 2])
    )
    def begin(self, devices: list[int], max_attempts: int) -> None:
        for number in devices:
            self.insert("CPU", number, 0, max_attempts, cancel=False, admitted=True)

    @step(
        often=2,
        kind=st.sampled_from(["CPU", "CPU", "GPU"]),
        devices=st.sampled_from([1, 1, 2]),
        priority=st.integers(-1, 1),
        max_attempts=st.sampled_from([3, 3, 2, 1]),
        cancel=st.sampled_from([False, False, False, True]),
        admitted=MOSTLY,
    )
    def insert(self, kind: str, devices: int, priority: int, max_attempts: int, cancel: bool, admitted: bool) -> None:
        doc = Doc(ObjectId(), self.next_number(), None, kind, devices, priority, max_attempts, cancel)
        doc.frozen = {"_id": doc.key, "task_id": doc.number, "cancel_requested": cancel}
        assert self.call(self.stores[0].tasks.insert, doc.frozen) is True
        self.all.append(doc)
        if admitted:
            self.admit(doc, 0)

    @step(
        pick=PICK,
        how=st.sampled_from(["cancel", "copy", "copy with its number", "replace", "delete", "forge", "forge"]),
        status=st.sampled_from(["PENDING", "PENDING", "RUNNING", "SUCCEEDED", "nonsense", 7]),
        owner=st.sampled_from(["a", "b", None]),
        other=st.booleans(),
        admitted=MOSTLY,
    )
    def disturb(self, pick: int, how: str, status: Any, owner: Any, other: bool, admitted: bool) -> None:
        """What a client may do beside inserting."""
        first = {"forge": lambda doc: not doc.admitted, "replace": lambda doc: doc.running}
        doc = self.there(pick, first.get(how, lambda doc: True))
        if doc is None:
            return
        new = None
        if how == "cancel":
            self.request_cancel(pick)
        elif how == "delete":
            doc.there = False
            self.db.DL_TASK.delete_one({"_id": doc.key})
        elif how == "replace":
            new, worker = self.replaced(doc), "ab".find(doc.owner or "?")
        elif how != "forge":
            new = self.copied(doc, same_number=how != "copy")
        elif not doc.admitted:
            self.forge(doc, status, owner, other)
        if new is not None:
            self.all.append(new)
            if admitted:
                self.admit(new, 1)
                if how == "replace" and worker >= 0:
                    # By whoever has an attempt at the old one, which then asks whether it is still its own.
                    self.claim(worker, {"CPU": 2, "GPU": 2}, idle=True)
                    for held in [held for held in self.claimed if held.doc is doc]:
                        self.fenced(held, self.stores[worker].tasks.renew, held.task, None)

    def copied(self, of: Doc, same_number: bool) -> Doc | None:
        """Inserted as a whole, with the state it is in and all that the service has written into it."""
        found = self.stored(of)
        assert found is not None
        doc = copy.copy(of)
        doc.key, doc.admitted = ObjectId(), False
        doc.number = found["task_id"] if same_number else self.next_number()
        doc.frozen = {**found, "_id": doc.key, "task_id": doc.number}
        inserted = self.call(self.stores[1].tasks.insert, doc.frozen)
        assert inserted is not same_number
        return doc if inserted else None

    def replaced(self, doc: Doc) -> Doc:
        """Deleted and inserted again under its `_id` and number, whatever it was doing."""
        doc.there = False
        taken = self.db.DL_MODEL.count_documents({"task_id": doc.number})  # admission would have rejected it
        number = self.next_number() if taken else doc.number
        new = Doc(doc.key, number, None, doc.kind, doc.devices, doc.priority, doc.max_attempts)
        new.frozen = {"_id": doc.key, "task_id": number}
        self.db.DL_TASK.replace_one({"_id": doc.key}, new.frozen)
        return new

    def forge(self, doc: Doc, status: Any, owner: Any, other: bool) -> None:
        """Fields of the service, in a document that no worker has looked at."""
        forged = {
            "status": status,
            "owner": owner,
            "admitted_id": ObjectId() if other else None,
            "error_code": 0,
            "attempt": 7,
            "failures": 9,
            "failed_at": 10**6,
            "lease_renewed_at": LONG_AGO,
            "not_before": FAR_AHEAD,
            "end_time": LONG_AGO,
            "history": [{"status": "forged"}],
            "snapshot": {"file_id": ObjectId(), "iteration": 99, "sha256": "f"},
            "result": {"version": 99},
            "batch_size_limit": 1,
            "cancel_requested": True,
            **self.fields(doc),
        }
        self.db.DL_TASK.update_one({"_id": doc.key}, {"$set": forged})
        doc.frozen, doc.cancel = self.stored(doc), True

    def request_cancel(self, pick: int) -> None:
        """By number, of a task that is there or was."""
        number = self.all[pick % len(self.all)].number
        named = [doc for doc in self.all if doc.there and doc.number == number]
        assert self.call(self.stores[0].tasks.request_cancel, bson_uint64(number)) is bool(named)
        for doc in named:
            doc.cancel = True
            if doc.frozen is not None:
                doc.frozen["cancel_requested"] = True

    # ---- any worker

    @step(pick=PICK, worker=WORKER, rejected=st.booleans(), rarely=st.booleans(), late=st.booleans())
    def answer(self, pick: int, worker: int, rejected: bool, rarely: bool, late: bool) -> None:
        """The first answer counts; one that comes later, or after anything else, changes nothing."""
        doc = self.there(pick, lambda doc: doc.admitted is late)
        if doc is None:
            return
        if rejected and (late or rarely):
            self.reject(doc, worker)
        else:
            self.admit(doc, worker)

    def admit(self, doc: Doc, worker: int) -> None:
        tasks = self.stores[worker].tasks
        assert (self.call(tasks.unadmitted, doc.key) is None) is doc.admitted
        before = self.stored(doc)
        assert self.call(tasks.admit, doc.key, self.fields(doc)) is not doc.admitted
        if doc.admitted:
            assert self.stored(doc) == before
        else:
            self.answered(doc, "PENDING")

    def reject(self, doc: Doc, worker: int) -> None:
        before = self.stored(doc)
        why = Rejection(TaskErrorCode.PARAM_INVALID, "$field", "$$oops")
        assert self.call(self.stores[worker].tasks.reject, doc.key, why) is not doc.admitted
        if doc.admitted:
            assert self.stored(doc) == before
        else:
            self.answered(doc, "REJECTED")
            doc.error, doc.code = "PARAM_INVALID", 7

    def answered(self, doc: Doc, status: str) -> None:
        """Nothing of what stood there before is left."""
        new = Doc(doc.key, doc.number, None)
        for name in ("attempt", "failures", "owner", "error", "code", "kept", "failed_at", "snapshot", "due"):
            setattr(doc, name, getattr(new, name))
        doc.runs_alone = None
        doc.batch_size_limit, doc.lease_over, doc.changes, doc.frozen, doc.admitted = None, False, [], None, True
        doc.change(status)

    @step(
        when=lambda self: any(doc.there and doc.cancel for doc in self.all),
        pick=PICK,
        every=st.booleans(),
        worker=WORKER,
    )
    def cancel_waiting(self, pick: int, every: bool, worker: int) -> None:
        doc = self.there(pick, lambda doc: doc.cancel)
        if doc is None:
            return
        ended = [other for other in self.all if other.waiting and other.cancel and (every or other is doc)]
        assert len(self.call(self.stores[worker].tasks.cancel_waiting, None if every else doc.key)) == len(ended)
        for other in ended:
            other.change("CANCELLED")
            other.error = "cancelled"

    @step(worker=WORKER)
    def look(self, worker: int) -> None:
        """What each of the looks finds, in the whole collection."""
        tasks = self.stores[worker].tasks
        lost: list[Expired] = self.call(tasks.expired)
        docs = {doc.key: doc for doc in self.all if doc.running and doc.lease_over}
        assert {expired.key for expired in lost} == set(docs)
        assert all((seen.owner, seen.attempt) == (docs[seen.key].owner, docs[seen.key].attempt) for seen in lost)
        self.sightings += [Lost(expired, docs[expired.key]) for expired in lost]

        for owner in "ab":
            found = {document["_id"] for document in self.call(tasks.running_of, owner)}
            assert found == {doc.key for doc in self.all if doc.running and doc.owner == owner}

        new = [doc for doc in self.all if doc.there and not doc.admitted]
        cheap = self.call(tasks.new_keys, 1000)
        assert sorted(cheap) == sorted(doc.key for doc in new if (doc.frozen or {}).get("admitted_id") is None)

        async def copies() -> list[Any]:
            return [key async for key in tasks.copied_keys()]

        assert sorted(self.call(copies)) == sorted(doc.key for doc in new)

    @step(when=lambda self: self.sightings, pick=PICK, newest=MOSTLY, worker=WORKER)
    def recover(self, pick: int, newest: bool, worker: int) -> None:
        """Only what is still as it was seen; another sweeper may have been first, or the owner have renewed."""
        self.recovered(self.sightings[-1] if newest else self.sightings[pick % len(self.sightings)], worker)

    def recovered(self, lost: Lost, worker: int) -> None:
        recover, expired = self.stores[worker].tasks.recover, lost.expired
        now = next((doc for doc in self.all if doc.there and doc.key == lost.doc.key), lost.doc)
        if now.running and now.lease_over and (now.owner, now.attempt) == (expired.owner, expired.attempt):
            self.after_fault(now, self.call(recover, expired), "lost_worker", None)
        else:
            before = self.stored(lost.doc)
            with pytest.raises(LostTask):
                self.call(recover, expired)
            assert self.stored(lost.doc) == before

    def after_fault(self, doc: Doc, after: Any, kind: str, delay: float | None) -> None:
        doc.fault()
        if kind == "lost_worker":
            doc.runs_alone = doc.failures >= doc.max_attempts - 1
        doc.change("FAILED" if doc.failures >= doc.max_attempts else "PENDING")
        doc.error = kind
        assert (after.status, after.failures) == (doc.status, doc.failures)
        if doc.status == "PENDING":
            self.not_due(doc, 2 ** (doc.failures - 1) if delay is None else delay)

    # ---- the owner

    @step(
        when=lambda self: any(doc.waiting for doc in self.all),
        often=2,
        worker=WORKER,
        free=st.sampled_from(
            [{"CPU": 2, "GPU": 2}, {"CPU": 2, "GPU": 0}, {"CPU": 1, "GPU": 1}, {"GPU": 2}, {"CPU": 0}]
        ),
        idle=MOSTLY,
    )
    def claim(self, worker: int, free: dict[str, int], idle: bool) -> None:
        """The best of what waits, is due, is not cancelled and fits; and head says the same of each kind."""
        tasks, owner = self.stores[worker].tasks, "ab"[worker]
        ready = [doc for doc in self.all if doc.waiting and doc.due and not doc.cancel]
        for kind, number in free.items():
            head = self.call(tasks.head, kind, number, 10**10)
            best = self.best(doc for doc in ready if doc.kind == kind and doc.devices <= number)
            assert (head is None) is (not best)
            assert head is None or not head.waited_long
            assert head is None or (head.needed, head.runs_alone) in [
                (doc.devices, bool(doc.runs_alone)) for doc in best
            ]
        fits = [doc for doc in ready if doc.devices <= free.get(doc.kind, 0)]
        best = self.best(doc for doc in fits if idle or not doc.runs_alone)
        found = self.call(tasks.claim, owner, free, idle=idle)
        assert (found is None) is (not best), best
        if found is None:
            return
        (doc,) = (doc for doc in best if doc.key == found["_id"])
        doc.attempt += 1
        doc.owner, doc.error, doc.due = owner, None, True
        doc.change("RUNNING")
        task = Task.from_document(found)
        assert (task.owner, task.attempt, task.task_id) == (owner, doc.attempt, doc.number)
        assert (task.snapshot.iteration if task.snapshot else 0) == doc.kept
        assert (task.batch_size_limit, task.runs_alone) == (doc.batch_size_limit, bool(doc.runs_alone))
        self.claimed.append(Claimed(task, doc, Uploads(self.stores[worker], task)))

    def best(self, docs: Iterator[Doc]) -> list[Doc]:
        """Those that stand first: highest priority, then oldest; several that were admitted in one millisecond."""
        found = {doc.key: doc for doc in docs}
        ages = {
            d["_id"]: d["create_time"] for d in self.db.DL_TASK.find({"_id": {"$in": list(found)}}, ["create_time"])
        }
        order = {key: (-doc.priority, ages[key]) for key, doc in found.items()}
        return [doc for key, doc in found.items() if order[key] == min(order.values())]

    @step(
        when=lambda self: any(doc.waiting for doc in self.all),
        often=4,
        worker=WORKER,
        kept=st.none() | st.integers(1, 5),
        end=st.sampled_from(["goes on", "goes on", "succeeds", "fails", "retried", "lost", "released", "cancelled"]),
    )
    def attempt(self, worker: int, kept: int | None, end: str) -> None:
        """A whole one, for the tasks that take many: it gets so far, and goes on, is done, dies or is lost."""
        for doc in self.all:
            if doc.waiting and not doc.due:
                self.is_due(doc)
        before = len(self.claimed)
        self.claim(worker, {"CPU": 2, "GPU": 2}, idle=True)
        if len(self.claimed) == before:
            return
        held = self.claimed[-1]
        if kept is not None:
            self.note(0, True, "snapshot", kept, held)
        if end == "succeeds":
            self.succeed(0, True, worker, held)
        elif end == "fails":
            self.finish(0, True, TaskStatus.FAILED, held)
        elif end == "cancelled":
            self.finish(0, True, TaskStatus.CANCELLED, held)
        elif end == "released":
            self.release(0, True, worker, held)
        elif end == "retried":
            self.retry(0, True, None, None, held)
        elif end == "lost":
            self.lease_is_over(held.doc)
            self.look(1 - worker)
            for sighting in self.sightings[-2:]:
                self.recovered(sighting, 1 - worker)

    @step(
        when=lambda self: self.claimed,
        pick=PICK,
        holding=MOSTLY,
        worker=WORKER,
        iteration=st.none() | st.integers(0, 9),
    )
    def renew(self, pick: int, holding: bool, worker: int, iteration: int | None) -> None:
        held = self.held(pick, holding)
        progress = None if iteration is None else {"iteration": iteration}
        cancel = self.fenced(held, self.stores[worker].tasks.renew, held.task, progress)
        if held.holds:
            assert cancel is held.doc.cancel
            held.doc.lease_over = False

    @step(
        when=lambda self: self.claimed,
        pick=PICK,
        holding=MOSTLY,
        what=st.sampled_from(["message", "snapshot", "snapshot", "snapshot", "drop"]),
        iteration=st.integers(1, 5),
    )
    def note(self, pick: int, holding: bool, what: str, iteration: int, held: Claimed | None = None) -> None:
        held = held or self.held(pick, holding)
        tasks, doc, message, file_id = self.stores[1].tasks, held.doc, str(iteration) * 24, ObjectId()
        if what == "message":
            self.fenced(held, tasks.note_message, held.task, message)
            if held.holds:
                doc.message = message
        elif what == "drop":
            self.fenced(held, tasks.drop_snapshot, held.task)
            if held.holds:
                doc.kept, doc.snapshot = 0, None
        else:
            before = self.fenced(held, tasks.note_snapshot, held.task, file_id, iteration, "0")
            if held.holds:
                assert before == (doc.snapshot or {}).get("file_id")
                doc.kept = iteration
                doc.snapshot = {"file_id": file_id, "iteration": iteration, "sha256": "0", "attempt": held.task.attempt}

    @step(
        when=lambda self: self.claimed,
        pick=PICK,
        holding=MOSTLY,
        worker=WORKER,
    )
    def release(self, pick: int, holding: bool, worker: int, held: Claimed | None = None) -> None:
        held = held or self.held(pick, holding)
        holds = held.holds
        self.fenced(held, self.stores[worker].tasks.release, held.task, "$why")
        if holds:
            held.doc.change("PENDING")
            self.not_due(held.doc, 0.0)

    @step(
        when=lambda self: self.claimed,
        pick=PICK,
        holding=MOSTLY,
        delay=st.sampled_from([0.0, 0.0, None, 30.0]),
        limit=st.sampled_from([None, None, 4]),
    )
    def retry(
        self, pick: int, holding: bool, delay: float | None, limit: int | None, held: Claimed | None = None
    ) -> None:
        held = held or self.held(pick, holding)
        holds = held.holds
        after = self.fenced(held, self.stores[0].tasks.retry, held.task, FAULT, delay=delay, batch_size_limit=limit)
        if holds:
            held.doc.batch_size_limit = limit or held.doc.batch_size_limit
            self.after_fault(held.doc, after, FAULT.kind, delay)

    @step(
        when=lambda self: self.claimed,
        pick=PICK,
        holding=st.booleans(),
        status=st.sampled_from([TaskStatus.FAILED, TaskStatus.CANCELLED]),
    )
    def finish(self, pick: int, holding: bool, status: TaskStatus, held: Claimed | None = None) -> None:
        """Once; a second time by the same attempt it says that it was done before."""
        held = held or self.held(pick, holding)
        doc, tasks = held.doc, self.stores[0].tasks
        if doc.there and (doc.status, doc.attempt) == (status.name, held.task.attempt):
            before = self.stored(doc)
            assert self.call(tasks.finish, held.task, status, error=FAULT) is False
            assert self.stored(doc) == before
            return
        holds = held.holds
        assert self.fenced(held, tasks.finish, held.task, status, error=FAULT) is (True if holds else None)
        if holds:
            if status is TaskStatus.FAILED:
                doc.fault()
            doc.change(status.name)
            doc.error = FAULT.kind

    @step(when=lambda self: self.claimed, pick=PICK, holding=st.booleans(), worker=WORKER)
    def succeed(self, pick: int, holding: bool, worker: int, held: Claimed | None = None) -> None:
        """The end of a training and its model: both, and once."""
        held = held or self.held(pick, holding)
        doc, store = held.doc, self.stores[worker]
        made, name = trained(self.tmp), held.task.params.model_name
        if doc.there and (doc.status, doc.attempt) == ("SUCCEEDED", held.task.attempt):
            before = self.stored(doc)
            assert before is not None
            assert (
                self.call(train.finish, store, held.task, made, held.uploads, seconds=1.0, notes=()) == before["result"]
            )
            assert self.stored(doc) == before
            return
        holds = held.holds
        result = self.fenced(held, train.finish, store, held.task, made, held.uploads, seconds=1.0, notes=())
        if holds:
            self.models.setdefault(name, []).append(doc.number)
            assert result["version"] == len(self.models[name])
            doc.change("SUCCEEDED")

    # ---- time

    @step(when=lambda self: any(doc.running for doc in self.all), pick=PICK)
    def lease_runs_out(self, pick: int) -> None:
        doc = self.there(pick, lambda doc: doc.running)
        if doc is not None and doc.running:
            self.lease_is_over(doc)

    def lease_is_over(self, doc: Doc) -> None:
        self.set_time(doc, lease_renewed_at=LONG_AGO)
        doc.lease_over = True

    @step(when=lambda self: any(doc.waiting and not doc.due for doc in self.all), pick=PICK)
    def delay_runs_out(self, pick: int) -> None:
        doc = self.there(pick, lambda doc: doc.waiting and not doc.due)
        if doc is not None:
            self.is_due(doc)

    def is_due(self, doc: Doc) -> None:
        self.set_time(doc, not_before=LONG_AGO)
        doc.due = True

    # ---- what must be so at any time

    @invariant()
    def documents_are_as_the_model_says(self) -> None:
        found = {document["_id"]: document for document in self.db.DL_TASK.find()}
        there = [doc for doc in self.all if doc.there]
        assert set(found) == {doc.key for doc in there}
        for doc in there:
            document = found[doc.key]
            if doc.frozen is not None:
                assert document == doc.frozen
                continue
            self.check(doc, document)
            if doc.status in ENDED:
                doc.frozen = document

    def check(self, doc: Doc, document: dict[str, Any]) -> None:
        assert document["admitted_id"] == doc.key
        for name in ("status", "attempt", "failures", "owner", "snapshot", "batch_size_limit", "runs_alone"):
            assert document.get(name) == getattr(doc, name), name
        assert document.get("json_mongodb_id") == doc.message
        assert document.get("failed_at", 0) == doc.failed_at
        assert document["error_code"] == doc.code
        assert (document.get("error") or {}).get("kind") == doc.error
        assert document.get("cancel_requested", False) is doc.cancel
        assert [(change["status"], change["attempt"]) for change in document["history"]] == doc.changes
        last = document["history"][-1]["at"]
        assert document.get("end_time") == (last if doc.status in ENDED else None)
        assert ("lease_renewed_at" in document) is (doc.status == "RUNNING")
        assert ("start_time" in document) is (doc.attempt > 0)
        assert ("result" in document) is (doc.status == "SUCCEEDED")

    @invariant()
    def one_model_for_each_success(self) -> None:
        found: dict[str, list[int]] = {}
        for model in self.db.DL_MODEL.find().sort([("model_name", 1), ("version", 1)]):
            found.setdefault(model["model_name"], []).append(model["task_id"])
            assert model["version"] == len(found[model["model_name"]])
        assert found == self.models

    def teardown(self) -> None:
        """No file is left but those of the models."""
        files = {file["_id"] for file in self.db["models.files"].find({}, ["_id"])}
        assert files == {
            model[name]
            for model in self.db.DL_MODEL.find()
            for name in ("file_id", "weights_file_id")
            if model.get(name)
        }


def test_any_order_of_calls_keeps_the_life_cycle(mongo_uri: str, database_name: str, tmp_path: Path) -> None:
    """Attempts grow by claims alone, ends never change, who lost a task changes nothing, models are one a success."""
    with ExitStack() as stack:
        portal = stack.enter_context(start_blocking_portal("asyncio"))
        client = stack.enter_context(MongoClient(mongo_uri, tz_aware=True))
        first, second = (
            stack.enter_context(
                portal.wrap_async_context_manager(connect_store(mongo_uri, database_name, lease_seconds=LEASE_SECONDS))
            )
            for _ in range(2)
        )
        portal.call(first.indexes.create)
        run_state_machine_as_test(
            lambda: LifeCycle(portal, (first, second), client, tmp_path),
            settings=settings(
                max_examples=EXAMPLES or 30,
                stateful_step_count=STEPS,
                # The same examples each time, so that a change is blamed for what it breaks and for nothing else.
                derandomize=not EXAMPLES,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
