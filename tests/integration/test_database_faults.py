"""What the database does to an attempt is not held against its task, and a refusal is no outage."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from bson import ObjectId
from pymongo.database import Database

from tests.failpoints import away, on_command
from tests.helpers import Service, ended, running, train_request, wait_for

Db = Database[dict[str, Any]]
Serve = Callable[..., Service]


@pytest.fixture(scope="module")
def mongo_uri(start_mongod: Callable[..., str]) -> str:
    """A server that fails on command, instead of the one that all tests share."""
    return start_mongod("--setParameter", "enableTestCommands=1")


@contextmanager
def failing(db: Db, collection: str, **how: Any) -> Iterator[None]:
    """Each insert of a service into the collection fails in this way."""
    with on_command(db, "insert", namespace=f"{db.name}.{collection}", **how):
        yield


def test_faults_of_the_database_are_not_counted(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """A task whose data cannot be prepared for the database's sake stays with its worker, and runs when it can."""
    service = serve()
    with failing(db, "messages.files", errorCode=11601, errorLabels=[]):  # Interrupted
        db.DL_TASK.insert_one(train_request(1, max_attempts=1))
        wait_for(lambda: service.log.read_text().count("database away") >= 3)
        held = db.DL_TASK.find_one({})
        assert held is not None
        assert (held["status"], held["attempt"]) == ("RUNNING", 1)
    document = ended(db, 1)
    assert (document["status"], document["attempt"], document["failures"]) == ("SUCCEEDED", 1, 0)


def test_a_cancel_does_not_wait_for_the_data(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """Nor for a database that keeps the data from being prepared, as long as it takes the end of the task."""
    service = serve()
    with failing(db, "messages.files", errorCode=11601, errorLabels=[]):
        db.DL_TASK.insert_one(train_request(1))
        wait_for(lambda: "database away" in service.log.read_text())
        db.DL_TASK.update_one({}, {"$set": {"cancel_requested": True}})
        assert ended(db, 1)["status"] == "CANCELLED"


def test_a_drain_does_not_wait_for_the_database(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """A worker that is stopped while the database is away ends in good time, and leaves its task to the lease."""
    service = serve(grace_seconds=2)
    db.DL_TASK.insert_one(train_request(1, iterations=10_000))
    running(db, 1)
    with away(db):
        wait_for(lambda: "sweep failed" in service.log.read_text(), 60)
        service.process.send_signal(signal.SIGTERM)
        # What is under way may take its time-out of 20 s, and one thing comes after another.
        assert service.process.wait(200) == 0
        assert "task not released" in service.log.read_text()
    held = db.DL_TASK.find_one({})
    assert held is not None
    assert (held["status"], held["attempt"]) == ("RUNNING", 1)


def test_an_end_that_the_server_refuses_ends_the_task(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """A validator on DL_MODEL, a missing permission: the task is FAILED and says so, and the next one runs."""
    serve()
    db.command("collMod", "DL_MODEL", validator={"reviewed": True})
    db.DL_TASK.insert_one(train_request(1))
    document = ended(db, 1, seconds=60)
    assert (document["status"], document["error"]["kind"]) == ("FAILED", "database")
    assert "validation" in document["error"]["message"]
    assert db.DL_MODEL.count_documents({}) == 0
    # Uploaded once, however often the end was tried; the janitor removes it.
    assert db["models.files"].count_documents({"filename": {"$regex": "onnx"}}) == 1
    db.command("collMod", "DL_MODEL", validator={})
    db.DL_TASK.insert_one(train_request(2))
    assert ended(db, 2)["status"] == "SUCCEEDED"


def test_a_child_that_talks_and_gets_no_further_is_hung(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """The watchdog asks for progress, not for words; how long a task may run in all it does not ask."""
    serve(child_silence_seconds=1.5)
    db.DL_TASK.insert_one(train_request(1, model_name="chatter", max_attempts=1))
    db.DL_TASK.insert_one(train_request(2, iterations=150))
    document = ended(db, 1)
    assert (document["status"], document["error"]["kind"]) == ("FAILED", "hung")
    assert ended(db, 2)["status"] == "SUCCEEDED"


def test_a_child_that_hangs_on_its_way_out_has_done_its_work(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """What it made is kept, and the next task has its devices."""
    serve(grace_seconds=1)
    for number in (1, 2):
        db.DL_TASK.insert_one(train_request(number, model_name="linger"))
    for number in (1, 2):
        assert ended(db, number, seconds=60)["status"] == "SUCCEEDED"


def test_a_lease_of_any_length_is_renewed_in_time(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """Without progress too: a short lease loses no task of a healthy owner to another worker."""
    for _ in range(2):
        serve(lease_seconds=3)
    db.DL_TASK.insert_one(train_request(1, model_name="silent"))
    first = wait_for(lambda: db.DL_TASK.find_one({"status": "RUNNING"}))
    renewed = {first["lease_renewed_at"]}
    # Several renewals and judgements of the other worker later.
    for _ in range(8):
        found = wait_for(lambda: db.DL_TASK.find_one({"lease_renewed_at": {"$nin": list(renewed)}}))
        assert (found["status"], found["attempt"], found["owner"]) == ("RUNNING", 1, first["owner"])
        renewed.add(found["lease_renewed_at"])
    db.DL_TASK.update_one({}, {"$set": {"cancel_requested": True}})
    assert ended(db, 1)["status"] == "CANCELLED"
