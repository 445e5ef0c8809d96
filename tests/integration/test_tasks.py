"""The task collection on the real server: claims, fences, retries and ends."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from bson import Int64, ObjectId
from pymongo.database import Database

from handlers import train
from handlers.detection.job import Trained
from handlers.errors import LostTask, PermanentError
from handlers.prepare import Uploads
from handlers.store import Store
from handlers.store.tasks import Expired, TaskError
from schemas.card import TrainingFacts
from schemas.enums import TaskStatus
from schemas.numbers import bson_uint64
from schemas.params import check_params, stored_params
from schemas.result import ImagesUsed, Metrics
from schemas.task import Task

Db = Database[dict[str, Any]]
Change = Callable[[Store, Task], Any]
ERROR = TaskError("child_died", "it died")
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def fields(task_id: int, *, priority: int = 0, device: str = "CPU", number: int = 1, **more: Any) -> dict[str, Any]:
    """What `handlers.admission.check` returns for a training."""
    params = check_params({"model_name": "m", "device_type": device, "device_num": number, "batch_size": 8})
    return {
        "task_id": bson_uint64(task_id),
        "task_type": "TRAIN",
        "param_request": stored_params(params),
        "priority": priority,
        "max_attempts": 3,
        **more,
    }


async def pending(store: Store, db: Db, task_id: int, **more: Any) -> Any:
    """Insert a document and admit it; returns its `_id`."""
    key = db.DL_TASK.insert_one({"task_id": Int64(task_id)}).inserted_id
    assert await store.tasks.admit(key, fields(task_id, **more))
    return key


async def claim(store: Store, owner: str = "w", **free: int) -> Task | None:
    document = await store.tasks.claim(owner, free or {"CPU": 1})
    return Task.from_document(document) if document else None


async def claimed(store: Store, db: Db, task_id: int = 1, **more: Any) -> Task:
    """A task that was inserted, admitted and claimed."""
    await pending(store, db, task_id, **more)
    task = await claim(store)
    assert task is not None
    assert task.task_id == task_id
    return task


def document(db: Db, task: Task) -> dict[str, Any]:
    found = db.DL_TASK.find_one({"_id": task.key})
    assert found is not None
    return found


def age(db: Db, **fields: datetime) -> None:
    """Move times of every task into the past (or future)."""
    db.DL_TASK.update_many({}, {"$set": fields})


def server_time(db: Db) -> datetime:
    time: datetime = db.client.admin.command("hello")["localTime"].replace(tzinfo=UTC)
    return time


# ---- the queue


@pytest.fixture(params=["indexes", "no index"])
async def either_way(request: pytest.FixtureRequest, store: Store, db: Db) -> None:
    """With the indexes, one of which claims name, and without, as where nobody may create them."""
    db.DL_TASK.drop_indexes()
    if request.param == "indexes":
        await store.indexes.create()


@pytest.mark.usefixtures("either_way")
async def test_higher_priority_first_then_age(store: Store, db: Db) -> None:
    """The best is the one of highest priority, among equals the oldest; a task_id says nothing."""
    for task_id, priority in ((9, 0), (8, 5), (7, -1), (6, 5), (5, 0)):
        await pending(store, db, task_id, priority=priority)
    order = []
    while task := await claim(store):
        order.append(task.task_id)
    assert order == [8, 6, 9, 5, 7]


@pytest.mark.usefixtures("either_way")
async def test_a_task_is_taken_only_where_its_devices_are(store: Store, db: Db) -> None:
    """Kind and number fit, whatever the priority of what does not fit."""
    await pending(store, db, 1, device="GPU", number=2, priority=9)
    await pending(store, db, 2, device="CPU", number=2, priority=8)
    await pending(store, db, 3, device="CPU")
    assert await claim(store, CPU=0, GPU=0) is None
    assert await claim(store, GPU=1) is None
    first = await claim(store, CPU=1, GPU=1)
    assert first is not None
    assert first.task_id == 3
    assert await claim(store, CPU=1, GPU=1) is None
    both = [await claim(store, CPU=2, GPU=4) for _ in range(2)]
    assert [task.task_id for task in both if task] == [1, 2]


async def test_a_retry_waits_until_it_is_due(store: Store, db: Db) -> None:
    """`not_before` in the future keeps a task in the queue; once it is past, the task is taken."""
    key = await pending(store, db, 1)
    db.DL_TASK.update_one({"_id": key}, {"$set": {"not_before": server_time(db) + timedelta(hours=1)}})
    assert await claim(store) is None
    age(db, not_before=LONG_AGO)
    task = await claim(store)
    assert task is not None
    assert "not_before" not in document(db, task)


async def test_a_cancelled_task_is_not_begun(store: Store, db: Db) -> None:
    """`cancel_requested` in the queue: never claimed, ended CANCELLED with end_time and without an older fault."""
    task = await claimed(store, db)
    await store.tasks.retry(task, ERROR, delay=0)
    db.DL_TASK.update_one({"_id": task.key}, {"$set": {"cancel_requested": True}})
    assert await claim(store) is None
    assert len(await store.tasks.cancel_waiting()) == 1
    after = document(db, task)
    assert after["status"] == "CANCELLED"
    assert after["end_time"] == after["history"][-1]["at"]
    assert after["error"]["kind"] == "cancelled"
    assert len(await store.tasks.cancel_waiting()) == 0


async def test_cancel_of_one_leaves_the_others(store: Store, db: Db) -> None:
    """By `_id` only that one; only PENDING ones; and only where the flag is true."""
    first, second = await pending(store, db, 1), await pending(store, db, 2)
    db.DL_TASK.update_many({}, {"$set": {"cancel_requested": True}})
    assert len(await store.tasks.cancel_waiting(first)) == 1
    db.DL_TASK.update_one({"_id": second}, {"$set": {"cancel_requested": "yes"}})
    assert len(await store.tasks.cancel_waiting(second)) == 0
    task = await claim(store)
    assert task is not None
    db.DL_TASK.update_one({"_id": second}, {"$set": {"cancel_requested": True}})
    assert len(await store.tasks.cancel_waiting()) == 0
    assert await store.tasks.renew(task, None) is True


async def test_a_copy_of_a_running_task_is_not_taken_from_its_owner(store: Store, db: Db) -> None:
    """Its lease is over and it carries an owner, and it is nobody's yet: admission alone may write to it."""
    task = await claimed(store, db)
    copy = {**document(db, task), "_id": ObjectId(), "task_id": Int64(2), "lease_renewed_at": LONG_AGO}
    db.DL_TASK.insert_one(copy)
    assert await store.tasks.expired() == []
    with pytest.raises(LostTask):
        await store.tasks.recover(Expired(copy["_id"], 2, task.owner, task.attempt))
    assert db.DL_TASK.find_one({"_id": copy["_id"]}) == copy


async def test_a_forged_waiting_task_is_not_claimed_before_admission(store: Store, db: Db) -> None:
    """A copy of a PENDING document is PENDING in name only: not claimed, not cancelled, not recovered."""
    key = await pending(store, db, 1)
    copy = db.DL_TASK.find_one({"_id": key})
    assert copy is not None
    db.DL_TASK.delete_one({"_id": key})
    forged = {**copy, "_id": ObjectId(), "priority": 99, "cancel_requested": True}
    db.DL_TASK.insert_one(forged)
    assert await claim(store) is None
    assert await store.tasks.head("CPU", 1, 0) is None
    assert len(await store.tasks.cancel_waiting()) == 0
    assert [k async for k in store.tasks.copied_keys()] == [forged["_id"]]
    assert await store.tasks.admit(forged["_id"], fields(1))
    assert [k async for k in store.tasks.copied_keys()] == []


async def test_twenty_claimers_claim_no_task_twice(store: Store, db: Db) -> None:
    """Many claimers at once over a queue: each task once, with attempt 1."""
    db.DL_TASK.insert_many([{"task_id": Int64(number)} for number in range(100)])
    for found in list(db.DL_TASK.find()):
        await store.tasks.admit(found["_id"], fields(found["task_id"]))
    taken: list[int] = []

    async def claimer(owner: str) -> None:
        while task := await claim(store, owner):
            assert (task.owner, task.attempt) == (owner, 1)
            taken.append(task.task_id)

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(claimer, f"w{number}")
    assert sorted(taken) == list(range(100))


async def test_only_a_claim_raises_the_attempt(store: Store, db: Db) -> None:
    """0 until claimed, then one more with each claim; start_time stays that of the first."""
    key = await pending(store, db, 1)
    before = db.DL_TASK.find_one({"_id": key})
    assert before is not None
    assert before["attempt"] == 0
    attempts, starts = [], []
    for _ in range(3):
        task = await claim(store)
        assert task is not None
        attempts.append(document(db, task)["attempt"])
        starts.append(document(db, task)["start_time"])
        await store.tasks.release(task, "drain")
        assert document(db, task)["attempt"] == attempts[-1]
    assert attempts == [1, 2, 3]
    assert len(set(starts)) == 1


# ---- the fence

WRITES: dict[str, Change] = {
    "renew": lambda store, task: store.tasks.renew(task, {"iteration": 1}),
    "note_message": lambda store, task: store.tasks.note_message(task, "0" * 24),
    "note_snapshot": lambda store, task: store.tasks.note_snapshot(task, ObjectId(), 1, "0"),
    "drop_snapshot": lambda store, task: store.tasks.drop_snapshot(task),
    "succeed": lambda store, task: store.tasks.finish(task, TaskStatus.SUCCEEDED, result={"version": 1}),
    "fail": lambda store, task: store.tasks.finish(task, TaskStatus.FAILED, error=ERROR),
    "cancel": lambda store, task: store.tasks.finish(task, TaskStatus.CANCELLED),
    "release": lambda store, task: store.tasks.release(task, "drain"),
    "retry": lambda store, task: store.tasks.retry(task, ERROR),
    "memory": lambda store, task: store.tasks.retry(task, ERROR, delay=0, batch_size_limit=4),
}


async def test_who_lost_the_task_can_change_nothing(store: Store, db: Db) -> None:
    """After another claim every write of the former owner raises LostTask and leaves the document as it is."""
    for number, (name, write) in enumerate(WRITES.items()):
        old = await claimed(store, db, number)
        await store.tasks.release(old, "drain")
        new = await claim(store, "w" if number % 2 else "other")
        assert new is not None
        before = document(db, new)
        with pytest.raises(LostTask):
            await write(store, old)
        assert document(db, new) == before, name
        await store.tasks.finish(new, TaskStatus.FAILED, error=ERROR)


async def test_a_task_that_was_inserted_again_is_another_one(store: Store, db: Db, tmp_path: Path) -> None:
    """Under its old `_id` and number, and claimed by the same worker, as its first attempt: fenced all the same."""
    old = await claimed(store, db)
    db.DL_TASK.delete_one({"_id": old.key})
    db.DL_TASK.insert_one({"_id": old.key, "task_id": Int64(1)})
    assert await store.tasks.admit(old.key, fields(1))
    new = await claim(store)
    assert new is not None
    assert (new.key, new.owner, new.attempt) == (old.key, old.owner, old.attempt)
    before = document(db, new)
    for name, write in WRITES.items():
        with pytest.raises(LostTask):
            await write(store, old)
        assert document(db, new) == before, name
    with pytest.raises(LostTask):
        await finish(store, old, tmp_path)
    await finish(store, new, tmp_path)
    with pytest.raises(LostTask):
        await finish(store, old, tmp_path)
    assert db.DL_MODEL.count_documents({}) == 1


async def test_an_end_state_never_changes(store: Store, db: Db) -> None:
    """Whatever its last owner, a canceller or a sweeper still tries."""
    number = 0
    for end in (TaskStatus.SUCCEEDED, TaskStatus.FAILED, TaskStatus.CANCELLED):
        number += 1
        task = await claimed(store, db, number)
        await store.tasks.finish(task, end)
        db.DL_TASK.update_one({"_id": task.key}, {"$set": {"cancel_requested": True}})
        before = document(db, task)
        for name, write in WRITES.items():
            if name in ("succeed", "fail", "cancel"):
                continue
            with pytest.raises(LostTask):
                await write(store, task)
        for other in {TaskStatus.SUCCEEDED, TaskStatus.FAILED, TaskStatus.CANCELLED} - {end}:
            with pytest.raises(LostTask):
                await store.tasks.finish(task, other)
        assert await store.tasks.finish(task, end, result={"version": 9}) is False
        assert len(await store.tasks.cancel_waiting()) == 0
        with pytest.raises(LostTask):
            await store.tasks.recover(Expired(task.key, number, task.owner, task.attempt))
        assert not await store.tasks.admit(task.key, fields(number))
        assert document(db, task) == before


async def test_an_end_is_written_with_its_time(store: Store, db: Db) -> None:
    """Each way to an end sets end_time in the same write: it is the time of the last change, by the server's clock."""
    ways: list[Change] = [
        lambda store, task: store.tasks.finish(task, TaskStatus.SUCCEEDED, result={}),
        lambda store, task: store.tasks.finish(task, TaskStatus.FAILED, error=ERROR),
        lambda store, task: store.tasks.finish(task, TaskStatus.CANCELLED),
        lambda store, task: store.tasks.retry(task, ERROR),
    ]
    with db.DL_TASK.watch([{"$match": {"operationType": "update"}}], full_document="updateLookup") as changes:
        for number, end in enumerate(ways):
            task = await claimed(store, db, number, max_attempts=1)
            await end(store, task)
            after = document(db, task)
            assert after["status"] in ("SUCCEEDED", "FAILED", "CANCELLED")
            assert after["end_time"] == after["history"][-1]["at"]
            assert after["history"][-1]["status"] == after["status"]
            assert not {"owner", "lease_renewed_at", "not_before"} & set(after)
        seen = 0
        while (change := changes.try_next()) is not None:
            updated = change["updateDescription"]["updatedFields"]
            if updated.get("status") in ("SUCCEEDED", "FAILED", "CANCELLED", "REJECTED"):
                assert "end_time" in updated
                seen += 1
    assert seen == len(ways)


# ---- leases


async def test_a_lease_that_is_over_fences_nobody_by_itself(store: Store, db: Db) -> None:
    """After an outage every lease is over: the owner renews, and goes on."""
    task = await claimed(store, db)
    age(db, lease_renewed_at=LONG_AGO)
    expired = await store.tasks.expired()
    assert [lost.key for lost in expired] == [task.key]
    assert await store.tasks.renew(task, {"iteration": 7, "loss": 0.5}) is False
    assert await store.tasks.expired() == []
    with pytest.raises(LostTask):
        await store.tasks.recover(expired[0])
    after = document(db, task)
    assert (after["progress"]["iteration"], after["progress"]["loss"]) == (7, 0.5)
    assert after["progress"]["max_num_iters"] == 50_000
    assert after["progress"]["updated_at"] == after["lease_renewed_at"]
    assert await store.tasks.finish(task, TaskStatus.SUCCEEDED)


async def test_a_lost_worker_loses_its_task(store: Store, db: Db) -> None:
    """Lease over, same owner and attempt: PENDING again and one fault more; with another owner or attempt: nothing."""
    task = await claimed(store, db)
    await store.tasks.note_snapshot(task, ObjectId(), 40, "ab")
    assert await store.tasks.expired() == []
    lost = Expired(task.key, 1, task.owner, task.attempt)
    with pytest.raises(LostTask):
        await store.tasks.recover(lost)
    age(db, lease_renewed_at=LONG_AGO)
    for other in (Expired(task.key, 1, "other", task.attempt), Expired(task.key, 1, task.owner, task.attempt + 1)):
        with pytest.raises(LostTask):
            await store.tasks.recover(other)
    after = await store.tasks.recover(lost)
    assert (after.status, after.failures) == ("PENDING", 1)
    waiting = document(db, task)
    assert waiting["error"]["kind"] == "lost_worker"
    assert waiting["snapshot"]["iteration"] == 40
    assert not {"owner", "lease_renewed_at", "end_time"} & set(waiting)
    with pytest.raises(LostTask):
        await store.tasks.renew(task, None)
    age(db, not_before=LONG_AGO)
    again = await claim(store, "w2")
    assert again is not None
    assert again.attempt == 2
    assert again.snapshot is not None
    assert again.snapshot.iteration == 40


async def test_of_two_recoverers_one_succeeds(store: Store, db: Db) -> None:
    """A fault is counted once, however many workers saw the lease run out."""
    task = await claimed(store, db)
    age(db, lease_renewed_at=LONG_AGO)
    lost = (await store.tasks.expired())[0]
    outcomes: list[str] = []

    async def recover() -> None:
        try:
            outcomes.append((await store.tasks.recover(lost)).status)
        except LostTask:
            outcomes.append("lost")

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(recover)
    assert sorted(outcomes) == ["PENDING", *["lost"] * 7]
    assert document(db, task)["failures"] == 1


def dates_in(value: Any) -> list[datetime]:
    if isinstance(value, datetime):
        return [value]
    if isinstance(value, dict | list):
        return [date for inner in (value.values() if isinstance(value, dict) else value) for date in dates_in(inner)]
    return []


async def test_times_are_the_servers(store: Store, db: Db) -> None:
    """No write carries a time of the worker's; all times lie between two looks at the server's clock."""
    before = server_time(db)
    db.command("profile", 2)
    task = await claimed(store, db)
    await store.tasks.renew(task, {"iteration": 1})
    running = document(db, task)
    await store.tasks.retry(task, ERROR, delay=0)
    task = await claim(store) or task
    await store.tasks.release(task, "drain")
    task = await claim(store) or task
    await store.tasks.finish(task, TaskStatus.SUCCEEDED)
    db.command("profile", 0)
    after = document(db, task)
    times = [after["create_time"], after["start_time"], running["progress"]["updated_at"], running["lease_renewed_at"]]
    times += [after["end_time"], *(change["at"] for change in after["history"])]
    assert all(before <= time <= server_time(db) for time in times)
    commands = [entry["command"] for entry in db["system.profile"].find({"ns": f"{db.name}.DL_TASK"})]
    writes = [command.get("u") or command.get("update") for command in commands]
    assert len([write for write in writes if write]) == 8
    assert dates_in(writes) == []


# ---- faults


async def test_faults_are_counted_up_to_max_attempts(store: Store, db: Db) -> None:
    """PENDING with a delay that doubles, then FAILED with end_time; a drain in between counts for nothing."""
    task = await claimed(store, db)
    delays = []
    for failures in (1, 2):
        await store.tasks.release(task, "drain")
        task = await claim(store) or task
        after = await store.tasks.retry(task, ERROR)
        assert (after.status, after.failures) == ("PENDING", failures)
        waiting = document(db, task)
        assert waiting["error"] == {"kind": "child_died", "message": "it died", "field": None}
        delays.append((waiting["not_before"] - waiting["history"][-1]["at"]).total_seconds())
        age(db, not_before=LONG_AGO)
        task = await claim(store) or task
        assert "error" not in document(db, task)
    assert delays == [1, 2]
    after = await store.tasks.retry(task, ERROR)
    assert (after.status, after.failures) == ("FAILED", 3)
    ended = document(db, task)
    assert ended["end_time"]
    assert ended["failures"] == 3
    assert ended["attempt"] == 5


async def test_the_delay_is_bounded_and_can_be_given(store: Store, db: Db) -> None:
    """Five minutes at most; a handler that knows better says so."""
    task = await claimed(store, db, max_attempts=100)
    db.DL_TASK.update_one({"_id": task.key}, {"$set": {"failures": 60}})
    await store.tasks.retry(task, ERROR)
    waiting = document(db, task)
    assert waiting["not_before"] - waiting["history"][-1]["at"] == timedelta(seconds=300)
    age(db, not_before=LONG_AGO)
    task = await claim(store) or task
    await store.tasks.retry(task, ERROR, delay=12.5, batch_size_limit=4)
    waiting = document(db, task)
    assert waiting["not_before"] - waiting["history"][-1]["at"] == timedelta(seconds=12.5)
    assert waiting["batch_size_limit"] == 4


async def test_faults_are_counted_since_the_last_progress(store: Store, db: Db) -> None:
    """A snapshot further than at any fault before begins the count anew, whoever stored it and however long ago."""
    task = await claimed(store, db)
    for kept in (None, 10, None, 20, 30, None, None):
        if kept:
            await store.tasks.note_snapshot(task, ObjectId(), kept, "a")
        if kept == 20:  # stored, and then drained: no fault, and not forgotten at the next one
            await store.tasks.release(task, "drain")
            task = await claim(store) or task
        after = await store.tasks.retry(task, ERROR, delay=0)
        task = await claim(store) or task
        seen = (kept, after.failures, after.status)
        assert seen in [
            (None, 1, "PENDING"),
            (10, 1, "PENDING"),
            (None, 2, "PENDING"),
            (20, 1, "PENDING"),
            (30, 1, "PENDING"),
            (None, 3, "FAILED"),
        ], seen
    assert after.status == "FAILED"


async def test_a_training_that_never_gets_further_is_failed(store: Store, db: Db) -> None:
    """Also where its snapshot is unusable, so that each attempt stores the same one again and dies after it."""
    task = await claimed(store, db)
    seen = []
    for _ in range(3):
        await store.tasks.note_snapshot(task, ObjectId(), 40, "a")
        seen.append((await store.tasks.retry(task, ERROR, delay=0)).failures)
        if (again := await claim(store)) is not None:
            task = again
            await store.tasks.drop_snapshot(task)
    assert seen == [1, 2, 3]
    assert document(db, task)["status"] == "FAILED"


async def test_a_task_of_an_older_version_is_understood(store: Store, db: Db) -> None:
    """Its snapshot does not say which attempt stored it, and no fault has noted how far it got."""
    task = await claimed(store, db)
    old = {"file_id": ObjectId(), "iteration": 40, "sha256": "a"}
    db.DL_TASK.update_one({}, {"$set": {"snapshot": old, "failures": 2}})
    assert (await store.tasks.retry(task, ERROR, delay=0)).failures == 1
    again = await claim(store)
    assert again is not None
    assert again.snapshot is not None
    assert (again.snapshot.iteration, again.snapshot.attempt) == (40, None)


async def test_a_release_blames_nobody(store: Store, db: Db) -> None:
    """PENDING with the reason in its history; due at once; no fault counted."""
    task = await claimed(store, db)
    await store.tasks.release(task, "drain")
    waiting = document(db, task)
    assert (waiting["status"], waiting["failures"]) == ("PENDING", 0)
    assert waiting["history"][-1]["reason"] == "drain"
    assert waiting["not_before"] == waiting["history"][-1]["at"]
    assert not {"owner", "lease_renewed_at", "error"} & set(waiting)
    assert await claim(store) is not None


async def test_what_an_owner_runs_is_found(store: Store, db: Db) -> None:
    """What is RUNNING in this name and no other; a copy that nobody admitted is not."""
    mine = await claimed(store, db)
    await pending(store, db, 2)
    assert await claim(store, "other") is not None
    copy = {**document(db, mine), "_id": ObjectId(), "task_id": Int64(3)}
    db.DL_TASK.insert_one(copy)
    found = [Task.from_document(document) for document in await store.tasks.running_of("w")]
    assert found == [mine]
    await store.tasks.release(mine, "drain")
    assert await store.tasks.running_of("w") == []


async def test_history_is_bounded(store: Store, db: Db) -> None:
    """The newest fifty changes, whatever happened before; a user's words in it are bounded, and not expanded."""
    task = await claimed(store, db, max_attempts=100)
    for number in range(40):
        await store.tasks.release(task, f"$status {number} " + "x" * 1000)
        task = await claim(store) or task
    history = document(db, task)["history"]
    assert len(history) == 50
    assert [change["status"] for change in history[-2:]] == ["PENDING", "RUNNING"]
    assert history[-2]["reason"].startswith("$status 39 xx")
    assert len(history[-2]["reason"]) == 300


async def test_words_of_users_are_not_expanded(store: Store, db: Db) -> None:
    """Texts with dollars in results, errors and owners are stored as they are."""
    await pending(store, db, 1)
    task = await claim(store, "$$NOW")
    assert task is not None
    assert document(db, task)["owner"] == "$$NOW"
    await store.tasks.retry(task, TaskError("$status", "$$oops", "$x"), delay=0)
    assert document(db, task)["error"] == {"kind": "$status", "message": "$$oops", "field": "$x"}
    task = await claim(store) or task
    await store.tasks.finish(task, TaskStatus.SUCCEEDED, result={"a": "$status", "b": {"$c": ["$$oops"]}})
    assert document(db, task)["result"] == {"a": "$status", "b": {"$c": ["$$oops"]}}


# ---- finish and registration


def trained(folder: Path) -> Trained:
    onnx = folder / "model.onnx"
    onnx.write_bytes(b"a model")
    weights = folder / "weights.pt"
    weights.write_bytes(b"its weights")
    return Trained(
        onnx=onnx,
        sha256="0" * 64,
        weights=weights,
        weights_sha256="1" * 64,
        class_names=("a",),
        input_size=320,
        iterations=3,
        best_iteration=3,
        resumed_from_iteration=None,
        initial_weights="made up",
        data_fingerprint="0" * 64,
        device="cpu",
        metrics=Metrics(map=0.5, map_50=0.5, map_75=0.5, per_class=(), on="val"),
        images=ImagesUsed(used=1, skipped=0),
        reports={},
        card=TrainingFacts(
            dataset="toy",
            split="",
            train_images=1,
            val_images=0,
            boxes=(4,),
            batch_size=2,
            seed=1,
            recipe="made up",
            versions={"python": "3"},
        ),
    )


async def finish(store: Store, task: Task, folder: Path, uploads: Uploads | None = None) -> dict[str, Any]:
    return await train.finish(store, task, trained(folder), uploads or Uploads(store, task), seconds=1.0, notes=())


async def test_the_end_of_a_training_and_its_model_are_written_together(store: Store, db: Db, tmp_path: Path) -> None:
    """Both: SUCCEEDED, and version 1 with the file, owner's attempt and the server's time."""
    task = await claimed(store, db)
    result = await finish(store, task, tmp_path)
    after, model = document(db, task), db.DL_MODEL.find_one({})
    assert model is not None
    assert after["result"] == result
    assert (after["status"], result["version"], model["version"]) == ("SUCCEEDED", 1, 1)
    assert (model["model_name"], model["task_id"], model["attempt"]) == ("m", 1, 1)
    assert after["start_time"] <= model["create_time"] <= server_time(db)
    named = {"onnx": model["file_id"], "pt": model["weights_file_id"]}
    files = {file["filename"]: file for file in db["models.files"].find()}
    assert {name: file["_id"] for name, file in files.items()} == {f"m.{end}": key for end, key in named.items()}
    assert files["m.onnx"]["metadata"]["task_id"] == files["m.pt"]["metadata"]["weights_of"] == 1
    assert (model["sha256"], model["weights_sha256"]) == ("0" * 64, "1" * 64)
    assert model["parent_version"] is None
    assert model["card"]["parameters"] == after["param_request"]
    assert (model["card"]["boxes"], model["card"]["batch_size"], model["card"]["seconds"]) == ([4], 2, 1.0)
    assert "parent_version" not in result
    assert result["resumed_from_iteration"] is None


async def test_a_training_that_began_with_a_version_makes_the_next_of_its_name(
    store: Store, db: Db, tmp_path: Path
) -> None:
    """`m:1` makes the newest version of `m`, which names its parent, as the result does."""
    for number in (1, 2):
        await finish(store, await claimed(store, db, number), tmp_path)
    params = {**fields(3)["param_request"], "model_name": "m:1"}
    await pending(store, db, 3, param_request=params)
    task = await claim(store)
    assert task is not None
    result = await finish(store, task, tmp_path)
    model = db.DL_MODEL.find_one({"task_id": 3})
    assert model is not None
    assert (model["model_name"], model["version"], model["parent_version"]) == ("m", 3, 1)
    assert (result["model_name"], result["version"], result["parent_version"]) == ("m", 3, 1)
    assert db["models.files"].count_documents({"filename": {"$in": ["m.onnx", "m.pt"]}}) == 6


async def test_who_lost_a_training_registers_nothing(store: Store, db: Db, tmp_path: Path) -> None:
    """Neither: no model, no file left, the new owner's document untouched."""
    task = await claimed(store, db)
    await store.tasks.release(task, "drain")
    new = await claim(store, "other")
    assert new is not None
    before = document(db, new)
    with pytest.raises(LostTask):
        await finish(store, task, tmp_path)
    assert document(db, new) == before
    assert db.DL_MODEL.count_documents({}) == 0
    assert db["models.files"].count_documents({}) == 0


async def test_a_model_that_cannot_be_registered_leaves_the_task_running(store: Store, db: Db, tmp_path: Path) -> None:
    """Neither: a second model of one task_id is refused, and the end of the task is rolled back with it."""
    task = await claimed(store, db)
    db.DL_MODEL.insert_one({"model_name": "old", "version": 1, "task_id": Int64(1)})
    before = document(db, task)
    with pytest.raises(PermanentError, match="registered already"):
        await finish(store, task, tmp_path)
    assert document(db, task) == before
    assert db.DL_MODEL.count_documents({}) == 1


async def test_a_finish_that_is_tried_again_registers_once(store: Store, db: Db, tmp_path: Path) -> None:
    """The answer to a finish got lost: the second call changes nothing, and returns what the first one wrote."""
    task = await claimed(store, db)
    uploads = Uploads(store, task)
    first = await finish(store, task, tmp_path, uploads)
    before = document(db, task)
    again = await finish(store, task, tmp_path, uploads)
    assert again == first
    assert document(db, task) == before
    model = db.DL_MODEL.find_one({})
    assert model is not None
    assert set(db["models.files"].distinct("_id")) == {model["file_id"], model["weights_file_id"]}


async def test_a_registered_file_stays_when_the_task_is_deleted(store: Store, db: Db, tmp_path: Path) -> None:
    """The answer to a finish got lost, and then somebody deleted the task: the model keeps its file."""
    task = await claimed(store, db)
    uploads = Uploads(store, task)
    await finish(store, task, tmp_path, uploads)
    db.DL_TASK.delete_one({"_id": task.key})
    with pytest.raises(LostTask):
        await finish(store, task, tmp_path, uploads)
    model = db.DL_MODEL.find_one({})
    assert model is not None
    assert set(db["models.files"].distinct("_id")) == {model["file_id"], model["weights_file_id"]}


async def test_trainings_of_one_name_that_finish_at_once_get_their_own_versions(
    store: Store, db: Db, tmp_path: Path
) -> None:
    """Versions 1 to 6, none twice and none missing."""
    tasks = [await claimed(store, db, number) for number in range(6)]
    versions: list[int] = []

    async def one(task: Task) -> None:
        folder = tmp_path / str(task.task_id)
        folder.mkdir()
        versions.append((await finish(store, task, folder))["version"])

    async with anyio.create_task_group() as group:
        for task in tasks:
            group.start_soon(one, task)
    assert sorted(versions) == [1, 2, 3, 4, 5, 6]
    assert sorted(model["version"] for model in db.DL_MODEL.find()) == [1, 2, 3, 4, 5, 6]
    assert all(document(db, task)["status"] == "SUCCEEDED" for task in tasks)


async def test_only_the_snapshot_that_the_document_names_is_resumed_from(store: Store, db: Db) -> None:
    """Each fenced note replaces the one before and returns its file; dropped, the next attempt begins anew."""
    task = await claimed(store, db)
    first, second = ObjectId(), ObjectId()
    assert await store.tasks.note_snapshot(task, first, 10, "a") is None
    assert await store.tasks.note_snapshot(task, second, 20, "b") == first
    assert document(db, task)["snapshot"] == {"file_id": second, "iteration": 20, "sha256": "b", "attempt": 1}
    await store.tasks.drop_snapshot(task)
    assert "snapshot" not in document(db, task)


# ---- how the server finds them


async def test_the_queue_is_read_by_its_index(store: Store, db: Db) -> None:
    """Claims, sweeps and the look for copies scan no collection; the last one reads no document at all."""
    db.DL_TASK.insert_many([{"task_id": Int64(number), "status": "SUCCEEDED"} for number in range(2000)])
    db.DL_TASK.update_many({}, [{"$set": {"admitted_id": "$_id"}}])
    for number in range(3000, 3010):
        await pending(store, db, number)
    commands: list[dict[str, Any]] = []
    db.client.admin.command("profile", 0)
    db.command("profile", 2)
    assert await claim(store) is not None
    assert await store.tasks.head("CPU", 4, 60) is not None
    assert await store.tasks.new_keys(10) == []
    assert [key async for key in store.tasks.copied_keys()] == []
    assert await store.tasks.expired() == []
    assert len(await store.tasks.cancel_waiting()) == 0
    db.command("profile", 0)
    commands = list(db["system.profile"].find({"ns": f"{db.name}.DL_TASK"}))
    assert len(commands) == 6, [command["command"] for command in commands]
    for command in commands:
        assert "IXSCAN" in command["planSummary"], command["command"]
        assert not command.get("hasSortStage"), command["command"]
        assert command["docsExamined"] <= 11, command["command"]
    copied = [command for command in commands if "aggregate" in command["command"]]
    assert [(command["docsExamined"], command["keysExamined"] > 2000) for command in copied] == [(0, True)]
