"""The watcher on a real change stream: what it hints at, and that it goes on after whatever ends the stream."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from bson import ObjectId
from pymongo.database import Database
from pymongo.errors import AutoReconnect, OperationFailure

import service.watcher
from handlers.store import Store, connect_store
from handlers.store.database import Database as StoreDatabase
from handlers.store.stream import Hint, hints
from service.metrics import Metrics
from service.watcher import Watcher

Db = Database[dict[str, Any]]


class Watched:
    """A running watcher, and what it has told."""

    def __init__(self, store: Store, capacity: float = 1000) -> None:
        self.told, self.heard = anyio.create_memory_object_stream[tuple[str, Any]](1000)
        self.new, self.keys = anyio.create_memory_object_stream[Hint](capacity)
        self.metrics = Metrics()
        self.watcher = self.made(store, self._sweep)
        #: The keys that the last sweep could see.
        self.swept: list[Any] = []
        self._store = store

    def made(self, store: Store, sweep_all: Callable[[], Awaitable[None]]) -> Watcher:
        """A watcher that tells here."""
        return Watcher(
            store, new=self.new, sweep_all=sweep_all, cancel=self._cancel, wake=self._wake, metrics=self.metrics
        )

    async def _sweep(self) -> None:
        self.swept = await self._store.tasks.new_keys(100)
        self.told.send_nowait(("sweep", None))

    async def _cancel(self, key: Any) -> None:
        self.told.send_nowait(("cancel", key))

    def _wake(self) -> None:
        self.told.send_nowait(("wake", None))

    async def pass_keys(self) -> None:
        """Put the keys of new documents among the other things told."""
        async for hint in self.keys:
            self.told.send_nowait(("new", hint.key))

    async def hears(self, what: str, key: Any = None) -> None:
        """Wait for the next thing that is told, which is this one."""
        with anyio.fail_after(20):
            assert await self.heard.receive() == (what, key)

    async def hears_after(self, what: str, key: Any = None) -> list[tuple[str, Any]]:
        """Wait until this is told; returns what was told before."""
        before = []
        with anyio.fail_after(20):
            while (told := await self.heard.receive()) != (what, key):
                before.append(told)
        return before


@asynccontextmanager
async def watching(store: Store) -> AsyncIterator[Watched]:
    """A watcher whose stream is open and whose first sweep is over."""
    watched = Watched(store)
    with watched.told, watched.heard, watched.new, watched.keys:
        async with anyio.create_task_group() as group:
            group.start_soon(watched.watcher.run)
            group.start_soon(watched.pass_keys)
            await watched.hears("sweep")
            yield watched
            group.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.watcher, "_PAUSE_SECONDS", 0.01)


def stream_cursors(db: Db) -> list[dict[str, Any]]:
    """The server's open change streams on the test's database."""
    operations = db.client.admin.aggregate([{"$currentOp": {"idleCursors": True}}])
    found = []
    for operation in operations:
        cursor = operation.get("cursor") or {}
        command = cursor.get("originatingCommand") or {}
        if command.get("$db") == db.name and "$changeStream" in (command.get("pipeline") or [{}])[0]:
            found.append(cursor)
    return found


async def test_inserts_replacements_cancels_and_returns_are_told_and_nothing_else(store: Store, db: Db) -> None:
    """One hint for each; progress, other fields, other collections and deletions are none."""
    async with watching(store) as watched:
        key = db.DL_TASK.insert_one({"task_id": 1}).inserted_id
        await watched.hears("new", key)
        db.IMG_INFO.insert_one({})
        db.DL_TASK.update_one(
            {"_id": key}, {"$set": {"progress": {"iteration": 1}, "comment": "x", "status": "RUNNING"}}
        )
        db.DL_TASK.update_one({"_id": key}, {"$set": {"cancel_requested": False}})
        db.DL_TASK.update_one({"_id": key}, {"$set": {"cancel_requested": True}})
        await watched.hears("cancel", key)
        db.DL_TASK.update_one({"_id": key}, {"$set": {"status": "PENDING"}})
        await watched.hears("wake")
        db.DL_TASK.replace_one({"_id": key}, {"task_id": 2})
        await watched.hears("new", key)
        db.DL_TASK.delete_one({"_id": key})
        last = db.DL_TASK.insert_one({"_id": {"a": "$b"}, "task_id": 3}).inserted_id
        await watched.hears("new", last)


async def test_a_copy_of_a_finished_task_is_told(store: Store, db: Db) -> None:
    """The state that a new document carries says nothing."""
    async with watching(store) as watched:
        key = db.DL_TASK.insert_one({"task_id": 1, "status": "SUCCEEDED", "admitted_id": ObjectId()}).inserted_id
        await watched.hears("new", key)


async def test_documents_of_any_size_are_told(store: Store, db: Db) -> None:
    """An event with 16 MB in it does not end the stream: only its key is asked for."""
    async with watching(store) as watched:
        key = db.DL_TASK.insert_one({"task_id": 1, "img_mongodb_ids": ["x" * (16 * 2**20 - 200)]}).inserted_id
        await watched.hears("new", key)
        db.DL_TASK.update_one({"_id": key}, {"$set": {"cancel_requested": True, "img_mongodb_ids": ["y" * 15 * 2**20]}})
        await watched.hears("cancel", key)


async def test_a_dropped_collection_does_not_end_it(store: Store, db: Db) -> None:
    """Dropped and made again: everything is swept, and the next insert is told, on the same stream."""
    async with watching(store) as watched:
        await watched.hears_after("new", db.DL_TASK.insert_one({"task_id": 1}).inserted_id)
        cursors = [cursor["cursorId"] for cursor in stream_cursors(db)]
        db.DL_TASK.drop()
        await watched.hears("sweep")
        await watched.hears("new", db.DL_TASK.insert_one({"task_id": 2}).inserted_id)
        assert [cursor["cursorId"] for cursor in stream_cursors(db)] == cursors


async def test_a_renamed_collection_does_not_end_it(store: Store, db: Db) -> None:
    """Renamed away, and another one renamed to its name: both times everything is swept."""
    async with watching(store) as watched:
        await watched.hears_after("new", db.DL_TASK.insert_one({"task_id": 1}).inserted_id)
        db.DL_TASK.rename("DL_TASK_OLD")
        await watched.hears("sweep")
        await watched.hears("new", db.DL_TASK.insert_one({"task_id": 2}).inserted_id)
        key = db.RESTORED.insert_one({"task_id": 3}).inserted_id
        db.RESTORED.rename("DL_TASK", dropTarget=True)
        await watched.hears("sweep")
        assert watched.swept == [key]


async def test_a_dropped_registry_is_told(store: Store, db: Db) -> None:
    """The rules rest on the indexes of other collections too: they are swept for as well."""
    async with watching(store) as watched:
        db.DL_MODEL.drop()
        await watched.hears("sweep")
        db.SOMETHING_ELSE.insert_one({})
        db.SOMETHING_ELSE.drop()
        await watched.hears("new", db.DL_TASK.insert_one({"task_id": 2}).inserted_id)


async def test_a_dropped_database_is_watched_again(store: Store, db: Db) -> None:
    """The stream ends without an error; it is opened afresh, and swept."""
    async with watching(store) as watched:
        await watched.hears_after("new", db.DL_TASK.insert_one({"task_id": 1}).inserted_id)
        first = watched.watcher.opened
        db.client.drop_database(db.name)
        with anyio.fail_after(20):
            while watched.watcher.opened is first:
                await watched.heard.receive()
            await watched.watcher.opened.wait()
        await watched.hears_after("new", db.DL_TASK.insert_one({"task_id": 2}).inserted_id)


async def test_a_killed_cursor_loses_nothing(store: Store, db: Db) -> None:
    """What is inserted while there is no cursor is told by the resumed stream, or found by the sweep of a new one."""
    async with watching(store) as watched:
        cursors = stream_cursors(db)
        assert len(cursors) == 1
        db.command({"killCursors": "$cmd.aggregate", "cursors": [cursors[0]["cursorId"]]})
        key = db.DL_TASK.insert_one({"task_id": 1}).inserted_id
        with anyio.fail_after(20):
            while key not in watched.swept:
                if await watched.heard.receive() == ("new", key):
                    break
        await watched.hears_after("new", db.DL_TASK.insert_one({"task_id": 2}).inserted_id)


@pytest.mark.parametrize(
    "error",
    [
        OperationFailure("Resume of change stream was not possible, history may have been lost", 286),
        OperationFailure("CollectionScan died due to position in capped collection being deleted", 136),
        OperationFailure("BSONObj size is invalid", 10334),
        AutoReconnect("connection closed"),
    ],
    ids=["history lost", "position lost", "event too large", "network"],
)
async def test_after_an_error_it_opens_afresh_and_sweeps(
    store: Store, db: Db, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whatever the stream dies of, on opening or later: no token is tried again, and a sweep finds what it missed."""
    lives = [0]

    async def dying(
        database: StoreDatabase, opened: anyio.Event, reached: Callable[[int], None]
    ) -> AsyncGenerator[Hint, None]:
        lives[0] += 1
        if lives[0] == 1:
            raise error
        if lives[0] == 2:
            opened.set()
            yield Hint("before", True, False)
            raise error
        async for hint in hints(database, opened, reached):
            yield hint

    monkeypatch.setattr(service.watcher, "hints", dying)
    watched = Watched(store)
    with watched.told, watched.heard, watched.new, watched.keys:
        async with anyio.create_task_group() as group:
            group.start_soon(watched.watcher.run)
            group.start_soon(watched.pass_keys)
            await watched.hears_after("new", "before")
            with anyio.fail_after(20):
                await watched.watcher.opened.wait()
                while lives[0] < 3:
                    await watched.heard.receive()
            key = db.DL_TASK.insert_one({"task_id": 1}).inserted_id
            await watched.hears_after("new", key)
            group.cancel_scope.cancel()
    assert lives[0] == 3


async def test_a_failing_sweep_or_cancel_is_tried_again(store: Store, db: Db) -> None:
    """A callback that meets a database away does not end the watcher: the stream is opened again, and swept again."""
    failures = [AutoReconnect("away"), AutoReconnect("away")]
    watched = Watched(store)

    async def sweep() -> None:
        if failures:
            raise failures.pop()
        watched.told.send_nowait(("sweep", None))

    watched.watcher = watched.made(store, sweep)
    with watched.told, watched.heard, watched.new, watched.keys:
        async with anyio.create_task_group() as group:
            group.start_soon(watched.watcher.run)
            await watched.hears("sweep")
            group.cancel_scope.cancel()
    assert not failures


async def test_a_storm_loses_no_hint(store: Store, db: Db) -> None:
    """More copies of old documents than fit: the stream waits for the admitters, and each key arrives."""
    watched = Watched(store, capacity=2)
    with watched.told, watched.heard, watched.new, watched.keys:
        async with anyio.create_task_group() as group:
            group.start_soon(watched.watcher.run)
            await watched.hears("sweep")
            keys = db.DL_TASK.insert_many([{"status": "SUCCEEDED"} for _ in range(50)]).inserted_ids
            last = db.DL_TASK.insert_one({"status": "SUCCEEDED"}).inserted_id
            with anyio.fail_after(20):
                received = [(await watched.keys.receive()).key for _ in range(51)]
            assert received == [*keys, last]
            group.cancel_scope.cancel()


async def test_a_cancelled_watcher_leaves_no_cursor(store: Store, db: Db) -> None:
    """Opened and cancelled six times, at any moment: no cursor is left on the server."""
    for number in range(6):
        watched = Watched(store)
        with watched.told, watched.heard, watched.new, watched.keys, anyio.move_on_after(number * 0.02):
            await watched.watcher.run()
    assert stream_cursors(db) == []


async def test_cancelled_calls_do_not_wedge_the_client(mongo_uri: str, database_name: str) -> None:
    """Two hundred calls, each cancelled within 0 to 20 ms: the next ones are answered as if nothing had been."""
    async with connect_store(f"{mongo_uri}&maxPoolSize=4", database_name) as store:
        cancelled = [0]

        async def call(number: int) -> None:
            with anyio.move_on_after(number / 10_000) as scope:
                if number % 2:
                    await store.overview.listed(5)
                else:
                    async for _ in store.tasks.copied_keys():
                        pass
            cancelled[0] += scope.cancelled_caught

        await store.indexes.create()
        await store.tasks.insert({"task_id": 1})
        async with anyio.create_task_group() as group:
            for number in range(200):
                group.start_soon(call, number)
        assert cancelled[0] > 20
        with anyio.fail_after(5):
            for _ in range(8):
                assert len(await store.overview.listed(5)) == 1
