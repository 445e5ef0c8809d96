"""What KEDA counts is what the Jobs that it starts can claim, and nothing else; and nobody else is needed for it."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bson import json_util
from bson.objectid import ObjectId
from pymongo.database import Database

from handlers.store import Store
from tests.helpers import Service, train_request, wait_for
from tests.manifests import only, rendered, settings_of, workers

Db = Database[dict[str, Any]]

JOBS = ["dltask-cpu", "dltask-gpu-1", "dltask-gpu-4", "dltask-gpu-8"]


def trigger(name: str) -> dict[str, str]:
    """The metadata of the one trigger."""
    (one,) = only(rendered("overlays/keda"), "ScaledJob", name)["spec"]["triggers"]
    assert one["type"] == "mongodb"
    metadata: dict[str, str] = one["metadata"]
    return metadata


def counted(db: Db, name: str) -> int:
    """What KEDA's scaler reads: the number of documents for a query in canonical Extended JSON."""
    query = json.loads(trigger(name)["query"], object_hook=json_util.object_hook)
    return db[trigger(name)["collection"]].count_documents(query)


async def waiting(store: Store, db: Db, task_id: int, kind: str, number: Any, **changes: Any) -> None:
    request = train_request(task_id)
    params = {**request["param_request"], "device_type": kind, "device_num": number}
    key = db.DL_TASK.insert_one(request).inserted_id
    await store.tasks.admit(
        key, {"task_id": task_id, "task_type": "TRAIN", "param_request": params, "priority": 0, "max_attempts": 3}
    )
    if changes:
        db.DL_TASK.update_one({"_id": key}, {"$set": changes})


def children_of(pid: int) -> list[str]:
    """The processes whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            if stat.read_text().rpartition(")")[2].split()[1] == str(pid):
                found.append(stat.parent.name)
    return found


@pytest.fixture
async def queue(store: Store, db: Db) -> None:
    """Tasks of every class, and some that nobody can take now."""
    for task_id, number in enumerate((1, 2, 4, 5, 8)):
        await waiting(store, db, task_id, "GPU", number)
    for task_id, number in enumerate((1, 4), start=10):
        await waiting(store, db, task_id, "CPU", number)
    server_time = db.command("hello")["localTime"]
    # Waits for its next attempt; waited for it.
    await waiting(store, db, 20, "GPU", 1, not_before=server_time.replace(year=server_time.year + 1))
    await waiting(store, db, 21, "GPU", 1, not_before=server_time.replace(year=server_time.year - 1))
    await waiting(store, db, 22, "GPU", 1, status="RUNNING", owner="somebody")
    await waiting(store, db, 23, "GPU", 16)  # no class is so large
    db.DL_TASK.insert_one(train_request(24))  # nobody has looked at it yet


@pytest.mark.usefixtures("queue")
async def test_each_job_can_claim_what_is_counted_for_it(store: Store, db: Db) -> None:
    """One by one, with the devices and settings of its pod; then the count is 0, and KEDA starts no more."""
    objects = rendered("overlays/keda")
    pods = {one["metadata"]["name"]: template for one, template in workers(objects)}
    assert {name: counted(db, name) for name in JOBS} == dict(zip(JOBS, (2, 2, 2, 2), strict=True))
    for name in JOBS:
        template = pods[name]
        settings = settings_of(objects, template)
        gpus = int(template["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", "0"))
        free = {"CPU": int(settings["DLTASK_CPU_DEVICES"]), "GPU": gpus}
        least = int(settings.get("DLTASK_MIN_DEVICE_NUM", "1"))
        claimed = 0
        while counted(db, name):
            assert await store.tasks.claim(name, free, least=least) is not None, name
            claimed += 1
        assert claimed == 2
        assert await store.tasks.claim(name, free, least=least) is None
    waiting = {task["task_id"] for task in db.DL_TASK.find({"status": "PENDING"})}
    assert waiting == {20, 23}


def test_it_counts_in_the_workers_database() -> None:
    """KEDA is given the names a second time; they must be the same."""
    objects = rendered("overlays/keda")
    for one, template in workers(objects):
        if one["kind"] == "ScaledJob":
            metadata = trigger(one["metadata"]["name"])
            assert metadata["dbName"] == settings_of(objects, template)["DLTASK_DATABASE"]
            assert metadata["collection"] == "DL_TASK"
            assert template["spec"]["containers"][0]["args"] == ["serve", "--once"]
            assert template["spec"]["restartPolicy"] == "Never"


def test_the_workers_that_stay_answer_documents_and_claim_none(
    db: Db, serve: Callable[..., Service], image_ids: list[ObjectId]
) -> None:
    """With the settings of the overlay's Deployment; else a task would never be counted, and no Job started for it."""
    objects = rendered("overlays/keda")
    (template,) = (its for one, its in workers(objects) if one["kind"] == "Deployment")
    settings = {name: value for name, value in settings_of(objects, template).items() if name.endswith("_DEVICES")}
    assert settings == {"DLTASK_CPU_DEVICES": "0", "DLTASK_GPU_DEVICES": "0"}
    service = serve(cpu_devices=0, gpu_devices=0)
    db.DL_TASK.insert_one(train_request(1))
    wait_for(lambda: db.DL_TASK.find_one({"task_id": 1, "status": "PENDING"}))
    assert counted(db, "dltask-cpu") == 1
    # It has looked at the queue since: the renewal comes after the admission in the next sweep.
    seen = db.DL_WORKER.find_one({})
    wait_for(lambda: db.DL_WORKER.find_one({})["renewed_at"] > seen["renewed_at"])  # type: ignore[index]
    # No child is kept waiting, with torch in memory, for what never comes.
    assert children_of(service.process.pid) == []
    assert service.stop() == 0
    assert db.DL_TASK.find_one({"task_id": 1, "status": "PENDING", "attempt": 0}) is not None
