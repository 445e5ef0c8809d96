"""Admitted documents that somebody changed by hand: they end with a reason, and stop no other."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import bson
import pytest
from bson import Decimal128, ObjectId, Regex
from pymongo.database import Database
from pymongo.errors import WriteError

from handlers.admission import admit
from handlers.errors import LostTask
from handlers.store import Store
from handlers.store.tasks import Expired, TaskError
from schemas.enums import TaskStatus
from schemas.task import Task
from tests.fuzz.hostile import nested
from tests.fuzz.raw_bson import Pairs, raw_document
from tests.helpers import Service, ended, running, train_request, wait_for
from tests.integration.test_tasks import claim, pending

Db = Database[dict[str, Any]]
ERROR = TaskError("child_died", "it died")


def document(db: Db, key: Any) -> dict[str, Any]:
    """The document with this `_id`."""
    found = db.DL_TASK.find_one({"_id": key})
    assert found is not None
    return found


NO_TASKS: list[dict[str, Any]] = [
    {"attempt": "x"},
    {"attempt": [1]},
    {"attempt": 2**63 - 1},
    {"attempt": None},
    {"attempt": float("nan")},
    {"param_request": {"device_type": "CPU", "device_num": [1]}},
    {"param_request.model_name": "../x"},
    {"param_request.net_model": "x"},
    {"task_type": "x"},
    {"task_id": Decimal128("Infinity")},
    {"task_id": "x"},
    {"snapshot": "x"},
    {"batch_size_limit": 2**62},
    {"split": "test"},
    {"create_time": "x"},
    {"create_time": None},
]


@pytest.mark.parametrize("change", NO_TASKS, ids=str)
async def test_one_that_is_no_task_any_more(store: Store, db: Db, change: dict[str, Any]) -> None:
    """A claim takes it as any other; it is ended with a reason, and the one after it is claimed."""
    key = await pending(store, db, 1, priority=9)
    db.DL_TASK.update_one({"_id": key}, {"$set": change})
    await pending(store, db, 7)
    claimed = await store.tasks.claim("w", {"CPU": 1})
    assert claimed is not None
    assert claimed["_id"] == key
    with pytest.raises(ValueError, match=r"\w") as raised:
        Task.from_document(claimed)
    await store.tasks.refuse(claimed, "w", TaskError("document", str(raised.value)))
    found = document(db, key)
    assert (found["status"], found["error"]["kind"]) == ("FAILED", "document")
    assert found["end_time"]
    assert "owner" not in found
    task = await claim(store)
    assert task is not None
    assert task.task_id == 7


@pytest.mark.parametrize("value", ["x", {}, None, 5, [1], float("nan")], ids=str)
@pytest.mark.parametrize("end", ["succeed", "fail", "retry", "recover", "cancel"])
async def test_any_value_where_an_update_counts_or_appends(store: Store, db: Db, value: Any, end: str) -> None:
    """`history`, `failures`, `max_attempts`, `progress` and times of any type: the task gets to its next state."""
    key = await pending(store, db, 1)
    names = ("history", "failures", "max_attempts", "not_before", "start_time")
    change = {"$set": dict.fromkeys(names, value)}
    db.DL_TASK.update_one({"_id": key}, {"$set": {"progress": value}})
    db.DL_TASK.update_one({"_id": key}, change)
    assert await store.tasks.head("CPU", 1, 0) is not None
    if end == "cancel":
        db.DL_TASK.update_one({"_id": key}, {"$set": {"cancel_requested": True}})
        assert len(await store.tasks.cancel_waiting()) == 1
    else:
        task = await claim(store)
        assert task is not None
        await store.tasks.renew(task, {"iteration": 1, "max_num_iters": 2**64 - 1})
        db.DL_TASK.update_one({"_id": key}, change)
        if end == "succeed":
            await store.tasks.finish(task, TaskStatus.SUCCEEDED, result={})
        elif end == "fail":
            await store.tasks.finish(task, TaskStatus.FAILED, error=ERROR)
        elif end == "retry":
            await store.tasks.retry(task, ERROR)
        else:
            # Without a lease the time of admission counts.
            times = {"lease_renewed_at": value, "create_time": datetime(2020, 1, 1, tzinfo=UTC)}
            db.DL_TASK.update_one({"_id": key}, {"$set": times})
            (lost,) = await store.tasks.expired()
            await store.tasks.recover(lost)
    found = document(db, key)
    expected = {"succeed": "SUCCEEDED", "cancel": "CANCELLED", "fail": "FAILED"}
    # Five faults of five are used up, and so is a count that is none.
    assert found["status"] == expected.get(end, "FAILED")
    assert isinstance(found["history"], list)


@pytest.mark.parametrize("value", ["x", {"$gt": 0}, [1], None, float("nan"), Regex("."), 7], ids=str)
async def test_a_lost_task_whose_owner_and_attempt_are_none(store: Store, db: Db, value: Any) -> None:
    """They are compared as values, so it is taken back; and a lease that ends in years is no lease."""
    key = await pending(store, db, 1)
    assert await claim(store) is not None
    ahead = datetime.now(UTC) + timedelta(days=999)
    db.DL_TASK.update_one({"_id": key}, {"$set": {"owner": value, "attempt": value, "lease_renewed_at": ahead}})
    (lost,) = await store.tasks.expired()
    await store.tasks.recover(lost)
    assert document(db, key)["status"] == "PENDING"


async def test_a_field_written_twice_under_a_running_task(store: Store, db: Db) -> None:
    """An update by a pipeline would abort the server: its owner can change its state no more, and it stays, alone."""
    for number, name in enumerate(("error", "history", "status")):
        key = await pending(store, db, number)
        task = await claim(store)
        assert task is not None
        twice = Pairs((("x", 1), ("x", 2)))
        if name == "status":
            fields = document(db, key)
            pairs = Pairs((*fields.items(), ("status", "RUNNING"), ("pad", "x" * 2000)))
            db.get_collection("DL_TASK").replace_one({"_id": key}, raw_document(pairs))
        else:
            change = {name: [twice] * 60 if name == "history" else twice, "pad": "x" * 2000}
            db.DL_TASK.update_one({"_id": key}, {"$set": raw_document(change)})
        for write in (
            lambda task: store.tasks.finish(task, TaskStatus.FAILED, error=ERROR),
            lambda task: store.tasks.retry(task, ERROR),
            lambda task: store.tasks.release(task, "drain"),
        ):
            with pytest.raises(LostTask):
                await write(task)
        assert await store.tasks.expired() == []
        db.DL_TASK.update_one({"_id": key}, {"$set": {"cancel_requested": True, "status": "PENDING"}})
        assert len(await store.tasks.cancel_waiting()) == 0
        assert await claim(store) is None
    await pending(store, db, 9)
    assert await claim(store) is not None


def filled(db: Db, key: Any, size: int) -> bool:
    """Whether so many bytes of junk could be added: the tests' small server has not always room for them at once."""
    try:
        db.DL_TASK.update_one({"_id": key}, {"$set": {"junk": "x" * size}})
    except WriteError as error:
        if error.code != 388:  # TransactionTooLargeForCache
            raise
        return False
    return True


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("end", ["fail", "recover", "retry", "cancel", "claim"])
async def test_a_full_document(store: Store, db: Db, end: str) -> None:
    """Filled by hand to 16 MB while it waits or runs: it ends all the same, and keeps what identifies it."""
    key = await pending(store, db, 1)
    task = None if end in ("cancel", "claim") else await claim(store)
    fields = {"cancel_requested": end == "cancel", "junk": "", "lease_renewed_at": datetime(2020, 1, 1, tzinfo=UTC)}
    db.DL_TASK.update_one({"_id": key}, {"$set": fields})
    room = 16 * 1024 * 1024 - len(bson.encode(document(db, key)))
    wait_for(lambda: filled(db, key, room - 10))
    if end == "claim":
        assert await claim(store) is None
    elif task is None:
        assert len(await store.tasks.cancel_waiting()) == 1
    elif end == "fail":
        await store.tasks.finish(task, TaskStatus.FAILED, error=ERROR)
    elif end == "retry":
        assert (await store.tasks.retry(task, ERROR)).status == "FAILED"
    else:
        await store.tasks.recover(Expired(key, task.task_id, task.owner, task.attempt))
    found = document(db, key)
    assert (found["status"], found["task_id"]) == ("CANCELLED" if end == "cancel" else "FAILED", 1)
    assert found["admitted_id"] == key
    assert found["end_time"]
    assert "junk" not in found


def test_a_running_document_is_replaced(serve: Callable[..., Service], db: Db, image_ids: list[ObjectId]) -> None:
    """By its client, under the same `_id`: a new task. The old attempt ends, although the new one has its number."""
    service = serve(cpu_devices=2)
    db.DL_TASK.insert_one(train_request(1, iterations=5000))
    key = running(db, 1)["_id"]
    db.DL_TASK.replace_one({"_id": key}, train_request(1, iterations=5))
    assert ended(db, 1)["progress"]["max_num_iters"] == 5
    found = document(db, key)
    assert (found["status"], found["attempt"]) == ("SUCCEEDED", 1)
    assert found["result"]["iterations"] == 5
    wait_for(lambda: "task lost" in service.log.read_text())
    assert service.stop() == 0
    assert "Traceback" not in service.log.read_text()


def test_the_largest_number_of_iterations(serve: Callable[..., Service], db: Db, image_ids: list[ObjectId]) -> None:
    """2^64-1 is no int of BSON's: its progress is told all the same, and the worker lives."""
    service = serve()
    db.DL_TASK.insert_one(train_request(1, iterations=Decimal128(str(2**64 - 1))))
    wait_for(lambda: running(db, 1)["progress"]["iteration"] > 0)
    db.DL_TASK.update_one({"task_id": 1}, {"$set": {"cancel_requested": True}})
    assert ended(db, 1)["status"] == "CANCELLED"
    assert service.stop() == 0


@pytest.mark.parametrize("name", ["comment", "progress", "history", "history.0", "param_request.x", "snapshot"])
async def test_a_document_nested_as_deep_as_can_be(store: Store, db: Db, name: str) -> None:
    """The server stores it, and cannot put it into the answer of a claim: those behind it are claimed all the same."""
    key = await pending(store, db, 1, priority=9)
    db.DL_TASK.update_one({"_id": key}, {"$set": {name: nested(179 - name.count("."), as_list=name == "history")}})
    await pending(store, db, 2)
    free = {"CPU": 1}
    found = [await store.tasks.claim("w", free), await store.tasks.claim("w", free)]
    assert [one["task_id"] for one in found if one is not None] in ([1, 2], [2])
    assert document(db, key)["status"] == ("RUNNING" if all(found) else "FAILED")


@pytest.mark.usefixtures("roomy")
async def test_a_new_document_that_has_no_room_for_its_state(store: Store, db: Db, image_ids: list[ObjectId]) -> None:
    """Its `_id` stands there twice once it is admitted, which is too much beside the rest: it is rejected."""
    key = "x" * (5 << 20)
    db.DL_TASK.insert_one({"_id": key, **train_request(1, junk="x" * (16_785_000 - 2 * len(key)))})
    await admit(store, key)
    found = document(db, key)
    assert (found["status"], found["error_code"], found["task_id"]) == ("REJECTED", 7, 1)
    assert "no room" in found["error"]["message"]
