"""The look at the queue that the metrics rest on: what it says, whatever stands in a document, and what it costs."""

from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import pytest
from bson import Decimal128, Int64, ObjectId
from pymongo.database import Database

from handlers.store import Store
from handlers.store.queue import AT_MOST, Need, Queue
from handlers.store.stream import Hint, hints
from service.metrics import Metrics
from tests.integration.test_watcher import Watched
from tests.scrape import parsed

Db = Database[dict[str, Any]]


@pytest.fixture
def queue(store: Store) -> Queue:
    return Queue(store.database)


def waiting(db: Db, kind: Any = "GPU", number: Any = 1, **fields: Any) -> Any:
    """A task that waits, admitted an hour ago."""
    key = ObjectId()
    document = {
        **{"_id": key, "admitted_id": key, "status": "PENDING", "error_code": 0, "priority": 0},
        "create_time": datetime.now(UTC) - timedelta(hours=1),
        "param_request": {"device_type": kind, "device_num": number},
    }
    db.DL_TASK.insert_one({**document, **fields})
    return key


async def test_an_empty_queue(queue: Queue) -> None:
    state = await queue.read()
    assert (state.new, state.pending, state.running, state.backing_off, state.workers) == (0, 0, 0, 0, 0)
    assert (state.waiting, state.oldest, state.unservable) == ({}, {}, {})


async def test_tasks_by_state_and_need(queue: Queue, store: Store, db: Db) -> None:
    """New, waiting and running ones; what no live worker has the devices for, or takes, is told apart."""
    db.DL_TASK.insert_many([{"task_id": number} for number in range(3)])
    waiting(db, "GPU", 1)
    waiting(db, "GPU", Int64(2))
    waiting(db, "GPU", 2.0)
    waiting(db, "GPU", 8)
    waiting(db, "CPU", 1)
    waiting(db, "CPU", 1, status="RUNNING")
    waiting(db, "CPU", 1, status="SUCCEEDED")
    waiting(db, "CPU", 1, status="FAILED", error_code=7)
    await store.workers.renew("a", {"devices": {"CPU": 0, "GPU": 1}})
    await store.workers.renew("b", {"devices": {"CPU": 0, "GPU": 4}, "min_device_num": 2})
    await store.workers.renew("gone", {"devices": {"CPU": 64, "GPU": 64}})
    db.DL_WORKER.update_one({"_id": "gone"}, {"$set": {"renewed_at": datetime.now(UTC) - timedelta(minutes=3)}})
    state = await queue.read()
    assert (state.new, state.pending, state.running, state.workers) == (3, 5, 1, 2)
    assert state.waiting == {Need("GPU", 1): 1, Need("GPU", 2): 2, Need("GPU", 8): 1, Need("CPU", 1): 1}
    assert state.unservable == {Need("GPU", 8): 1, Need("CPU", 1): 1}
    # It takes none that needs fewer than two.
    db.DL_WORKER.delete_one({"_id": "a"})
    assert (await queue.read()).unservable == {Need("GPU", 1): 1, Need("GPU", 8): 1, Need("CPU", 1): 1}


async def test_how_long_the_oldest_waits(queue: Queue, store: Store, db: Db) -> None:
    """Since it was admitted, or since its back-off ended or it was given back; one that backs off does not wait."""
    now = (await queue.read()).clock.at
    await store.workers.renew("a", {"devices": {"CPU": 1, "GPU": 0}})
    waiting(db, "GPU", create_time=now - timedelta(hours=5), not_before=now - timedelta(minutes=1))
    waiting(db, "CPU", create_time=now - timedelta(hours=2))
    waiting(db, "CPU", create_time=now - timedelta(hours=9), not_before=now + timedelta(hours=1))
    state = await queue.read()
    assert state.oldest["GPU", False] == pytest.approx((state.clock.at - now).total_seconds() + 60)
    assert state.oldest["CPU", True] == pytest.approx((state.clock.at - now).total_seconds() + 7200)
    assert (state.backing_off, state.pending) == (1, 3)


@pytest.mark.parametrize(
    "value", [None, [], {}, "x" * 100, "\0", -1, 2**40, float("nan"), float("inf"), Decimal128("NaN"), True, [1, 2]]
)
async def test_documents_changed_by_hand(queue: Queue, store: Store, db: Db, value: Any) -> None:
    """Whatever stands in a field, the look is had, and what is no need counts as another one that nobody meets."""
    waiting(db, "GPU", 1)
    waiting(db, create_time=value, not_before=value)
    waiting(db, "GPU", value)
    waiting(db, value, 1)
    waiting(db, param_request=value)
    await store.workers.renew("a", {"devices": {"CPU": 1, "GPU": 1}})
    db.DL_WORKER.insert_many(
        [
            {"_id": "b", "renewed_at": datetime.now(UTC), "devices": value, "min_device_num": value},
            {"_id": "c", "renewed_at": datetime.now(UTC), "devices": {"CPU": value, "GPU": value}},
            {"_id": "d", "renewed_at": value},
        ]
    )
    metrics = Metrics()
    state = await queue.read()
    metrics.queue_read(state)
    seen = parsed(metrics.text()[0].decode())
    assert state.pending == seen("tasks", state="PENDING") == seen("queue_waiting") == 5
    kinds = {label for _, labels in seen.values for name, label in labels if name == "device"}
    assert kinds <= {"CPU", "GPU", "other"}


async def test_dates_that_no_datetime_can_be(queue: Queue, db: Db) -> None:
    """A year far off says nothing of how long anybody waits."""
    from bson.datetime_ms import DatetimeMS

    waiting(db, create_time=DatetimeMS(-(2**62)))
    state = await queue.read()
    assert (state.pending, state.oldest) == (1, {})


async def test_what_it_costs(queue: Queue, db: Db) -> None:
    """Ended tasks cost nothing, however many; so the server says of each command."""
    ended = {"status": "SUCCEEDED", "error_code": 0, "priority": 0, "param_request": {"device_type": "CPU"}}
    db.DL_TASK.insert_many([{**ended, "admitted_id": number} for number in range(3000)])
    for _ in range(3):
        waiting(db)
    db.command("profile", 2)
    state = await queue.read()
    db.command("profile", 0)
    assert state.pending == 3
    commands = list(db.system.profile.find({"ns": f"{db.name}.DL_TASK"}))
    assert len(commands) >= 3
    for command in commands:
        assert command["planSummary"].startswith("IXSCAN"), command
        assert max(command["docsExamined"], command["keysExamined"]) < 10, command


async def test_a_flood_is_counted_up_to_a_bound(queue: Queue, db: Db, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond, a number means "or more"."""
    assert AT_MOST == 10_000
    monkeypatch.setattr("handlers.store.queue.AT_MOST", 20)
    for _ in range(25):
        waiting(db)
        waiting(db, status="RUNNING")
    db.DL_TASK.insert_many([{"task_id": number} for number in range(25)])
    state = await queue.read()
    assert (state.new, state.pending, state.running) == (20, 20, 20)


async def test_the_servers_clock(queue: Queue, store: Store) -> None:
    """Between the server's time before and after, however this machine's clock is set."""
    before = await store.database.now()
    clock = (await queue.read()).clock
    # A date of MongoDB has whole milliseconds.
    assert before <= clock.at <= clock.now() + timedelta(milliseconds=1)
    assert clock.now() <= await store.database.now() + timedelta(milliseconds=100)


async def test_a_stream_that_stands_still_lags(queue: Queue, store: Store, db: Db) -> None:
    """The consumer is stuck, and the server goes on: the distance grows. It goes on: the distance is gone."""
    watched = Watched(store, capacity=0)

    async def lag() -> float:
        watched.metrics.queue_read(await queue.read())
        return parsed(watched.metrics.text()[0].decode())("stream_lag_seconds")

    with watched.told, watched.heard, watched.new, watched.keys:
        async with anyio.create_task_group() as group:
            group.start_soon(watched.watcher.run)
            await watched.hears("sweep")
            # Nobody takes the first hint, so that the stream stands at its event.
            db.DL_TASK.insert_one({"task_id": 1})
            with anyio.fail_after(30):
                while await lag() < 3:
                    db.NOISE.insert_one({})
                    await anyio.sleep(0.1)
            group.start_soon(watched.pass_keys)
            with anyio.fail_after(30):
                while await lag() > 1:
                    db.NOISE.insert_one({})
                    await anyio.sleep(0.1)
            group.cancel_scope.cancel()


async def test_a_stream_with_nothing_to_tell_does_not_lag(store: Store, db: Db) -> None:
    """Writes that are no news move it on all the same: no hint comes, and its place follows the server's."""
    opened, reached, places = anyio.Event(), anyio.Event(), []

    def note(second: int) -> None:
        places.append(second)
        if second > places[0]:
            reached.set()

    async def watch() -> None:
        async for _ in hints(store.database, opened, note):
            pytest.fail("a hint of nothing")

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        await opened.wait()
        with anyio.fail_after(20):
            while not reached.is_set():
                db.NOISE.insert_one({})
                await anyio.sleep(0.1)
        group.cancel_scope.cancel()


async def test_when_a_document_was_inserted_is_told(store: Store, db: Db) -> None:
    """By the server's clock, to the millisecond: what the time of an admission is counted from."""
    opened, found = anyio.Event(), list[Hint]()
    before = await store.database.now()

    async def watch() -> None:
        async for hint in hints(store.database, opened, lambda second: None):
            found.append(hint)
            return

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            await opened.wait()
            db.DL_TASK.insert_one({"task_id": 1})
    assert found[0].written is not None
    assert before <= found[0].written <= await store.database.now()
