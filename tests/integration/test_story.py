"""`dltask logs`: what became of one task, across workers and attempts, as a person reads it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from bson import Decimal128, ObjectId
from pymongo.database import Database

from tests.helpers import Service, ended, running, train_request, wait_for

Db = Database[dict[str, Any]]
Serve = Callable[..., Service]
Logs = Callable[..., list[str]]


@pytest.fixture
def logs(dltask_env: dict[str, str]) -> Logs:
    """Runs `dltask logs`; returns the lines it printed."""

    def run(*arguments: Any) -> list[str]:
        command = [sys.executable, "-m", "service.cli", "logs", *map(str, arguments)]
        done = subprocess.run(command, env=dltask_env, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.splitlines()

    return run


def in_order(lines: list[str], *expected: str) -> None:
    """Fails unless lines that contain these texts follow each other in this order."""
    rest = iter(lines)
    for text in expected:
        assert any(text in line for line in rest), f"{text!r} is not there in this order in\n" + "\n".join(lines)


def test_a_killed_worker_and_the_one_that_goes_on(db: Db, serve: Serve, image_ids: list[ObjectId], logs: Logs) -> None:
    """Admission, claim by worker and devices, data, child, snapshot, loss, retry and end; of both workers."""
    first = serve(lease_seconds=3)
    db.DL_TASK.insert_one(train_request(1, iterations=400))
    # Its lines are stored with a renewal of the lease: one later than the snapshot's.
    wait_for(lambda: "snapshot stored" in str(db.DL_TASK_LOG.find_one({"_id": 1})))
    owner = running(db, 1)["owner"]
    first.kill()
    serve(lease_seconds=3)
    ended(db, 1, seconds=90)
    told = wait_for(lambda: (lines := logs(1)) and "task succeeded" in str(lines) and lines)
    in_order(
        told,
        "PENDING   accepted",
        f"RUNNING   attempt 1 on {owner}",
        "task claimed task_type=TRAIN devices=['cpu']",
        "data ready",
        "child started",
        "snapshot stored iteration=50",
        f"task taken back attempt=1 lost_owner={owner} status=PENDING failures=1",
        "PENDING   attempt 1: lost_worker: worker",
        "RUNNING   attempt 2 on ",
        "task claimed",
        "child started",
        "task succeeded",
        "SUCCEEDED attempt 2",
    )
    entries = json.loads(logs(1, "--json")[0])
    claims = [entry for entry in entries if entry["event"] == "task state" and entry["status"] == "RUNNING"]
    assert [claim["attempt"] for claim in claims] == [1, 2]
    assert claims[0]["owner"] == owner != claims[1]["owner"]
    assert all(entry["owner"] for entry in entries if entry["event"] != "task state")


def test_faults_and_why_it_was_tried_again(db: Db, serve: Serve, image_ids: list[ObjectId], logs: Logs) -> None:
    """Each fault with its kind, and the end with that of the last."""
    serve()
    db.DL_TASK.insert_one(train_request(2, model_name="crash", max_attempts=2))
    ended(db, 2)
    told = wait_for(lambda: (lines := logs(2)) and "task failed" in str(lines) and lines)
    in_order(
        told,
        "RUNNING   attempt 1",
        "task requeued kind=child_died",
        "PENDING   attempt 1: child_died: the child ended with signal 11",
        "RUNNING   attempt 2",
        "task failed kind=child_died",
        "FAILED    attempt 2: child_died",
    )


def test_a_rejected_task(db: Db, serve: Serve, image_ids: list[ObjectId], logs: Logs) -> None:
    """It never ran; its story is the one line that says why."""
    serve()
    top = Decimal128(str(2**64 - 1))
    request = train_request(top)
    request["param_request"]["batch_size"] = 0
    db.DL_TASK.insert_one(request)
    ended(db, top)
    [line] = logs(2**64 - 1, "--follow")
    assert "REJECTED  PARAM_INVALID: param_request.batch_size is 0" in line


def test_a_task_that_waits(db: Db, serve: Serve, image_ids: list[ObjectId], logs: Logs) -> None:
    """Why it does is the last line: before its admission, and after."""
    request = train_request(4)
    request["param_request"] |= {"device_type": "GPU", "device_num": 2}
    db.DL_TASK.insert_one(request)
    [line] = logs(4)
    assert "waits     no worker is alive to admit it" in line
    serve(gpu_devices=0)
    wait_for(lambda: db.DL_TASK.find_one({"task_id": 4, "status": "PENDING"}))
    accepted, waits = logs(4)
    assert accepted.endswith("PENDING   accepted")
    assert waits.endswith("waits     needs 2 GPU; no live worker has them")


@contextmanager
def following(env: dict[str, str], *arguments: str) -> Iterator[tuple["subprocess.Popen[bytes]", Callable[[], str]]]:
    """A `dltask logs --follow` that runs, and what it has printed so far."""
    command = [sys.executable, "-m", "service.cli", "logs", *arguments]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        said = [b""]

        def so_far() -> str:
            assert process.stdout is not None
            said.append(process.stdout.read() or b"")
            return b"".join(said).decode()

        try:
            yield process, so_far
        finally:
            process.kill()


def test_following_a_task(db: Db, serve: Serve, image_ids: list[ObjectId], dltask_env: dict[str, str]) -> None:
    """From before its admission to its end: lines come while it runs, once each, and then it ends by itself."""
    db.DL_TASK.insert_one(train_request(5, iterations=300))
    with following(dltask_env, "5", "-f") as (process, so_far):
        wait_for(lambda: "no worker is alive to admit it" in so_far())
        serve()
        wait_for(lambda: "child started" in so_far())
        document = db.DL_TASK.find_one({"task_id": 5})
        assert document is not None
        assert document["status"] == "RUNNING"
        assert process.wait(60) == 0
        lines = so_far().splitlines()
    in_order(lines, "waits", "PENDING   accepted", "RUNNING   attempt 1 on", "child started", "SUCCEEDED attempt 1")
    assert len([line for line in lines if "child started" in line]) == 1
    assert any("task succeeded" in line for line in lines)


def test_long_lines_are_stored_as_json(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """A child that says much on one line: what is kept of it can still be read by a program."""
    serve()
    db.DL_TASK.insert_one(train_request(6, model_name="garbage"))
    ended(db, 6)
    lines = wait_for(lambda: (log := db.DL_TASK_LOG.find_one({"_id": 6})) and "task succeeded" in str(log) and log)
    events = [json.loads(line) for line in lines["lines"]]
    assert any(event["event"] == "child line ignored" for event in events)
    assert all(event["task_id"] == "6" for event in events)
