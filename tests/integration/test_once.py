"""`dltask serve --once`: one task at most, then the end; and no waiting where there is none."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from bson import ObjectId
from pymongo.database import Database
from pymongo.errors import AutoReconnect

from handlers.store import Store
from handlers.store.database import StoreError
from schemas.task import Task
from service.attempt import Ending
from service.devices import Devices
from service.dispatcher import Dispatcher
from service.metrics import Metrics
from tests.helpers import Service, ended, running, train_request, wait_for

Db = Database[dict[str, Any]]
Once = Callable[..., Service]


@pytest.fixture
def once(dltask_env: dict[str, str], serve: Callable[..., Service]) -> Once:
    """Starts a service for one task, with the same settings as `serve`."""
    return lambda **settings: serve("--once", **settings)


def events(service: Service) -> list[str]:
    return [json.loads(line)["event"] for line in service.log.read_text().splitlines()]


def test_one_task_and_no_more(db: Db, once: Once, image_ids: list[ObjectId], tmp_path: Path) -> None:
    """Of three tasks for a worker with three devices one is run; the others wait for others. The exit code is 0."""
    for task_id in range(3):
        db.DL_TASK.insert_one(train_request(task_id))
    service = once(cpu_devices=3)
    assert service.process.wait(30) == 0
    assert sorted(task["status"] for task in db.DL_TASK.find()) == ["PENDING", "PENDING", "SUCCEEDED"]
    assert {task["attempt"] for task in db.DL_TASK.find({"status": "PENDING"})} == {0}
    assert "once task taken" in events(service)
    # Not one more that is warmed up for a task that never comes.
    assert len((tmp_path / "children.jsonl").read_text().splitlines()) == 1
    assert events(service).count("child output") == 1
    assert db.DL_WORKER.count_documents({}) == 0


def test_none_to_take_is_no_failure(db: Db, once: Once, image_ids: list[ObjectId]) -> None:
    """A Job that was started for nothing, or for a task that another has taken, ends well after a short while."""
    db.DL_TASK.insert_one({**train_request(1), "param_request": {"model_name": "ok", "device_type": "GPU"}})
    service = once(gpu_devices=0)
    assert service.process.wait(30) == 0
    assert "once no task" in events(service)
    document = db.DL_TASK.find_one({"task_id": 1})
    assert document is not None
    assert (document["status"], document["attempt"]) == ("PENDING", 0)


@pytest.mark.parametrize(
    ("fault", "status"),
    [("bug", "FAILED"), ("crash", "PENDING")],
)
def test_the_end_of_the_attempt_is_the_end(
    db: Db, once: Once, image_ids: list[ObjectId], fault: str, status: str
) -> None:
    """However the attempt ends: the task's next attempt is another worker's, and the exit code is about the worker."""
    db.DL_TASK.insert_one(train_request(1, model_name=fault))
    assert once().process.wait(30) == 0
    document = db.DL_TASK.find_one({"task_id": 1})
    assert document is not None
    assert (document["status"], document["attempt"]) == (status, 1)


def test_sigterm_gives_the_task_back(db: Db, once: Once, image_ids: list[ObjectId]) -> None:
    """A Job whose node is drained leaves its task to the next one, with a snapshot."""
    service = once()
    db.DL_TASK.insert_one(train_request(1, iterations=10_000))
    running(db, 1)
    assert service.stop() == 0
    document = db.DL_TASK.find_one({"task_id": 1})
    assert document is not None
    assert document["status"] == "PENDING"
    assert document["snapshot"]["iteration"] > 0


def test_a_task_that_is_cancelled_ends_the_worker_too(db: Db, once: Once, image_ids: list[ObjectId]) -> None:
    """The stream is heard while the only task runs."""
    service = once()
    db.DL_TASK.insert_one(train_request(1, iterations=10_000))
    running(db, 1)
    db.DL_TASK.update_one({"task_id": 1}, {"$set": {"cancel_requested": True}})
    assert ended(db, 1)["status"] == "CANCELLED"
    assert service.process.wait(30) == 0


def test_tasks_too_small_for_the_worker_are_left_to_others(db: Db, once: Once, image_ids: list[ObjectId]) -> None:
    """A worker of four devices that is meant for three and more takes the one task that needs them, though it is last.

    Without that, the pod that was started for it would run a small task on one of its devices.
    """
    sizes = {1: 1, 2: 2, 3: 3}
    for task_id, number in sizes.items():
        request = train_request(task_id)
        request["param_request"]["device_num"] = number
        db.DL_TASK.insert_one(request)
    service = once(cpu_devices=4, min_device_num=3)
    assert service.process.wait(30) == 0
    assert {task["task_id"]: task["status"] for task in db.DL_TASK.find()} == {
        1: "PENDING",
        2: "PENDING",
        3: "SUCCEEDED",
    }


def test_workers_say_that_they_take_no_small_tasks(
    db: Db, serve: Callable[..., Service], image_ids: list[ObjectId], dltask_env: dict[str, str]
) -> None:
    """Else `dltask status` would call a task "first in the queue" that nobody will ever take."""
    serve(cpu_devices=4, min_device_num=3)
    db.DL_TASK.insert_one(train_request(1))
    wait_for(lambda: db.DL_TASK.find_one({"task_id": 1, "status": "PENDING"}) and db.DL_WORKER.find_one({}))
    said = subprocess.run(
        [sys.executable, "-m", "service.cli", "status", "1"], env=dltask_env, capture_output=True, text=True, check=True
    )
    assert "no live worker has them" in said.stdout


class FakeAttempt:
    """Gives its task back at once."""

    def __init__(self, store: Store, task: Task, devices: tuple[str, ...]) -> None:
        self.task, self.devices = task, devices
        self._store = store
        self.machine_failed = False
        self.endings: list[Ending] = []

    def end(self, ending: Ending) -> None:
        self.endings.append(ending)

    async def run(self) -> None:
        await self._store.tasks.release(self.task, "made up")


def dispatcher(store: Store, started: list[FakeAttempt], *, once_seconds: float) -> Dispatcher:
    def make(task: Task, devices: tuple[str, ...]) -> FakeAttempt:
        started.append(FakeAttempt(store, task, devices))
        return started[-1]

    return Dispatcher(
        store,
        Devices(cpus=2, gpus=0, fallback=False),
        owner="w",
        poll_seconds=0.02,
        make_attempt=make,  # type: ignore[arg-type]
        metrics=Metrics(),
        once=True,
        once_seconds=once_seconds,
    )


async def admitted(store: Store, db: Db, task_id: int) -> None:
    key = db.DL_TASK.insert_one(train_request(task_id)).inserted_id
    document = train_request(task_id)
    params = {**document["param_request"], "device_num": 1}
    await store.tasks.admit(
        key, {"task_id": task_id, "task_type": "TRAIN", "param_request": params, "priority": 0, "max_attempts": 3}
    )


async def test_a_claim_without_an_answer_counts(store: Store, db: Db, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was claimed although the answer got lost is the one task, even if the time to look for it was over."""
    await admitted(store, db, 1)
    await admitted(store, db, 2)
    claim = store.tasks.claim

    async def lost(*args: Any, **kwargs: Any) -> Any:
        await claim(*args, **kwargs)
        raise StoreError("no answer") from AutoReconnect("made up")

    monkeypatch.setattr(store.tasks, "claim", lost)
    started: list[FakeAttempt] = []
    with anyio.fail_after(10):
        await dispatcher(store, started, once_seconds=0.01).run()
    assert len(started) == 1
    assert started[0].endings == []


async def test_a_late_claim_is_given_back(store: Store, db: Db, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that the server carries out after another has been answered is one too many: back into the queue."""
    await admitted(store, db, 1)
    await admitted(store, db, 2)
    claim, calls = store.tasks.claim, []

    async def late(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise StoreError("no answer") from AutoReconnect("made up")
        document = await claim(*args, **kwargs)
        await claim(*args, **kwargs)  # the first one, only now
        return document

    monkeypatch.setattr(store.tasks, "claim", late)
    started: list[FakeAttempt] = []
    with anyio.fail_after(10):
        await dispatcher(store, started, once_seconds=10).run()
    assert [attempt.endings for attempt in started] == [[], [Ending.DRAINED]]
