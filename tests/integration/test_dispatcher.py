"""The dispatcher over the real queue: as many at once as there are devices, and none is starved."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from bson import Int64
from pymongo.database import Database

import service.dispatcher
from handlers.store import Store
from schemas.numbers import bson_uint64
from schemas.params import check_params, stored_params
from schemas.task import Task
from service.attempt import Ending
from service.devices import Devices
from service.dispatcher import Dispatcher
from service.metrics import Metrics

Db = Database[dict[str, Any]]


class FakeAttempt:
    """Holds its devices until it is let go."""

    def __init__(self, task: Task, devices: tuple[str, ...]) -> None:
        self.task, self.devices = task, devices
        self.machine_failed = False
        self.endings: list[Ending] = []
        self.over = anyio.Event()

    def end(self, ending: Ending) -> None:
        self.endings.append(ending)
        self.over.set()

    async def run(self) -> None:
        await self.over.wait()


class Bench:
    """A running dispatcher with fake attempts."""

    def __init__(self, store: Store, devices: Devices, patience_seconds: float) -> None:
        self.store = store
        self.started: list[FakeAttempt] = []
        self._news = anyio.Event()
        self.dispatcher = Dispatcher(
            store,
            devices,
            owner="w",
            poll_seconds=0.02,
            make_attempt=self._make,  # type: ignore[arg-type]
            metrics=Metrics(),
            patience_seconds=patience_seconds,
        )

    def _make(self, task: Task, devices: tuple[str, ...]) -> FakeAttempt:
        self.started.append(FakeAttempt(task, devices))
        self._news.set()
        return self.started[-1]

    async def until(self, number: int) -> list[int]:
        """The ids of the tasks that were started, once there are `number`."""
        with anyio.fail_after(10):
            while len(self.started) < number:
                self._news = anyio.Event()
                await self._news.wait()
        return [attempt.task.task_id for attempt in self.started]

    async def looked_again(self) -> None:
        """Wait until the dispatcher has looked at the queue three times more."""
        claim, enough, looks = self.store.tasks.claim, anyio.Event(), []

        async def counted(*args: Any, **kwargs: Any) -> Any:
            found = await claim(*args, **kwargs)
            looks.append(found)
            if len(looks) == 3:
                enough.set()
            return found

        with pytest.MonkeyPatch.context() as patch, anyio.fail_after(10):
            patch.setattr(self.store.tasks, "claim", counted)
            await enough.wait()


@asynccontextmanager
async def bench(store: Store, devices: Devices, patience_seconds: float = 60) -> AsyncIterator[Bench]:
    made = Bench(store, devices, patience_seconds)
    async with anyio.create_task_group() as group:
        group.start_soon(made.dispatcher.run)
        yield made
        made.dispatcher.drain()


async def pending(
    store: Store, db: Db, task_id: int, *, device: str = "CPU", number: int = 1, priority: int = 0
) -> None:
    key = db.DL_TASK.insert_one({"task_id": Int64(task_id)}).inserted_id
    params = check_params({"model_name": "m", "device_type": device, "device_num": number})
    await store.tasks.admit(
        key,
        {
            "task_id": bson_uint64(task_id),
            "task_type": "TRAIN",
            "param_request": stored_params(params),
            "priority": priority,
            "max_attempts": 3,
        },
    )


async def test_as_many_at_once_as_there_are_devices(store: Store, db: Db) -> None:
    """Each device is with one attempt at a time; a freed one is used at once."""
    for number in range(5):
        await pending(store, db, number)
    await pending(store, db, 9, device="GPU")
    async with bench(store, Devices(cpus=2, gpus=2, fallback=False)) as run:
        assert sorted(await run.until(3)) == [0, 1, 9]
        await run.looked_again()
        assert len(run.started) == 3
        assert [attempt.devices for attempt in run.started if attempt.task.task_id == 9] == [("cuda:0",)]
        run.started[0].over.set()
        await run.until(4)
        assert run.started[3].devices == ("cpu",)


@pytest.mark.parametrize("fallback", [False, True])
async def test_devices_are_kept_free_for_a_task_that_has_waited_long(store: Store, db: Db, fallback: bool) -> None:
    """A task for two devices is passed over by small ones only so long: then it gets the devices as they fall free.

    On a worker that falls back, both kinds of tasks draw on one pool, and neither takes what is kept free.
    """
    devices = Devices(cpus=2, gpus=0 if fallback else 2, fallback=fallback)
    await pending(store, db, 1, device="GPU")
    async with bench(store, devices, patience_seconds=0) as run:
        assert await run.until(1) == [1]
        await pending(store, db, 2, device="GPU", number=2)
        await run.looked_again()  # else a claim that had looked before could take the third
        await pending(store, db, 3, device="GPU")
        if fallback:
            await pending(store, db, 4, device="CPU")
        await run.looked_again()
        assert [attempt.task.task_id for attempt in run.started] == [1]
        run.started[0].over.set()
        assert await run.until(2) == [1, 2]
        assert len(run.started[1].devices) == 2
        run.started[1].over.set()
        assert (await run.until(3))[2] == 3


async def test_until_then_small_tasks_pass(store: Store, db: Db) -> None:
    """Within the time of patience no device stands idle for a task that does not fit yet."""
    await pending(store, db, 1)
    async with bench(store, Devices(cpus=2, gpus=0, fallback=False)) as run:
        await run.until(1)
        await pending(store, db, 2, number=2)
        await pending(store, db, 3)
        assert await run.until(2) == [1, 3]


async def test_a_task_too_large_for_this_worker_reserves_nothing(store: Store, db: Db) -> None:
    """What no device count of this worker can meet is for another one."""
    await pending(store, db, 1)
    async with bench(store, Devices(cpus=2, gpus=0, fallback=False), patience_seconds=0) as run:
        await run.until(1)
        await pending(store, db, 2, number=3, priority=9)
        await anyio.sleep(0.005)
        await pending(store, db, 3)
        assert await run.until(2) == [1, 3]


async def test_a_cancel_and_a_drain_reach_the_attempt(store: Store, db: Db) -> None:
    """By `_id`; a drain ends all, claims no more, and `run` returns when they are over."""
    for number in range(3):
        await pending(store, db, number)
    async with bench(store, Devices(cpus=2, gpus=0, fallback=False)) as run:
        await run.until(2)
        run.dispatcher.cancel(run.started[0].task.key)
        await run.until(3)
        assert [attempt.endings for attempt in run.started] == [[Ending.CANCELLED], [], []]
        await pending(store, db, 9)
        run.dispatcher.drain()
    assert [attempt.endings[0] for attempt in run.started] == [Ending.CANCELLED, Ending.DRAINED, Ending.DRAINED]
    assert db.DL_TASK.count_documents({"status": "PENDING"}) == 1
    assert not run.dispatcher.running


async def test_a_task_that_was_inserted_again_ends_the_attempt_at_the_old_one(store: Store, db: Db) -> None:
    """Under the same number, as its first attempt again, while the old one runs here: that one is lost at once."""
    await pending(store, db, 1)
    devices = Devices(cpus=2, gpus=0, fallback=False)
    async with bench(store, devices) as run:
        await run.until(1)
        db.DL_TASK.delete_one({"task_id": 1})
        await pending(store, db, 1)
        assert await run.until(2) == [1, 1]
        assert [attempt.endings for attempt in run.started] == [[Ending.LOST], []]
        await run.looked_again()
        assert run.dispatcher.running == ["1/1"]
    assert run.started[1].endings == [Ending.DRAINED]
    assert devices.free()["CPU"] == 2


async def test_a_document_changed_by_hand_does_not_end_the_worker(store: Store, db: Db) -> None:
    """An admitted document that is no task any more is left to its lease; the next one runs, on all devices."""
    await pending(store, db, 1, priority=5)
    db.DL_TASK.update_many({}, {"$set": {"param_request.device_num": [1, 2], "task_type": 5}})
    await pending(store, db, 2, number=2)
    async with bench(store, Devices(cpus=2, gpus=0, fallback=False)) as run:
        assert await run.until(1) == [2]


async def lose(store: Store, db: Db, task_id: int, times: int) -> None:
    """Have the task lose its worker so often."""
    for _ in range(times):
        db.DL_TASK.update_one({"task_id": task_id}, {"$unset": {"not_before": ""}})
        task = Task.from_document(await store.tasks.claim("dead", {"CPU": 4}) or {})
        assert task.task_id == task_id
        db.DL_TASK.update_one({"_id": task.key}, [{"$set": {"lease_renewed_at": {"$subtract": ["$$NOW", 10**8]}}}])
        (lost,) = await store.tasks.expired()
        await store.tasks.recover(lost)
    db.DL_TASK.update_one({"task_id": task_id}, {"$unset": {"not_before": ""}})


async def test_the_last_attempt_after_lost_workers_runs_alone(store: Store, db: Db) -> None:
    """What may have killed its worker twice gets a third attempt with nothing beside it, before and after its claim."""
    await pending(store, db, 1)
    await lose(store, db, 1, times=2)
    await pending(store, db, 2, priority=1)
    async with bench(store, Devices(cpus=4, gpus=0, fallback=False)) as made:
        assert await made.until(1) == [2]
        await made.looked_again()
        assert len(made.started) == 1
        made.started[0].over.set()
        assert await made.until(2) == [2, 1]
        await pending(store, db, 3)
        made.dispatcher.wake()
        await anyio.sleep(0.2)  # nothing tells that nothing happens
        assert len(made.started) == 2
        made.started[1].over.set()
        assert await made.until(3) == [2, 1, 3]
        made.started[2].over.set()


async def test_a_task_that_is_to_run_alone_is_not_starved(store: Store, db: Db) -> None:
    """Once it has waited long as the first of the queue, nothing else is begun until the worker is idle."""
    await pending(store, db, 1, priority=1)
    await lose(store, db, 1, times=2)
    await pending(store, db, 2, priority=2)
    async with bench(store, Devices(cpus=4, gpus=0, fallback=False), patience_seconds=-1) as made:
        assert await made.until(1) == [2]
        await pending(store, db, 3)
        made.dispatcher.wake()
        await anyio.sleep(0.2)
        assert len(made.started) == 1
        made.started[0].over.set()
        assert await made.until(2) == [2, 1]
        made.started[1].over.set()
        assert await made.until(3) == [2, 1, 3]
        made.started[2].over.set()


async def test_after_a_fault_of_its_machine_a_worker_rests(
    store: Store, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves the queue to others for a while, longer with each fault in a row."""
    monkeypatch.setattr(service.dispatcher, "_REST_SECONDS", 0.3)
    for number in range(3):
        await pending(store, db, number)
    async with bench(store, Devices(cpus=1, gpus=0, fallback=False)) as made:
        for number in range(2):
            await made.until(number + 1)
            made.started[number].machine_failed = True
            ended = anyio.current_time()
            made.started[number].over.set()
            await made.until(number + 2)
            # A rest is what is asked for here: no shorter than it should be, however slow the machine is.
            assert anyio.current_time() - ended >= 0.3 * 2**number
        made.started[2].over.set()
