"""Following one task to its end: a progress bar on a terminal, plain lines otherwise."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from handlers.store import Store
from handlers.store.database import Document, StoreError
from schemas.enums import END_STATES
from schemas.numbers import bson_uint64
from service.show import number, part, printable, progress_text, state

#: Seconds between two looks; a local server answers in a millisecond.
_POLL_SECONDS = 0.5

#: A fail-over takes up to half a minute, in which single looks fail; a database that is gone must be said.
_FAILED_LOOKS = 5

#: Seconds between two plain lines about the same state.
_LINE_SECONDS = 5.0

_ENDED = {status.name for status in END_STATES}

OnDocument = Callable[[Document], None]


async def follow(store: Store, task_id: int, on_document: OnDocument) -> Document | None:
    """Call `on_document` with the task's document again and again until it has ended; returns the last one.

    None if there is no such task. Raises StoreError once five looks in a row have failed.
    """
    failed = 0
    while True:
        try:
            document = await store.tasks.get(bson_uint64(task_id))
            failed = 0
        except StoreError:
            failed += 1
            if failed == _FAILED_LOOKS:
                raise
        else:
            if document is None:
                return None
            on_document(document)
            if state(document) in _ENDED:
                return document
        await anyio.sleep(_POLL_SECONDS)


@contextmanager
def task_reporter(console: Console, *, quiet: bool = False) -> Iterator[OnDocument]:
    """What to call with each look at a task; `quiet` says nothing where there is no terminal."""
    if console.is_terminal:
        with _bar(console) as bar:
            rows: dict[str, Any] = {}

            def show(document: Document) -> None:
                key = str(document["_id"])
                if key not in rows:
                    rows[key] = bar.add_task("", total=None, detail="")
                progress = part(document, "progress")
                total = number(progress.get("max_num_iters")) if progress.get("iteration") else None
                if state(document) == "SUCCEEDED":
                    total = total or 1
                bar.update(
                    rows[key],
                    description=printable(f"{document.get('task_type')} {state(document)}"),
                    # The last progress of a task that succeeded may be older than its end.
                    completed=total if state(document) == "SUCCEEDED" else number(progress.get("iteration")),
                    total=total,
                    detail=printable(progress_text(document)),
                )

            yield show
    elif quiet:
        yield lambda document: None
    else:
        yield _Lines(console)


class _Lines:
    """Plain lines: each new state, and now and then how far a task is."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said: tuple[str, str, float] | None = None
        self._at = 0.0

    def __call__(self, document: Document) -> None:
        progress = part(document, "progress")
        now = (str(document["_id"]), state(document), number(progress.get("iteration")))
        new_state = self._said is None or self._said[:2] != now[:2]
        if new_state or (now != self._said and time.monotonic() >= self._at + _LINE_SECONDS):
            self._said, self._at = now, time.monotonic()
            about = f"{document.get('task_type')} {state(document)} {progress_text(document)}".rstrip()
            self._console.print(Text(printable(about)), soft_wrap=True)


@contextmanager
def count_reporter(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """What to call with (done, total) of something counted, such as images."""
    if console.is_terminal:
        with _bar(console) as bar:
            row = bar.add_task(what, total=None, detail="")

            def show(done: int, total: int) -> None:
                bar.update(row, completed=done, total=total, detail=f"{done}/{total}")

            yield show
    else:
        last = time.monotonic()

        def say(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() >= last + _LINE_SECONDS:
                last = time.monotonic()
                console.print(f"{what} {done}/{total}", markup=False, highlight=False)

        yield say


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        TimeElapsedColumn(),
        console=console,
    )
