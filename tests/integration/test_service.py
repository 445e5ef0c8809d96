"""The life cycle of a task in a real service on a real server, with a stand-in child."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bson import Decimal128, Int64, ObjectId
from pymongo.database import Database

from tests.helpers import Service, alive, ended, running, train_request, wait_for

Db = Database[dict[str, Any]]
Serve = Callable[..., Service]


def children(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "children.jsonl").read_text().splitlines()]


def test_a_training_and_a_test_end_with_their_results(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """An inserted training ends SUCCEEDED with a model; a test of that model leaves a row for each image."""
    serve()
    db.DL_TASK.insert_one(train_request(1))
    train = ended(db, 1)
    assert train["status"] == "SUCCEEDED", train
    assert train["end_time"] >= train["start_time"] >= train["create_time"]
    assert (train["result"]["model_name"], train["result"]["version"], train["result"]["iterations"]) == ("ok", 1, 3)
    assert [change["status"] for change in train["history"]] == ["PENDING", "RUNNING", "SUCCEEDED"]
    model = db.DL_MODEL.find_one({"model_name": "ok"})
    assert model is not None
    assert (model["version"], model["task_id"], model["attempt"]) == (1, 1, 1)

    db.DL_TASK.insert_one(
        {
            "task_id": 2,
            "task_type": "TEST",
            "img_mongodb_ids": [str(i) for i in image_ids],
            "param_request": {"model_name": "ok:1", "device_type": "CPU"},
        }
    )
    test = ended(db, 2)
    assert test["status"] == "SUCCEEDED", test
    rows = list(db.DL_TEST_RESULT.find({"task_id": 2}))
    assert {row["img_id"] for row in rows} == set(image_ids)
    assert all(row["attempt"] == test["attempt"] for row in rows)
    assert {"images_per_second", "detections"} <= set(test["result"])
    assert "iterations" not in test["result"]


def test_task_ids_of_the_whole_range(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """0, 2^63-1 and 2^64-1 run and are found by value; a double is stored as the number that it names."""
    serve()
    top = Decimal128(str(2**64 - 1))
    for task_id in (0, Int64(2**63 - 1), top, 5.0):
        db.DL_TASK.insert_one(train_request(task_id))
    for task_id in (0, 2**63 - 1, top, 5):
        assert ended(db, task_id)["status"] == "SUCCEEDED"
    five = db.DL_TASK.find_one({"task_id": 5})
    assert five is not None
    assert type(five["task_id"]) is Int64 or isinstance(five["task_id"], int)


def test_a_document_inserted_while_nobody_serves_is_run_later(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """What no change event told is found by the sweep."""
    db.DL_TASK.insert_one(train_request(1))
    serve()
    assert ended(db, 1)["status"] == "SUCCEEDED"


def test_a_copy_of_a_finished_task_is_a_new_task(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """A finished document, inserted again under a new number while nobody serves, runs as if it were new."""
    service = serve()
    db.DL_TASK.insert_one(train_request(1))
    copy = ended(db, 1)
    service.stop()
    copy.pop("_id")
    db.DL_TASK.insert_one({**copy, "task_id": 2})
    serve()
    wait_for(lambda: db.DL_MODEL.count_documents({}) == 2)
    again = ended(db, 2)
    assert again["status"] == "SUCCEEDED"
    assert again["attempt"] == 1
    assert again["result"]["version"] == 2
    assert again["create_time"] > copy["end_time"]


def test_cancel_while_running_and_while_waiting(
    db: Db, serve: Serve, image_ids: list[ObjectId], tmp_path: Path
) -> None:
    """`cancel_requested` ends a running and a waiting task CANCELLED, and no child is left."""
    serve()
    db.DL_TASK.insert_one(train_request(1, iterations=10_000))
    running(db, 1)
    db.DL_TASK.insert_one(train_request(2))
    wait_for(lambda: db.DL_TASK.find_one({"task_id": 2, "status": "PENDING"}))
    for task_id in (2, 1):
        db.DL_TASK.update_one({"task_id": task_id}, {"$set": {"cancel_requested": True}})
        document = ended(db, task_id)
        assert document["status"] == "CANCELLED"
        assert document["end_time"]
    assert not alive(children(tmp_path)[0]["pid"])
    assert len(children(tmp_path)) == 1
    assert db.DL_MODEL.count_documents({}) == 0


def test_a_child_that_does_not_stop_is_killed(db: Db, serve: Serve, image_ids: list[ObjectId], tmp_path: Path) -> None:
    """A cancel waits for the grace period and no longer."""
    serve(grace_seconds=1)
    db.DL_TASK.insert_one(train_request(1, model_name="deaf", iterations=10_000))
    running(db, 1)
    db.DL_TASK.update_one({"task_id": 1}, {"$set": {"cancel_requested": True}})
    assert ended(db, 1)["status"] == "CANCELLED"
    assert not alive(children(tmp_path)[0]["pid"])


def test_sigterm_gives_the_task_back_and_it_resumes(
    db: Db, serve: Serve, image_ids: list[ObjectId], tmp_path: Path
) -> None:
    """A drained worker leaves a snapshot and no fault; the next one goes on from there."""
    first = serve()
    db.DL_TASK.insert_one(train_request(1, iterations=200))
    running(db, 1)
    assert first.stop() == 0
    waiting = db.DL_TASK.find_one({"task_id": 1})
    assert waiting is not None
    assert (waiting["status"], waiting["failures"], waiting["attempt"]) == ("PENDING", 0, 1)
    assert "owner" not in waiting
    assert db.DL_WORKER.count_documents({}) == 0
    stopped_at = waiting["snapshot"]["iteration"]
    serve()
    document = ended(db, 1)
    assert document["status"] == "SUCCEEDED"
    assert document["attempt"] == 2
    assert document["result"]["resumed_from_iteration"] == stopped_at
    assert db.DL_MODEL.count_documents({}) == 1


def test_without_any_grace_the_task_is_given_back_too(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """The child is killed at once; the release has its seconds all the same."""
    service = serve(grace_seconds=0)
    db.DL_TASK.insert_one(train_request(1, iterations=10_000))
    running(db, 1)
    assert service.stop() == 0
    waiting = db.DL_TASK.find_one({"task_id": 1})
    assert waiting is not None
    assert (waiting["status"], waiting["failures"]) == ("PENDING", 0)


def test_a_killed_worker_loses_its_task_to_the_next(
    db: Db, serve: Serve, image_ids: list[ObjectId], tmp_path: Path
) -> None:
    """SIGKILL of a worker: its child is gone at once, and another worker goes on from the snapshot."""
    first = serve(lease_seconds=3)
    db.DL_TASK.insert_one(train_request(1, iterations=400))
    wait_for(lambda: db.DL_TASK.find_one({"task_id": 1, "snapshot.iteration": {"$gte": 50}}))
    first.kill()
    serve(lease_seconds=3)
    document = ended(db, 1, seconds=90)
    assert document["status"] == "SUCCEEDED"
    assert (document["attempt"], document["failures"]) == (2, 1)
    assert document["result"]["resumed_from_iteration"] >= 50
    assert db.DL_MODEL.count_documents({}) == 1


def test_faults_of_the_child(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """Bad data ends FAILED at once; a crash is tried `max_attempts` times; memory once more with half the batch."""
    serve(cpu_devices=8)
    for task_id, behaviour in enumerate(("data", "loss", "bug", "crash", "nothing", "memory", "garbage")):
        db.DL_TASK.insert_one(train_request(task_id, model_name=behaviour, max_attempts=2))
    kinds = {}
    for task_id, behaviour in enumerate(("data", "loss", "bug")):
        document = ended(db, task_id)
        assert (document["status"], document["attempt"]) == ("FAILED", 1)
        assert document["end_time"]
        kinds[behaviour] = document["error"]["kind"]
    assert kinds == {"data": "data", "loss": "loss", "bug": "bug"}
    for task_id in (3, 4):
        document = ended(db, task_id)
        assert (document["status"], document["attempt"], document["failures"]) == ("FAILED", 2, 2)
        assert document["error"]["kind"] == "child_died"
    smaller = ended(db, 5)
    assert (smaller["status"], smaller["attempt"], smaller["batch_size_limit"]) == ("SUCCEEDED", 2, 5)
    assert ended(db, 6)["status"] == "SUCCEEDED"


def test_a_worker_whose_children_cannot_run_rests(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """A broken installation must not use up the attempts of one task after the other."""
    service = serve(child_command="/bin/ls /nowhere")
    db.DL_TASK.insert_many([train_request(1, priority=1), train_request(2)])
    wait_for(lambda: db.DL_WORKER.find_one({"resting": True}))
    document = db.DL_TASK.find_one({"task_id": 1})
    assert document is not None
    assert (document["status"], document["error"]["kind"]) == ("PENDING", "child_died")
    assert "/nowhere" in document["error"]["message"]
    assert db.DL_TASK.count_documents({"task_id": 2, "attempt": {"$gte": 1}}) == 0
    assert "worker resting" in service.log.read_text()


def test_a_silent_child_is_taken_for_hung(db: Db, serve: Serve, image_ids: list[ObjectId], tmp_path: Path) -> None:
    """The watchdog looks at silence, not at how long a task runs."""
    serve(child_silence_seconds=1)
    db.DL_TASK.insert_one(train_request(1, iterations=150))
    db.DL_TASK.insert_one(train_request(2, model_name="silent", max_attempts=1))
    assert ended(db, 1)["status"] == "SUCCEEDED"
    hung = ended(db, 2)
    assert (hung["status"], hung["error"]["kind"]) == ("FAILED", "hung")
    assert not any(alive(child["pid"]) for child in children(tmp_path))


def test_several_workers_run_no_task_twice(db: Db, serve: Serve, image_ids: list[ObjectId], tmp_path: Path) -> None:
    """Sixty tasks, three workers with two devices each: sixty children, one for each."""
    for _ in range(3):
        serve(cpu_devices=2)
    db.DL_TASK.insert_many([train_request(number, iterations=1) for number in range(60)])
    for number in range(60):
        document = ended(db, number, seconds=120)
        assert (document["status"], document["attempt"]) == ("SUCCEEDED", 1)
    assert sorted(int(child["job"]["task_id"]) for child in children(tmp_path)) == list(range(60))
    versions = sorted(model["version"] for model in db.DL_MODEL.find())
    assert versions == list(range(1, 61))


def test_admission_answers_while_every_device_is_busy(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """A bad document is rejected, and a good one admitted, while the only device works."""
    serve()
    db.DL_TASK.insert_one(train_request(1, iterations=10_000))
    running(db, 1)
    db.DL_TASK.insert_one(train_request(2, iterations=-1))
    db.DL_TASK.insert_one(train_request(3))
    rejected = ended(db, 2)
    assert (rejected["status"], rejected["error_code"]) == ("REJECTED", 7)
    assert rejected["error"]["field"] == "param_request.max_num_iters"
    assert "-1" in rejected["error"]["message"]
    assert rejected["end_time"]
    wait_for(lambda: db.DL_TASK.find_one({"task_id": 3, "status": "PENDING"}))
    still = db.DL_TASK.find_one({"task_id": 1})
    assert still is not None
    assert still["status"] == "RUNNING"


def test_a_gpu_task_waits_for_a_gpu_unless_the_worker_may_fall_back(
    db: Db, serve: Serve, image_ids: list[ObjectId]
) -> None:
    """Without a GPU a GPU task stays PENDING; with DLTASK_GPU_FALLBACK=cpu it runs, and its result says so."""
    first = serve(gpu_devices=0)
    request = train_request(1)
    request["param_request"]["device_type"] = "GPU"
    db.DL_TASK.insert_one(request)
    db.DL_TASK.insert_one(train_request(2))
    assert ended(db, 2)["status"] == "SUCCEEDED"
    waiting = db.DL_TASK.find_one({"task_id": 1})
    assert waiting is not None
    assert waiting["status"] == "PENDING"
    first.stop()
    serve(gpu_devices=0, gpu_fallback="cpu")
    assert ended(db, 1)["result"]["device"] == "cpu (fallback)"


def test_the_child_gets_no_credentials_and_its_output_is_logged(
    db: Db, serve: Serve, image_ids: list[ObjectId], tmp_path: Path, mongo_uri: str
) -> None:
    """No setting reaches the child; its stderr arrives in the service's log with the task's number."""
    service = serve()
    db.DL_TASK.insert_one(train_request(1))
    ended(db, 1)
    service.stop()
    child = children(tmp_path)[0]
    assert not any(name.startswith("DLTASK_") for name in child["env"])
    assert mongo_uri not in json.dumps(child)
    lines = [json.loads(line) for line in service.log.read_text().splitlines()]
    said = [line for line in lines if line["event"] == "child output" and line["line"] == "hello from the child"]
    assert [line["task_id"] for line in said] == ["1"]
    assert all(line["owner"] for line in lines)
    changes = [line["event"] for line in lines if line.get("task_id") == "1"]
    assert [event for event in changes if event.startswith("task ")] == [
        "task admitted",
        "task claimed",
        "task succeeded",
    ]
    log = db.DL_TASK_LOG.find_one({"_id": 1})
    assert log is not None
    assert any("task claimed" in line for line in log["lines"])


def test_a_missing_snapshot_means_starting_over(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """A snapshot that is gone or damaged is dropped, and the training begins again."""
    first = serve()
    db.DL_TASK.insert_one(train_request(1, iterations=150))
    running(db, 1)
    first.stop()
    db["models.chunks"].update_many({}, {"$set": {"data": b"damaged"}})
    serve()
    document = ended(db, 1)
    assert document["status"] == "SUCCEEDED"
    assert document["result"]["resumed_from_iteration"] is None


def test_a_second_signal_changes_nothing(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """An impatient operator cannot make a drain lose its snapshot."""
    service = serve()
    db.DL_TASK.insert_one(train_request(1, iterations=10_000))
    running(db, 1)
    service.process.send_signal(signal.SIGTERM)
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(30) == 0
    waiting = db.DL_TASK.find_one({"task_id": 1})
    assert waiting is not None
    assert waiting["status"] == "PENDING"
    assert waiting["snapshot"]["iteration"] > 0


def test_a_fault_of_the_machine_is_not_the_tasks(
    db: Db, serve: Serve, image_ids: list[ObjectId], dltask_env: dict[str, str]
) -> None:
    """Where the worker cannot write, the task goes back to the queue, until its attempts are used up."""
    cache = Path(dltask_env["DLTASK_CACHE_DIR"])
    cache.mkdir()
    (cache / "images").write_text("a file where a folder belongs")
    serve()
    db.DL_TASK.insert_one(train_request(1, max_attempts=2))
    document = ended(db, 1)
    assert (document["status"], document["attempt"], document["failures"]) == ("FAILED", 2, 2)
    assert document["error"]["kind"] == "machine"


def test_a_cancel_while_the_child_is_being_started_does_not_wait_for_the_watchdog(
    db: Db, serve: Serve, image_ids: list[ObjectId]
) -> None:
    """However early a cancel arrives, a child that ignores it is killed after the grace period."""
    serve(grace_seconds=1, cpu_devices=4)
    for task_id in range(4):
        db.DL_TASK.insert_one(train_request(task_id, model_name="deaf", iterations=10_000))
        wait_for(lambda n=task_id: db.DL_TASK.find_one({"task_id": n, "status": "RUNNING"}))
        db.DL_TASK.update_one({"task_id": task_id}, {"$set": {"cancel_requested": True}})
    for task_id in range(4):
        assert ended(db, task_id)["status"] == "CANCELLED"
