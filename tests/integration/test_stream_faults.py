"""What really ends a change stream, and what is done to its collection: nothing that was inserted is lost."""

import json
import signal
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest
from bson import ObjectId
from gridfs import GridFSBucket
from pymongo import MongoClient
from pymongo.database import Database
from pymongo.errors import OperationFailure

import service.watcher
from handlers.store import Store, connect_store
from handlers.store.indexes import INDEXES
from handlers.store.stream import hints
from tests.helpers import Service, alive, ended, running, train_request, wait_for
from tests.integration.test_watcher import watching

Db = Database[dict[str, Any]]
Serve = Callable[..., Service]

#: ChangeStreamHistoryLost on resuming, CappedPositionLost on a cursor that was open all the time.
HISTORY_LOST = (286, 136)


@pytest.fixture(scope="module")
def forgetful_uri(start_mongod: Callable[..., str]) -> str:
    """A server with the smallest oplog there is; it forgets at each checkpoint, so there is one each second."""
    return start_mongod("--oplogSize", "1", "--syncdelay", "1")


@pytest.fixture
def forgetful(forgetful_uri: str, database_name: str) -> Any:
    """The test's database on the forgetful server, as a client sees it."""
    with MongoClient(forgetful_uri, tz_aware=True) as client:
        yield client[database_name]
        client.drop_database(database_name)


def forget(db: Db) -> None:
    """Write until the server has forgotten everything up to now."""
    oplog = db.client.local["oplog.rs"]
    now = db.client.admin.command("hello")["lastWrite"]["opTime"]["ts"]
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        db.NOISE.insert_many([{"noise": "x" * 200_000} for _ in range(25)])
        first = next(oplog.find().sort("$natural", 1).limit(1))
        if first["ts"] > now:
            db.NOISE.drop()
            return
        # The server cuts its oplog by and by, and a fast disk is ahead of it.
        time.sleep(0.1)
    pytest.fail("the oplog keeps all that was written in 90 seconds")


def images(db: Db) -> None:
    """One image of the data set `toy`, with a label."""
    file_id = GridFSBucket(db, "images").upload_from_stream("a.jpg", b"not really a picture")
    image = {"file_name": "a.jpg", "width": 32, "height": 32, "file_id": file_id, "dataset": "toy", "split": "train"}
    image_id = db.IMG_INFO.insert_one(image).inserted_id
    db.IMG_LAB_INFO.insert_one({"img_id": image_id, "class_name": "a", "bbox": [1, 1, 8, 8]})


def events(worker: Service) -> list[dict[str, Any]]:
    """The lines of a service's log."""
    return [json.loads(line) for line in worker.log.read_text().splitlines()]


async def test_lost_history_ends_the_stream_with_its_code(
    forgetful_uri: str, forgetful: Db, database_name: str
) -> None:
    """The server has forgotten what the stream has not read: this is the error that the watcher must go on from."""
    opened = anyio.Event()

    async def insert_once_open() -> None:
        await opened.wait()
        forgetful.DL_TASK.insert_one({"task_id": 1})

    async with (
        connect_store(forgetful_uri, database_name) as store,
        aclosing(hints(store.database, opened, lambda second: None)) as stream,
    ):
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                group.start_soon(insert_once_open)
                await anext(stream)
        forget(forgetful)
        with anyio.fail_after(60), pytest.raises(OperationFailure) as lost:
            await anext(stream)
    assert lost.value.code in HISTORY_LOST


def test_what_is_inserted_while_history_is_lost_is_run(
    forgetful: Db, forgetful_uri: str, serve: Serve, dltask_env: dict[str, str]
) -> None:
    """A worker is stopped until its place in the history is gone: it opens the stream afresh, sweeps, and misses none.

    Neither a new task nor the copy of a finished one, which carries an end state and is told by events alone.
    """
    images(forgetful)
    dltask_env["DLTASK_MONGODB_URI"] = forgetful_uri
    worker = serve(sweep_seconds=600)  # so that the sweep that finds them is the one after the stream was opened
    forgetful.DL_TASK.insert_one(train_request(1))
    finished = ended(forgetful, 1)
    worker.process.send_signal(signal.SIGSTOP)
    try:
        forgetful.DL_TASK.insert_one(train_request(2))
        forgetful.DL_TASK.insert_one({**finished, "_id": ObjectId(), "task_id": 3})
        forget(forgetful)
    finally:
        worker.process.send_signal(signal.SIGCONT)
    for task_id in (2, 3):
        wait_for(lambda n=task_id: forgetful.DL_MODEL.find_one({"task_id": n}), 90)
        assert ended(forgetful, task_id)["status"] == "SUCCEEDED"
    copied = ended(forgetful, 3)
    assert (copied["attempt"], copied["result"]["version"]) == (1, 3)
    assert copied["create_time"] > finished["end_time"]
    lost = [line["reason"] for line in events(worker) if line["event"] == "change stream lost"]
    assert any("CollectionScan died" in reason or "resume point" in reason for reason in lost), lost


async def test_killed_sessions_lose_nothing(forgetful_uri: str, forgetful: Db, database_name: str) -> None:
    """An operator's killAllSessions ends cursors and commands: what is inserted then is told, or swept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service.watcher, "_PAUSE_SECONDS", 0.01)
        async with connect_store(forgetful_uri, database_name) as store, watching(store) as watched:
            for number in range(3):
                forgetful.client.admin.command({"killAllSessions": []})
                key = forgetful.DL_TASK.insert_one({"task_id": number}).inserted_id
                with anyio.fail_after(20):
                    while key not in watched.swept:
                        if await watched.heard.receive() == ("new", key):
                            break


def drop(db: Db) -> None:
    db.DL_TASK.drop()


def rename(db: Db) -> None:
    db.DL_TASK.rename("DL_TASK_OLD")


def drop_database(db: Db) -> None:
    db.client.drop_database(db.name)
    images(db)


@pytest.mark.parametrize("lose", [drop, rename, drop_database])
def test_a_collection_that_is_lost_while_a_task_runs(
    db: Db, serve: Serve, tmp_path: Path, lose: Callable[[Db], None]
) -> None:
    """The attempt learns that its task is gone, and ends its child; what is inserted then runs, on all indexes."""
    images(db)
    worker = serve(cpu_devices=2)
    db.DL_TASK.insert_one(train_request(1, iterations=100_000))
    running(db, 1)
    pid = json.loads((tmp_path / "children.jsonl").read_text().splitlines()[0])["pid"]
    lose(db)
    # The first number once more: as the first attempt again, it runs beside what still ends of the lost one.
    for task_id in (1, 2):
        db.DL_TASK.insert_one(train_request(task_id))
    for task_id in (1, 2):
        document = ended(db, task_id)
        assert (document["status"], document["attempt"], document["failures"]) == ("SUCCEEDED", 1, 0)
    wait_for(lambda: not alive(pid))
    assert any(line["event"].startswith("task lost") for line in events(worker))
    for name, indexes in INDEXES.items():
        # They are made one after the other, while tasks run already.
        wanted = {index.document["name"] for index in indexes}
        wait_for(lambda name=name, wanted=wanted: wanted <= set(db[name].index_information()))
    assert worker.process.poll() is None


async def test_a_collection_put_in_place_of_another_one_is_swept(store: Store, db: Db) -> None:
    """A copy is filled beside it, as a restore does, and renamed over it: no event tells of the documents in it."""
    async with watching(store) as watched:
        keys = db.RESTORED.insert_many([{"task_id": number} for number in range(3)]).inserted_ids
        db.RESTORED.rename("DL_TASK", dropTarget=True)
        await watched.hears_after("sweep")
        assert sorted(watched.swept) == sorted(keys)
