"""The parts of the contract of DL_TASK that mongomock can keep, over it and over the real server.

What is left out is what it cannot do (mongomock 4 under mongomock-motor 0.0.36), and is tested over the real server
only (`test_tasks.py`, `test_life_cycle.py`):

- state changes (`admit`, `reject`, `claim`, `release`, `retry`, `finish`, `recover`, `cancel_waiting`) are updates by a
  pipeline with `$$NOW`, of which it has no `$unset`, and stores None for sums with `$$NOW`;
- `expired`, `head` and `claim` compare times with `$$NOW` on the server, and find nothing over it;
- `copied_keys` awaits an aggregation, which it does not let one await;
- `unadmitted`, `get`, `new_keys` and `running_of` read raw BSON, since what clients wrote need not be
  readable: it has none (all but the first are tested here over the real server);
- it counts a missing field against a unique index that is partial, so that a second document without a `task_id` is
  refused.

So a task is put into its state by a direct write here, and what is tested are the reads and the plain writes.
"""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from bson import Decimal128, Int64, ObjectId
from pymongo.asynchronous.collection import AsyncCollection

from handlers.errors import LostTask
from handlers.store import connect_store
from handlers.store.database import Database
from handlers.store.indexes import Indexes
from handlers.store.tasks import Tasks
from schemas.params import check_params, stored_params
from schemas.task import Task
from tests.mock_database import MockDatabase

Collection = AsyncCollection[dict[str, Any]]
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture(params=["mongod", "mongomock"])
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    if request.param == "mongomock":
        yield MockDatabase()
        return
    uri, name = request.getfixturevalue("mongo_uri"), request.getfixturevalue("database_name")
    async with connect_store(uri, name) as store:
        yield store.database


RAW = pytest.mark.parametrize("database", ["mongod"], indirect=True)


@pytest.fixture
async def tasks(database: Database) -> Tasks:
    await Indexes(database).create("DL_TASK")
    return Tasks(database)


@pytest.fixture
def stored(database: Database) -> Collection:
    """The collection as a client sees it."""
    return database.collection("DL_TASK")


async def in_state(stored: Collection, task_id: int, status: str, **fields: Any) -> Any:
    """A task that was admitted, and is in this state."""
    key = ObjectId()
    document = {
        "_id": key,
        "task_id": Int64(task_id),
        "task_type": "TRAIN",
        "param_request": stored_params(check_params({"model_name": "m"})),
        "admitted_id": key,
        "error_code": 0,
        "status": status,
        "attempt": 0,
        "failures": 0,
        "create_time": NOW,
        "history": [],
        **fields,
    }
    await stored.insert_one(document)
    return key


async def running(stored: Collection, task_id: int = 1, **fields: Any) -> Task:
    """A task that `w` claimed for the second time, since when it has not renewed."""
    claimed = {"owner": "w", "attempt": 2, "lease_renewed_at": NOW, "progress": {"iteration": 0}, **fields}
    key = await in_state(stored, task_id, "RUNNING", **claimed)
    found = await stored.find_one({"_id": key})
    assert found is not None
    return Task.from_document(found)


async def test_a_number_is_inserted_once(tasks: Tasks, stored: Collection) -> None:
    """The second one is False, whatever the types of the two are."""
    assert await tasks.insert({"task_id": 7}) is True
    assert await tasks.insert({"task_id": Int64(7)}) is False
    assert await tasks.insert({"task_id": Decimal128(str(2**64 - 1))}) is True
    assert await stored.count_documents({}) == 2


@RAW
async def test_a_document_is_read_by_number_without_its_lists(tasks: Tasks, stored: Collection) -> None:
    """They can be long, and hardly anybody needs them."""
    key = await in_state(stored, 1, "PENDING", img_mongodb_ids=["a", "b"], val_img_mongodb_ids="x")
    found = await tasks.get(1)
    assert found is not None
    assert (found["_id"], found["status"]) == (key, "PENDING")
    assert not {"img_mongodb_ids", "val_img_mongodb_ids"} & set(found)
    assert await tasks.get(2) is None


async def test_the_lists_are_read_one_at_a_time(tasks: Tasks, stored: Collection) -> None:
    """What is no list is none."""
    key = await in_state(stored, 1, "PENDING", img_mongodb_ids=["a", "b"], val_img_mongodb_ids="x")
    assert await tasks.image_ids(key, "img_mongodb_ids") == ["a", "b"]
    assert await tasks.image_ids(key, "val_img_mongodb_ids") == []
    assert await tasks.image_ids(ObjectId(), "img_mongodb_ids") == []


@RAW
async def test_new_documents_are_those_without_a_mark(tasks: Tasks, stored: Collection) -> None:
    """Not those that were admitted, nor copies of them; and no more than asked for."""
    await in_state(stored, 1, "SUCCEEDED")
    await in_state(stored, 2, "SUCCEEDED", admitted_id=ObjectId())
    keys = [(await stored.insert_one({"task_id": number, "status": "RUNNING"})).inserted_id for number in (3, 4)]
    assert sorted(await tasks.new_keys(10)) == sorted(keys)
    assert len(await tasks.new_keys(1)) == 1


async def test_a_cancel_is_asked_for_by_number(tasks: Tasks, stored: Collection) -> None:
    key = await in_state(stored, 1, "RUNNING")
    assert await tasks.request_cancel(1) is True
    assert await tasks.request_cancel(2) is False
    found = await stored.find_one({"_id": key})
    assert found is not None
    assert found["cancel_requested"] is True


async def test_an_owner_renews_with_its_progress_and_learns_of_a_cancel(tasks: Tasks, stored: Collection) -> None:
    """The lease is new, progress is merged into what stood there, and the cancel that the client asked for is told."""
    task = await running(stored, progress={"iteration": 1, "max_num_iters": 50})
    assert await tasks.renew(task, {"iteration": 7, "loss": 0.5}) is False
    found = await stored.find_one({"_id": task.key})
    assert found is not None
    assert found["lease_renewed_at"] > NOW
    assert found["progress"].pop("updated_at") > NOW
    assert found["progress"] == {"iteration": 7, "max_num_iters": 50, "loss": 0.5}
    await tasks.request_cancel(1)
    assert await tasks.renew(task, None) is True
    after = await stored.find_one({"_id": task.key})
    assert after is not None
    assert after["progress"]["iteration"] == 7


async def test_an_owner_notes_its_message_and_its_snapshots(tasks: Tasks, stored: Collection) -> None:
    """A snapshot replaces the one before, whose file is returned; dropped, there is none."""
    task = await running(stored)
    await tasks.note_message(task, "0" * 24)
    first, second = ObjectId(), ObjectId()
    assert await tasks.note_snapshot(task, first, 10, "a") is None
    assert await tasks.note_snapshot(task, second, 20, "b") == first
    found = await stored.find_one({"_id": task.key})
    assert found is not None
    assert found["json_mongodb_id"] == "0" * 24
    assert found["snapshot"] == {"file_id": second, "iteration": 20, "sha256": "b", "attempt": 2}
    await tasks.drop_snapshot(task)
    after = await stored.find_one({"_id": task.key})
    assert after is not None
    assert "snapshot" not in after


@pytest.mark.parametrize(
    "change",
    [
        {"owner": "other"},
        {"attempt": 3},
        {"status": "PENDING"},
        {"status": "SUCCEEDED"},
        {"create_time": NOW.replace(year=2025)},
        None,
    ],
    ids=["owner", "attempt", "waiting", "ended", "inserted again", "deleted"],
)
async def test_who_lost_the_task_writes_nothing(
    tasks: Tasks, stored: Collection, change: dict[str, Any] | None
) -> None:
    """Each plain write raises LostTask, and the document is as it was."""
    task = await running(stored)
    if change is None:
        await stored.delete_one({"_id": task.key})
    else:
        await stored.update_one({"_id": task.key}, {"$set": change})
    before = await stored.find_one({"_id": task.key})
    with pytest.raises(LostTask):
        await tasks.renew(task, {"iteration": 1})
    with pytest.raises(LostTask):
        await tasks.note_message(task, "0" * 24)
    with pytest.raises(LostTask):
        await tasks.note_snapshot(task, ObjectId(), 1, "a")
    with pytest.raises(LostTask):
        await tasks.drop_snapshot(task)
    assert await stored.find_one({"_id": task.key}) == before


@RAW
async def test_what_runs_in_a_name_is_found(tasks: Tasks, stored: Collection) -> None:
    """Of this owner, running, admitted, and without its lists."""
    mine = await running(stored, 1, img_mongodb_ids=["a"])
    await running(stored, 2, owner="other")
    await in_state(stored, 3, "PENDING", owner="w")
    await running(stored, 4, admitted_id=ObjectId())
    found = await tasks.running_of("w")
    assert [Task.from_document(document) for document in found] == [mine]
    assert "img_mongodb_ids" not in found[0]


async def test_the_files_that_tasks_name(tasks: Tasks, stored: Collection) -> None:
    """Snapshot and reports of these tasks, and the messages that any task names."""
    snapshot, report, message = ObjectId(), ObjectId(), str(ObjectId())
    await running(stored, 1, snapshot={"file_id": snapshot, "iteration": 1, "sha256": "a"})
    await in_state(stored, 2, "SUCCEEDED", result={"reports": {"plot": report}})
    await in_state(stored, 3, "PENDING", json_mongodb_id=message)
    named = await tasks.files_named([Int64(1), Int64(2)], [message, str(ObjectId())])
    assert named - {"None"} == {str(snapshot), str(report), message}
