"""From release 0.1.0 to this version: its data is read and its work goes on, and both run side by side meanwhile."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bson import Decimal128, ObjectId
from gridfs import GridFSBucket
from pymongo.database import Database

from schemas.version import SCHEMA_VERSION
from tests.helpers import END_STATES, Service, ended, running, train_request, wait_for

Db = Database[dict[str, Any]]
Serve = Callable[..., Service]
Dltask = Callable[..., str]

TOP = Decimal128(str(2**64 - 1))


@pytest.fixture
def dltask(dltask_env: dict[str, str]) -> Dltask:
    """Runs this version's `dltask`; returns what it printed."""

    def run(*arguments: Any) -> str:
        command = [sys.executable, "-m", "service.cli", *map(str, arguments)]
        done = subprocess.run(command, env=dltask_env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def a_test(task_id: Any, model: str) -> dict[str, Any]:
    params = {"model_name": model, "device_type": "CPU"}
    return {
        "task_id": task_id,
        "task_type": "TEST",
        "dataset": "toy",
        "split": "train",
        "param_request": params,
    }


def jobs(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["job"] for line in (tmp_path / "children.jsonl").read_text().splitlines()]


def owners(document: dict[str, Any]) -> list[str]:
    """Who ran it, attempt by attempt."""
    return [change["owner"] for change in document["history"] if change["status"] == "RUNNING"]


def ran_on(owner: str, service: Service) -> bool:
    return f"-{service.process.pid}-" in owner


def test_what_the_first_release_left(
    db: Db, serve_first: Serve, serve: Serve, image_ids: list[ObjectId], dltask: Dltask, tmp_path: Path
) -> None:
    """Tasks of every state: ended ones stay as they are, waiting, new and half done ones are run to their end; models,
    messages and snapshots are read."""
    first = serve_first(gpu_devices=0)
    db.DL_TASK.insert_one(train_request(1))
    db.DL_TASK.insert_one(train_request(TOP, model_name="pictures"))
    db.DL_TASK.insert_one(train_request(3, model_name="data"))
    db.DL_TASK.insert_one({**train_request(4), "task_type": "PRUNE"})
    db.DL_TASK.insert_one(train_request(5, iterations=10_000))
    for number, status in ((1, "SUCCEEDED"), (TOP, "SUCCEEDED"), (3, "FAILED"), (4, "REJECTED")):
        assert ended(db, number)["status"] == status
    db.DL_TASK.insert_one(a_test(6, "ok"))
    running(db, 5)
    db.DL_TASK.update_one({"task_id": 5}, {"$set": {"cancel_requested": True}})
    assert ended(db, 5)["status"] == "CANCELLED"
    assert ended(db, 6)["status"] == "SUCCEEDED"
    db.DL_TASK.insert_one(train_request(7, iterations=300))
    running(db, 7)
    waiting = train_request(8)
    waiting["param_request"]["device_type"] = "GPU"
    db.DL_TASK.insert_one(waiting)
    wait_for(lambda: db.DL_TASK.find_one({"task_id": 8, "status": "PENDING"}))
    assert first.stop() == 0
    half = db.DL_TASK.find_one({"task_id": 7})
    assert half is not None
    assert (half["status"], half["snapshot"]["iteration"] > 0) == ("PENDING", True)
    db.DL_TASK.insert_one(train_request(9))
    done = list(db.DL_TASK.find({"status": {"$in": END_STATES}}).sort("_id"))
    models = list(db.DL_MODEL.find().sort("_id"))
    assert len(done) == 6
    assert not any("schema_version" in document for document in (*done, half, *models))

    service = serve(gpu_devices=0, gpu_fallback="cpu")
    for number in (7, 8, 9):
        assert ended(db, number)["status"] == "SUCCEEDED"
    resumed = ended(db, 7)
    assert (resumed["attempt"], resumed["failures"]) == (2, 0)
    assert resumed["result"]["resumed_from_iteration"] == half["snapshot"]["iteration"]
    assert ended(db, 9)["schema_version"] == SCHEMA_VERSION
    # A message that the first release built, and a model that it registered.
    message = done[0]["json_mongodb_id"]
    db.DL_TASK.insert_one(train_request(10, json_mongodb_id=message))
    assert ended(db, 10)["result"]["version"] == 5  # of `ok`, after 1, 7, 8 and 9
    db.DL_TASK.insert_one(a_test(11, "ok:1"))
    assert ended(db, 11)["status"] == "SUCCEEDED"
    assert db.DL_TEST_RESULT.count_documents({"task_id": 11}) == 3
    # A copy of one of its documents is a new task.
    copy = {name: value for name, value in done[0].items() if name != "_id"}
    db.DL_TASK.insert_one({**copy, "task_id": 12})
    wait_for(lambda: db.DL_TASK.find_one({"task_id": 12, "status": "SUCCEEDED", "schema_version": SCHEMA_VERSION}))
    assert service.stop() == 0
    assert list(db.DL_TASK.find({"_id": {"$in": [document["_id"] for document in done]}}).sort("_id")) == done
    assert list(db.DL_MODEL.find({"_id": {"$in": [model["_id"] for model in models]}}).sort("_id")) == models
    assert "Traceback" not in service.log.read_text()

    assert {task["task_id"] for task in json.loads(dltask("status", "--json"))} == {1, *range(3, 13), 2**64 - 1}
    assert "task running" in dltask("logs", 1)  # what the first release called it
    assert "task taken back" not in dltask("logs", 7)
    assert "note" not in dltask("logs", 4)
    dltask("models", "export", "ok:1", tmp_path / "model")
    assert (tmp_path / "model" / "model.onnx").read_bytes() == b"no real model"
    assert dltask("report", 2**64 - 1, tmp_path / "pictures").endswith("curve.png\n")


def test_workers_of_both_versions_beside_each_other(
    db: Db, serve_first: Serve, serve: Serve, image_ids: list[ObjectId], tmp_path: Path
) -> None:
    """Each takes a task; what one gives back, or loses, the other goes on with from its snapshot."""
    old, new = serve_first(lease_seconds=3), serve(lease_seconds=3)
    for number in (1, 2):
        db.DL_TASK.insert_one(train_request(number, iterations=800))
    documents = [running(db, number) for number in (1, 2)]
    by_old = next(document for document in documents if ran_on(document["owner"], old))
    by_new = next(document for document in documents if ran_on(document["owner"], new))
    for document in documents:
        number = document["task_id"]
        wait_for(lambda number=number: db.DL_TASK.find_one({"task_id": number, "snapshot.iteration": {"$gte": 50}}))

    # The new one is taken back for its version, with its task: the old one goes on.
    db.DL_TASK.update_one({"_id": by_old["_id"]}, {"$set": {"cancel_requested": True}})
    assert new.stop() == 0
    given_back = db.DL_TASK.find_one({"_id": by_new["_id"]})
    assert given_back is not None
    taken = wait_for(lambda: db.DL_TASK.find_one({"_id": by_new["_id"], "status": "RUNNING", "attempt": 2}))
    assert ran_on(taken["owner"], old)
    wait_for(lambda: jobs(tmp_path)[-1]["attempt"] == 2)
    assert jobs(tmp_path)[-1]["resume_from"]
    wait_for(
        lambda: db.DL_TASK.find_one(
            {"_id": by_new["_id"], "progress.iteration": {"$gt": given_back["snapshot"]["iteration"] + 5}}
        )
    )
    # Then the old one is lost, and a new one takes its task over.
    old.kill()
    newest = serve(lease_seconds=3)
    document = ended(db, by_new["task_id"], seconds=90)
    assert (document["status"], document["attempt"], document["failures"]) == ("SUCCEEDED", 3, 1)
    assert ran_on(owners(document)[-1], newest)
    assert document["result"]["resumed_from_iteration"] >= given_back["snapshot"]["iteration"]
    assert db.DL_MODEL.count_documents({"task_id": document["task_id"]}) == 1


def test_a_rolling_upgrade_with_tasks_running(
    db: Db, serve_first: Serve, serve: Serve, image_ids: list[ObjectId]
) -> None:
    """One worker after the other is replaced while tasks come and run: each ends once, and none counts a fault."""
    fleet = [serve_first() for _ in range(2)]
    numbers = iter(range(1, 1000))
    inserted: list[int] = []

    def insert(count: int) -> None:
        for number in [next(numbers) for _ in range(count)]:
            db.DL_TASK.insert_one(train_request(number, model_name=f"ok.{number % 3}", iterations=60))
            inserted.append(number)

    insert(4)
    wait_for(lambda: db.DL_TASK.find_one({"task_id": 1, "attempt": 1}))
    for place in range(2):
        new = serve()
        insert(3)
        assert fleet[place].stop() == 0
        fleet.append(new)
        insert(2)
    # One that came back, as a roll-out that is undone would have it.
    back = serve_first()
    insert(3)
    documents = [ended(db, number, seconds=60) for number in inserted]
    assert {document["status"] for document in documents} == {"SUCCEEDED"}
    assert {document["failures"] for document in documents} == {0}
    ends = [change for document in documents for change in document["history"] if change["status"] == "SUCCEEDED"]
    assert len(ends) == len(inserted)
    versions = {name: db.DL_MODEL.distinct("version", {"model_name": name}) for name in ("ok.0", "ok.1", "ok.2")}
    assert sum(map(len, versions.values())) == len(inserted) == db.DL_MODEL.count_documents({})
    assert all(found == list(range(1, len(found) + 1)) for found in versions.values())
    ran = [owner for document in documents for owner in owners(document)]
    assert any(ran_on(owner, worker) for owner in ran for worker in fleet[:2])
    assert any(ran_on(owner, worker) for owner in ran for worker in fleet[2:])
    for worker in (*fleet[2:], back):
        assert worker.stop() == 0
    for worker in (*fleet, back):
        log = worker.log.read_text()
        assert "Traceback" not in log
        assert '"level": "error"' not in log


def test_indexes_are_the_same_for_both(db: Db, serve_first: Serve, serve: Serve, image_ids: list[ObjectId]) -> None:
    """Neither makes one that the other refuses, whichever comes first."""
    for starts in ((serve_first, serve), (serve, serve_first)):
        for start in starts:
            service = start()
            assert service.process.poll() is None, service.log.read_text()
            assert "index missing" not in service.log.read_text()
            service.stop()
        db.client.drop_database(db.name)


def test_the_first_release_begins_no_training_with_another_s_weights(
    db: Db, serve_first: Serve, serve: Serve, image_ids: list[ObjectId]
) -> None:
    """It knows no `name:version` in a training. What it admits it rejects; what this version has admitted ends FAILED
    there: never does it train from ImageNet weights instead."""
    new = serve()
    db.DL_TASK.insert_one(train_request(1))
    assert ended(db, 1)["status"] == "SUCCEEDED"
    db.DL_TASK.insert_one(train_request(2, iterations=10_000))  # keeps the only device
    running(db, 2)
    db.DL_TASK.insert_one(train_request(3, model_name="ok:1"))
    wait_for(lambda: db.DL_TASK.find_one({"task_id": 3, "status": "PENDING"}))
    new.kill()
    db.DL_TASK.update_one({"task_id": 2}, {"$set": {"cancel_requested": True}})
    serve_first(gpu_devices=0)
    db.DL_TASK.insert_one(train_request(4, model_name="ok:1"))
    refused = ended(db, 4)
    assert (refused["status"], refused["error_code"]) == ("REJECTED", 7)
    failed = ended(db, 3)
    assert (failed["status"], failed["error"]["kind"]) == ("FAILED", "document")
    assert db.DL_MODEL.count_documents({}) == 1


def test_the_first_release_s_janitor_keeps_weights(
    db: Db, serve: Serve, first_release: Path, dltask_env: dict[str, str], image_ids: list[ObjectId]
) -> None:
    """Although it does not know that a model names them."""
    serve()
    db.DL_TASK.insert_one(train_request(1))
    assert ended(db, 1)["status"] == "SUCCEEDED"
    code = (
        "import os, anyio\n"
        "from handlers.store import connect_store\n"
        "from service.janitor import remove_orphans\n"
        "async def clean():\n"
        "    async with connect_store(os.environ['DLTASK_MONGODB_URI'], os.environ['DLTASK_DATABASE']) as store:\n"
        "        for _ in range(2):\n"
        "            await remove_orphans(store, older_than=0)\n"
        "anyio.run(clean)"
    )
    GridFSBucket(db, "models").upload_from_stream("left", b"x", metadata={"task_id": 1})
    subprocess.run([sys.executable, "-c", code], cwd=first_release, env=dltask_env, check=True)
    model = db.DL_MODEL.find_one({})
    assert model is not None
    assert set(db["models.files"].distinct("_id")) - {model["file_id"]} == {model["weights_file_id"]}
