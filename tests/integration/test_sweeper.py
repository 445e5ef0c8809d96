"""The sweep repairs what a hint missed, and takes nothing from an owner that could not renew."""

from typing import Any

import anyio
import pytest
import structlog
from bson import Int64, ObjectId
from pymongo.client_session import ClientSession
from pymongo.database import Database
from pymongo.errors import AutoReconnect, ExecutionTimeout, OperationFailure
from structlog.testing import capture_logs

import service.sweeper
from handlers.store import Store
from handlers.store.stream import Hint
from service.attempt import QUIET_RENEW_SECONDS
from service.logs import Story
from service.metrics import Metrics
from service.sweeper import Sweeper
from tests.helpers import train_request

Db = Database[dict[str, Any]]


class Clock:
    """A monotonic clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(service.sweeper, "time", made)
    return made


@pytest.fixture
def story() -> Story:
    return Story()


@pytest.fixture
def sweeper(store: Store, story: Story) -> Sweeper:
    return Sweeper(
        store,
        owner="w",
        every_seconds=0.01,
        wake=lambda: None,
        describe=lambda: {"host": "here"},
        story=story,
        metrics=Metrics(),
    )


async def run_once(sweeper: Sweeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """One turn of `Sweeper.run`."""
    with anyio.CancelScope() as scope:

        async def stop(seconds: float) -> None:
            scope.cancel()
            await anyio.lowlevel.checkpoint()

        with monkeypatch.context() as patch:
            patch.setattr(service.sweeper.anyio, "sleep", stop)
            await sweeper.run()


async def lose(store: Store, sweeper: Sweeper, db: Db, monkeypatch: pytest.MonkeyPatch, count: int = 1) -> None:
    """The tasks 1 … `count`, whose worker has been silent for a day."""
    db.DL_TASK.insert_many([train_request(number) for number in range(1, count + 1)])
    await run_once(sweeper, monkeypatch)
    for _ in range(count):
        await store.tasks.claim("dead", {"CPU": 1})
    db.DL_TASK.update_many({}, [{"$set": {"lease_renewed_at": {"$subtract": ["$$NOW", 10**8]}}}])


async def test_new_documents_cancels_and_the_worker_itself(
    store: Store, sweeper: Sweeper, db: Db, image_ids: list[ObjectId]
) -> None:
    """Without any hint: admitted or rejected, ended if cancelled, and this worker is on the list of workers."""
    db.DL_TASK.insert_many([train_request(1), train_request(2, cancel_requested=True), train_request(-1)])
    await sweeper.sweep()
    found = {task["task_id"]: task["status"] for task in db.DL_TASK.find()}
    assert found == {1: "PENDING", 2: "CANCELLED", -1: "REJECTED"}
    worker = (await store.workers.all())[0]
    assert (worker["_id"], worker["host"]) == ("w", "here")
    assert worker["renewed_at"]


async def test_copies_are_found_at_the_start(sweeper: Sweeper, db: Db, image_ids: list[ObjectId]) -> None:
    """`sweep_all` finds documents that carry another one's state; an ordinary sweep, which is cheap, does not."""
    db.DL_TASK.insert_one({**train_request(1), "status": "SUCCEEDED", "admitted_id": ObjectId()})
    await sweeper.sweep()
    assert db.DL_TASK.count_documents({"status": "SUCCEEDED"}) == 1
    await sweeper.sweep_all()
    assert db.DL_TASK.count_documents({"status": "PENDING"}) == 1


async def test_dropped_collections_get_their_indexes_again(
    store: Store, sweeper: Sweeper, db: Db, image_ids: list[ObjectId]
) -> None:
    """By the sweep of everything, which each drop and each opening of the stream asks for; then it admits."""
    db.DL_TASK.drop()
    db.DL_MODEL.drop()
    db.DL_TASK.insert_one({**train_request(1), "status": "SUCCEEDED", "admitted_id": ObjectId()})
    await sweeper.sweep_all()
    assert await store.indexes.missing() == []
    assert db.DL_TASK.count_documents({"status": "PENDING"}) == 1


async def test_an_index_that_cannot_be_made_stops_nothing(
    store: Store, sweeper: Sweeper, db: Db, image_ids: list[ObjectId]
) -> None:
    """Numbers were used twice while the index was gone, and another index has the name: copies are found all the same.

    The reason is logged each time that everything is swept.
    """
    db.DL_TASK.drop()
    db.DL_TASK.insert_many([train_request(1), train_request(1)])
    db.DL_TASK.insert_one({**train_request(2), "status": "SUCCEEDED", "admitted_id": ObjectId()})
    db.DL_TASK.create_index("priority", name="admitted")
    with structlog.testing.capture_logs() as logs:
        await sweeper.sweep_all()
    assert db.DL_TASK.count_documents({"status": "PENDING"}) == 3
    reasons = " ".join(line["reason"] for line in logs if line["event"] == "index missing")
    assert "task_id 1 in 2 documents" in reasons
    assert "DL_TASK.admitted" in reasons
    assert await store.indexes.missing() == ["DL_TASK.task_id"]  # `admitted` is another one's


@pytest.mark.parametrize("method", ["new_keys", "copied_keys", "cancel_waiting"])
async def test_a_step_that_fails_keeps_no_other_from_its_work(
    store: Store,
    sweeper: Sweeper,
    db: Db,
    image_ids: list[ObjectId],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    """A look for new documents that always takes too long, say: lost tasks are taken back, and leases judged."""
    await lose(store, sweeper, db, monkeypatch)

    def failing(*args: Any) -> Any:
        raise ExecutionTimeout("operation exceeded time limit", 50)

    monkeypatch.setattr(store.tasks, method, failing)
    sweeper._missed = True
    await run_once(sweeper, monkeypatch)
    clock.now += 2 * QUIET_RENEW_SECONDS
    await run_once(sweeper, monkeypatch)
    assert db.DL_TASK.count_documents({"status": "PENDING", "failures": 1}) == 1


async def test_a_document_that_cannot_be_read_in_time_keeps_no_other_waiting(
    store: Store, sweeper: Sweeper, db: Db, image_ids: list[ObjectId], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again by the next sweep, also if it is a copy; those after it are admitted at once."""
    copy = {**train_request(1), "status": "SUCCEEDED", "admitted_id": ObjectId()}
    slow = db.DL_TASK.insert_many([copy, train_request(2)]).inserted_ids[0]
    unadmitted = store.tasks.unadmitted

    async def late(key: Any) -> Any:
        if key == slow:
            raise ExecutionTimeout("operation exceeded time limit", 50)
        return await unadmitted(key)

    with monkeypatch.context() as patch:
        patch.setattr(store.tasks, "unadmitted", late)
        await sweeper.sweep_all()
    assert db.DL_TASK.count_documents({"status": "PENDING"}) == 1
    await sweeper.sweep()
    assert db.DL_TASK.count_documents({"status": "PENDING"}) == 2


async def test_a_copy_whose_admission_failed_is_admitted_by_the_next_sweep(
    store: Store, sweeper: Sweeper, db: Db, image_ids: list[ObjectId], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hint came while the database was away; the copy has a state, and is found all the same."""
    key = db.DL_TASK.insert_one({**train_request(1), "status": "SUCCEEDED"}).inserted_id
    send, receive = anyio.create_memory_object_stream[Hint](1)

    async def away(key: Any) -> Any:
        raise AutoReconnect("away")

    with monkeypatch.context() as patch, send, receive:
        patch.setattr(store.tasks, "unadmitted", away)
        await send.send(Hint(key, new=True, cancel=False))
        send.close()
        await sweeper.admit_from(receive)
        with pytest.raises(AutoReconnect):
            await sweeper.sweep()
    assert db.DL_TASK.count_documents({"status": "SUCCEEDED"}) == 1
    await sweeper.sweep()
    assert db.DL_TASK.count_documents({"status": "PENDING"}) == 1


async def test_a_bug_in_admission_is_met_once(
    store: Store, sweeper: Sweeper, db: Db, image_ids: list[ObjectId], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document that admission cannot digest is REJECTED, not looked at by every worker at every sweep."""

    async def bug(*args: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(store.records, "is_empty", bug)
    db.DL_TASK.insert_one(train_request(1))
    await sweeper.sweep()
    rejected = db.DL_TASK.find_one({})
    assert rejected is not None
    assert (rejected["status"], rejected["error_code"]) == ("REJECTED", 7)


async def test_a_lease_is_judged_only_after_two_renewal_intervals_without_an_error(
    store: Store,
    sweeper: Sweeper,
    db: Db,
    image_ids: list[ObjectId],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a start and after every error the owners get the time to renew; then the task is taken back."""
    await lose(store, sweeper, db, monkeypatch)

    def status() -> Any:
        return (db.DL_TASK.find_one({}) or {})["status"]

    clock.now += 2 * QUIET_RENEW_SECONDS - 1
    await run_once(sweeper, monkeypatch)
    assert status() == "RUNNING"

    async def away(*args: Any) -> None:
        raise AutoReconnect("away")

    with monkeypatch.context() as patch:
        patch.setattr(store.workers, "renew", away)
        await run_once(sweeper, monkeypatch)
    clock.now += 100
    await run_once(sweeper, monkeypatch)
    assert status() == "RUNNING"
    clock.now += 2 * QUIET_RENEW_SECONDS - 1
    await run_once(sweeper, monkeypatch)
    assert status() == "RUNNING"
    clock.now += 1
    await run_once(sweeper, monkeypatch)
    assert status() == "PENDING"


async def test_what_is_told_of_a_lost_worker_is_stored_later_if_it_cannot_be_stored_now(
    store: Store,
    sweeper: Sweeper,
    story: Story,
    db: Db,
    image_ids: list[ObjectId],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who lost the task cannot tell; the one that took it back does, when the database takes it."""
    await lose(store, sweeper, db, monkeypatch)

    async def away(*args: Any) -> None:
        raise AutoReconnect("away")

    clock.now += 2 * QUIET_RENEW_SECONDS
    with monkeypatch.context() as patch:
        patch.setattr(store.traces, "append_log", away)
        with capture_logs([structlog.contextvars.merge_contextvars, story]):
            await run_once(sweeper, monkeypatch)
    assert (db.DL_TASK.find_one({}) or {})["status"] == "PENDING"
    assert db.DL_TASK_LOG.find_one({}) is None
    await run_once(sweeper, monkeypatch)
    (line,) = (db.DL_TASK_LOG.find_one({"_id": 1}) or {})["lines"]
    assert '"task taken back"' in line


async def test_a_task_changed_by_hand_does_not_stop_the_others(
    store: Store, sweeper: Sweeper, db: Db, image_ids: list[ObjectId], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A count of failures that is none any more is used up; the next task is taken back all the same."""
    await lose(store, sweeper, db, monkeypatch, 2)
    db.DL_TASK.update_one({"task_id": Int64(1)}, {"$set": {"failures": "many"}})
    clock.now += 100
    await run_once(sweeper, monkeypatch)
    assert {task["task_id"]: task["status"] for task in db.DL_TASK.find()} == {1: "FAILED", 2: "PENDING"}


async def test_a_storm_of_admissions_leaves_time_for_the_rest(
    sweeper: Sweeper,
    store: Store,
    db: Db,
    image_ids: list[ObjectId],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sweep takes expired leases back first, and leaves to the next what it cannot admit in ten seconds."""
    await lose(store, sweeper, db, monkeypatch)
    clock.now += 2 * QUIET_RENEW_SECONDS
    db.DL_TASK.insert_many([train_request(number) for number in range(2, 7)])
    admit, begun_with = sweeper.admit, []

    async def slow(key: Any) -> None:
        begun_with.append((db.DL_TASK.find_one({"task_id": 1}) or {})["status"])
        clock.now += 6
        await admit(key)

    monkeypatch.setattr(sweeper, "admit", slow)
    admitted = []
    for _ in range(3):
        await run_once(sweeper, monkeypatch)
        admitted.append(db.DL_TASK.count_documents({"task_id": {"$gt": 1}, "status": "PENDING"}))
    assert admitted == [2, 4, 5]
    assert begun_with == ["PENDING"] * 5


def begin_to_end(db: Db, task_id: int) -> ClientSession:
    """What a worker leaves that is killed in the middle of the transaction that ends its task: it goes on."""
    session = db.client.start_session()
    session.start_transaction()
    db.DL_TASK.update_one({"task_id": Int64(task_id)}, {"$set": {"status": "SUCCEEDED"}}, session=session)
    return session


async def test_a_transaction_that_a_killed_worker_left_open_is_ended(
    store: Store, sweeper: Sweeper, db: Db, image_ids: list[ObjectId], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task that it locks is taken back by the first sweep that may: not a minute later, when the server gives the
    transaction up.
    """
    await lose(store, sweeper, db, monkeypatch)
    with begin_to_end(db, 1) as session:
        db.DL_WORKER.insert_one({"_id": "dead", "session": dict(session.session_id)})
        clock.now += 100
        with anyio.fail_after(10):
            await run_once(sweeper, monkeypatch)
        assert (db.DL_TASK.find_one({}) or {})["status"] == "PENDING"
        with pytest.raises(OperationFailure, match="has been aborted"):
            session.commit_transaction()


async def test_a_locked_task_does_not_keep_the_others_waiting(
    store: Store, sweeper: Sweeper, db: Db, image_ids: list[ObjectId], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever locks it, say a client's own transaction: the others are taken back, and it once it is free."""
    await lose(store, sweeper, db, monkeypatch, 2)
    monkeypatch.setattr("handlers.store.database.LOOK_SECONDS", 0.5)
    clock.now += 100
    with begin_to_end(db, 1) as session:
        with capture_logs() as logs:
            await run_once(sweeper, monkeypatch)
        assert {task["task_id"]: task["status"] for task in db.DL_TASK.find()} == {1: "RUNNING", 2: "PENDING"}
        assert [log["task_id"] for log in logs if log["event"] == "task not taken back"] == ["1"]
        session.abort_transaction()
    await run_once(sweeper, monkeypatch)
    assert db.DL_TASK.count_documents({"status": "PENDING"}) == 2


async def test_a_worker_names_the_session_of_its_transactions(
    store: Store, sweeper: Sweeper, db: Db, image_ids: list[ObjectId]
) -> None:
    """Before the first of them, on the list of workers; who reads the list does not see it."""
    await sweeper.sweep()
    named = (db.DL_WORKER.find_one({}) or {})["session"]

    async def body(session: Any) -> Any:
        return dict(session.session_id)

    assert await store.database.transaction(body) == named
    assert await store.database.transaction(body) == named
    assert "session" not in (await store.workers.all())[0]


async def test_a_session_that_may_not_be_ended_stops_nothing(
    store: Store, sweeper: Sweeper, db: Db, image_ids: list[ObjectId], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is logged, and the task is taken back as soon as nothing locks it."""
    await lose(store, sweeper, db, monkeypatch)
    db.DL_WORKER.insert_one({"_id": "dead", "session": {"id": "no session id"}})
    clock.now += 100
    with capture_logs() as logs:
        await run_once(sweeper, monkeypatch)
    assert [log["lost_owner"] for log in logs if log["event"] == "session not ended"] == ["'dead'"]
    assert (db.DL_TASK.find_one({}) or {})["status"] == "PENDING"
