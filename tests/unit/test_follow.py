"""Following a task: to its end, through a fail-over, and in words where there is no terminal."""

import io
from typing import Any, cast

import pytest
from rich.console import Console

from handlers.store import Store
from handlers.store.database import Document, StoreError
from service.cli import follow as module
from service.cli.follow import count_reporter, follow, task_reporter

pytestmark = pytest.mark.anyio


class Tasks:
    """Answers with each of `answers` in turn; an exception is raised."""

    def __init__(self, *answers: Any) -> None:
        self._answers = iter(answers)
        self.tasks = self

    async def get(self, task_id: Any) -> Document | None:
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return cast("Document | None", answer)


def task(status: str, iteration: int = 0, **fields: Any) -> Document:
    progress = {"iteration": iteration, "max_num_iters": 10, "loss": 1.5}
    return {"_id": 1, "admitted_id": 1, "task_type": "TRAIN", "status": status, "progress": progress, **fields}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers are all there: nothing to wait for."""
    monkeypatch.setattr(module, "_POLL_SECONDS", 0)


async def test_each_look_is_reported_until_the_end() -> None:
    """A forged or copied end state (`admitted_id` of another document) is no end."""
    documents = [task("SUCCEEDED", admitted_id=2), task("PENDING"), task("RUNNING", 5), task("SUCCEEDED", 10)]
    seen: list[Document] = []
    store = cast("Store", Tasks(*documents, AssertionError("looked on after the end")))
    assert await follow(store, 1, seen.append) == documents[-1]
    assert seen == documents


async def test_a_fail_over_is_sat_out_and_a_dead_database_is_said() -> None:
    """Four failed looks in a row are passed over, as often as it happens; the fifth is raised."""
    away = [StoreError("away")] * 4
    store = cast("Store", Tasks(*away, task("RUNNING"), *away, task("FAILED")))
    ended = await follow(store, 1, lambda document: None)
    assert ended is not None
    assert ended["status"] == "FAILED"
    with pytest.raises(StoreError, match="away"):
        await follow(cast("Store", Tasks(*away, StoreError("away"))), 1, lambda document: None)


async def test_an_unknown_task_is_none() -> None:
    """No document, no waiting."""
    assert await follow(cast("Store", Tasks(None)), 1, lambda document: None) is None


def test_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal: a line for each new state, and for progress not more often than every few seconds."""
    out = io.StringIO()
    looks = [task("PENDING"), task("RUNNING"), task("RUNNING", 1), task("RUNNING", 2), task("SUCCEEDED", 10)]
    with task_reporter(Console(file=out, width=80)) as report:
        for document in looks:
            report(document)
    assert out.getvalue().splitlines() == ["TRAIN PENDING", "TRAIN RUNNING", "TRAIN SUCCEEDED"]
    monkeypatch.setattr(module, "_LINE_SECONDS", 0)
    with task_reporter(Console(file=out, width=80)) as report:
        report(looks[2])
        report(looks[2])
        report(looks[3])
    assert out.getvalue().splitlines()[3:] == ["TRAIN RUNNING 1/10 · loss 1.500", "TRAIN RUNNING 2/10 · loss 1.500"]


def test_a_bar_on_a_terminal() -> None:
    """On a terminal a bar shows state, count and loss, and is full once the task has succeeded."""
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    with task_reporter(console) as report:
        for document in (task("RUNNING"), task("RUNNING", 4), task("SUCCEEDED", 9)):
            report(document)
    assert "TRAIN SUCCEEDED" in out.getvalue()
    with count_reporter(console, "images") as count:
        count(1, 2)
        count(2, 2)
    assert "2/2" in out.getvalue()


def test_quiet() -> None:
    """Where stdout is for a JSON document, nothing is said off a terminal."""
    out = io.StringIO()
    with task_reporter(Console(file=out), quiet=True) as report:
        report(task("RUNNING"))
    assert out.getvalue() == ""
