"""A claim whose answer got lost: the task runs in the worker's name, and the worker finds that out by itself."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
from pymongo.database import Database

import handlers.store.database
from handlers.store import Store, connect_store
from handlers.store.database import StoreError
from schemas.task import Task
from service.attempt import Ending
from service.devices import Devices
from tests.failpoints import on_command
from tests.integration.test_dispatcher import bench, pending

Db = Database[dict[str, Any]]

#: The server does what it is asked, and the members do not confirm it in time.
UNCONFIRMED = {"writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"}}
#: It does it and then shuts down, as it says: the driver asks again until its time is up, and the server, which knows
#: the number of the write, answers the same and does nothing twice.
SHUT_DOWN = {
    "writeConcernError": {"code": 91, "errmsg": "Replication is being shut down"},
    "errorLabels": ["RetryableWriteError"],
}
#: The connection is closed before anything is done, each time.
CLOSED = {"closeConnection": True}
ALL = pytest.mark.parametrize("how", [UNCONFIRMED, SHUT_DOWN, CLOSED], ids=["unconfirmed", "shut down", "closed"])


@pytest.fixture(scope="module")
def mongo_uri(start_mongod: Callable[..., str]) -> str:
    """A server that fails on command, instead of the one that all tests share."""
    return start_mongod("--setParameter", "enableTestCommands=1")


@pytest.fixture
async def store(mongo_uri: str, database_name: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Store]:
    """A store whose operations give up after a second instead of twenty."""
    monkeypatch.setattr(handlers.store.database, "OPERATION_TIMEOUT_MS", 1000)
    async with connect_store(mongo_uri, database_name) as store:
        await store.indexes.create()
        yield store


@contextmanager
def next_claim_failing(store: Store, db: Db, how: dict[str, Any], raised: Callable[[], None]) -> Iterator[None]:
    """The next claim of the store fails in this way, those after it do not; `raised` is called when it has."""
    claim = store.tasks.claim

    async def failed(*args: Any, **kwargs: Any) -> Any:
        patch.undo()
        with on_command(db, "findAndModify", **how):
            try:
                return await claim(*args, **kwargs)
            except StoreError:
                raised()
                raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.tasks, "claim", failed)
        yield


@ALL
async def test_a_claim_that_raises_may_be_done(store: Store, db: Db, how: dict[str, Any]) -> None:
    """What the server makes of these failures, which the tests below rest on."""
    await pending(store, db, 1)
    with on_command(db, "findAndModify", **how), pytest.raises(StoreError):
        await store.tasks.claim("w", {"CPU": 1})
    found = [Task.from_document(document) for document in await store.tasks.running_of("w")]
    assert [(task.task_id, task.attempt) for task in found] == ([] if how is CLOSED else [(1, 1)])


@ALL
async def test_the_task_is_run_all_the_same(store: Store, db: Db, how: dict[str, Any]) -> None:
    """By the attempt that the claim made, on the device that it was for, before any other task; and only once."""
    for number in (1, 2):
        await pending(store, db, number)
    devices = Devices(cpus=1, gpus=0, fallback=False)
    raised = anyio.Event()
    with next_claim_failing(store, db, how, raised.set):
        async with bench(store, devices) as run:
            assert await run.until(1) == [1]
            assert raised.is_set()
            assert (run.started[0].task.attempt, run.started[0].devices) == (1, ("cpu",))
            await run.looked_again()
            assert len(run.started) == 1
            assert db.DL_TASK.count_documents({"status": "RUNNING"}) == 1
            # A fake attempt ends no task.
            db.DL_TASK.delete_one({"task_id": 1})
            run.started[0].over.set()
            assert await run.until(2) == [1, 2]
    assert devices.free() == {"CPU": 1, "GPU": 0}


async def test_a_claim_that_is_done_too_late_is_given_back(store: Store, db: Db) -> None:
    """The devices have gone to another task meanwhile: its attempt is drained before it begins."""
    await pending(store, db, 1)
    raised = anyio.Event()
    with next_claim_failing(store, db, CLOSED, raised.set):
        async with bench(store, Devices(cpus=1, gpus=0, fallback=False)) as run:
            assert await run.until(1) == [1]
            assert raised.is_set()
            await pending(store, db, 2)
            assert await store.tasks.claim("w", {"CPU": 1}) is not None
            # A fake attempt gives no task back: over, it may be found once more before this test has its turn.
            assert (await run.until(2))[:2] == [1, 2]
            assert [attempt.endings for attempt in run.started[:2]] == [[], [Ending.DRAINED]]


async def test_a_drain_gives_it_back(store: Store, db: Db) -> None:
    """The last claim before the end raised: its task is taken up, and drained like all others."""
    await pending(store, db, 1)
    with next_claim_failing(store, db, UNCONFIRMED, lambda: run.dispatcher.drain()):
        async with bench(store, Devices(cpus=1, gpus=0, fallback=False)) as run:
            assert await run.until(1) == [1]
            assert run.started[0].endings == [Ending.DRAINED]
