"""The one poll behind all open pages."""

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from bson import ObjectId
from pymongo.database import Database

from handlers.store import Store
from service.web import live as live_module
from service.web.live import MOST_VIEWERS, EventStream, Full, Live, Wanted
from service.web.reading import Reading
from service.web.render import Renderer
from tests.page.documents import ended

Db = Database[dict[str, Any]]


@pytest.fixture
def live(store: Store) -> Live:
    return Live(Reading(store), Renderer())


def reads(db: Db) -> int:
    """Reads of tasks by their numbers since the profiler is on: one for each poll."""
    return db["system.profile"].count_documents({"command.pipeline.0.$match.task_id.$in": {"$exists": True}})


async def test_many_look_and_the_database_is_asked_once(db: Db, live: Live) -> None:
    """Twenty pages of the same and of other tasks: as many reads as there were polls, and each page its own parts."""
    db.DL_TASK.insert_many([ended(number) for number in range(20)])
    db.command("profile", 2)
    async with anyio.create_task_group() as group:
        with live.joined(Wanted(frozenset({0, 1}), task=1)) as first:
            others = [live.joined(Wanted(frozenset({number}))) for number in range(20)]
            viewers = [other.__enter__() for other in others]
            group.start_soon(live.run)
            with anyio.fail_after(30):
                for viewer in viewers:
                    await viewer.news.wait()
            assert reads(db) == live._polls
            for number, viewer in enumerate(viewers):
                names = live.changes(viewer)
                assert {name for name in names if name.startswith("line:")} == {
                    f"line:{number}:state",
                    f"line:{number}:about",
                }
                assert not any(name.startswith("task:") for name in names)
                assert live.changes(viewer) == {}
            mine = live.changes(first)
            assert {"line:0:state", "line:1:state", "task:1:status", "task:1:result", "count:ALL"} <= set(mine)
            for other in others:
                other.__exit__(None, None, None)
        group.cancel_scope.cancel()
    db.command("profile", 0)


async def test_nobody_looks_and_nothing_is_asked(db: Db, live: Live) -> None:
    """Without an open page the poll waits for one."""
    db.command("profile", 2)
    async with anyio.create_task_group() as group:
        group.start_soon(live.run)
        await anyio.wait_all_tasks_blocked()
        assert db["system.profile"].count_documents({"ns": f"{db.name}.DL_TASK"}) == 0
        group.cancel_scope.cancel()
    db.command("profile", 0)


async def test_so_many_and_no_more(live: Live) -> None:
    """The number of pages that move is bounded, and none moves once the worker ends."""
    opened = [live.joined(Wanted()) for _ in range(MOST_VIEWERS)]
    for one in opened:
        one.__enter__()
    with pytest.raises(Full), live.joined(Wanted()):
        pass
    opened.pop().__exit__(None, None, None)
    with live.joined(Wanted()):
        pass
    live.close()
    with pytest.raises(Full), live.joined(Wanted()):
        pass
    for one in opened:
        one.__exit__(None, None, None)


async def test_who_takes_nothing_is_let_go(db: Db, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that takes no more bytes does not keep its place for ever."""
    monkeypatch.setattr(live_module, "_SEND_SECONDS", 0.2)

    async def receive() -> Any:
        await anyio.sleep_forever()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await anyio.sleep_forever()

    with anyio.fail_after(30):
        await EventStream(live, Wanted())({"type": "http"}, receive, send)
    assert not live._viewers


async def test_a_bug_over_one_document_does_not_end_the_poll(
    db: Db, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is logged, and the next poll is tried."""
    key = ObjectId()
    db.DL_TASK.insert_one({"_id": key, "admitted_id": key, "task_id": 1, "status": "RUNNING"})
    monkeypatch.setattr(live_module, "_POLL_SECONDS", 0.01)
    real: Callable[..., Any] = live._renderer.line
    failed = [0]

    def line(*arguments: Any) -> Any:
        failed[0] += 1
        if failed[0] == 1:
            raise RuntimeError("a bug")
        return real(*arguments)

    monkeypatch.setattr(live._renderer, "line", line)
    async with anyio.create_task_group() as group:
        with live.joined(Wanted(frozenset({1}))) as viewer:
            group.start_soon(live.run)
            with anyio.fail_after(30):
                while "line:1:state" not in viewer.sent:
                    await viewer.news.wait()
                    viewer.news = anyio.Event()
                    live.changes(viewer)
            group.cancel_scope.cancel()
    assert failed[0] >= 2
