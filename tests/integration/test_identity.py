"""Two workers of the same host name and process number, as in two containers, on one cache volume."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from pymongo.database import Database

from tests.helpers import STANDIN, Service, running, train_request, wait_for

Db = Database[dict[str, Any]]

#: The first process of each container has the number 1.
_FIRST_PROCESS = "import os; os.getpid = lambda: 1; from service.cli.main import main; main()"


@pytest.fixture
def twins(dltask_env: dict[str, str], tmp_path: Path) -> Iterator[list[Service]]:
    """Two running services that differ in nothing."""
    env = dltask_env | {
        "DLTASK_CHILD_COMMAND": STANDIN,
        "STANDIN_LOG": str(tmp_path / "children.jsonl"),
        "DLTASK_LOG_FORMAT": "json",
        "DLTASK_SWEEP_SECONDS": "1",
        "DLTASK_CPU_DEVICES": "2",
    }
    services = []
    try:
        for number in range(2):
            log = tmp_path / f"twin-{number}.log"
            with log.open("wb") as out:
                process = subprocess.Popen([sys.executable, "-c", _FIRST_PROCESS, "serve"], env=env, stderr=out)
            services.append(Service(process, log))
        for twin in services:
            wait_for(lambda log=twin.log: "service ready" in log.read_text())
        yield services
    finally:
        for twin in services:
            if twin.process.poll() is None:
                twin.stop()


def test_two_workers_of_one_name_are_two(
    db: Db, twins: list[Service], image_ids: list[ObjectId], tmp_path: Path
) -> None:
    """Each has an owner and a run folder of its own; the end of one takes nothing from the other."""
    workers = list(db.DL_WORKER.find())
    assert len({(worker["host"], worker["pid"]) for worker in workers}) == 1
    assert len({worker["_id"] for worker in workers}) == 2
    db.DL_TASK.insert_many([train_request(number, iterations=1_000) for number in range(4)])
    owners = {number: running(db, number)["owner"] for number in range(4)}
    assert sorted(owners.values()) == sorted([worker["_id"] for worker in workers] * 2)
    runs = tmp_path / "cache" / "runs"

    def folders() -> dict[str, int]:
        return {folder.name: len(list(folder.iterdir())) for folder in runs.iterdir() if folder.is_dir()}

    assert folders() == {worker["_id"]: 2 for worker in workers}
    told = json.loads(twins[0].log.read_text().splitlines()[0])["owner"]
    (other,) = {worker["_id"] for worker in workers} - {told}
    assert twins[0].stop() == 0
    assert folders() == {other: 2}
    for number, owner in owners.items():
        found = db.DL_TASK.find_one({"task_id": number}) or {}
        assert (found["status"], found["attempt"]) == (("RUNNING", 1) if owner == other else ("PENDING", 1))
