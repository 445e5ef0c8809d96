"""What moves on open pages, by server-sent events.

However many look, the database is asked once a second at most, by one task of the worker's, and not at all while nobody
looks. A page is sent the parts that changed, as HTML; one that takes them slowly gets only the newest, so nothing piles
up. Whoever takes none at all is let go.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import anyio
import structlog
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from handlers.store.database import StoreError, brief
from handlers.store.overview import Row
from service.show import state
from service.web.reading import Reading, Situation
from service.web.render import Renderer, signature
from service.web.view import task_line

log: structlog.stdlib.BoundLogger = structlog.get_logger()

#: Pages that are open at once and move; one more is told to do without.
MOST_VIEWERS = 32
#: Tasks that one page follows.
MOST_FOLLOWED = 80

_POLL_SECONDS = 1.0
#: Polls between two looks at the curves and the log of a task that runs, and for which that goes on after a change.
_DETAIL_POLLS, _LAST_POLLS = 3, 10
#: Seconds without news after which a page hears that we are still here: proxies close what is silent.
_QUIET_SECONDS = 15.0
#: Seconds that a page may take for what it is sent.
_SEND_SECONDS = 20.0

AWAY = "The database does not answer; what you see may be old."


class Full(Exception):
    """So many look that no more can."""


@dataclass(frozen=True)
class Wanted:
    """What one page shows: the numbers of the tasks in its list, and that of its task."""

    listed: frozenset[int] = frozenset()
    task: int | None = None


@dataclass(eq=False)
class Viewer:
    """One open page."""

    wanted: Wanted
    #: What it was sent last, by name of the part.
    sent: dict[str, str] = field(default_factory=dict)
    news: anyio.Event = field(default_factory=anyio.Event)

    def wants(self, name: str) -> bool:
        """Whether a part is on this page."""
        kind, _, rest = name.partition(":")
        word = rest.partition(":")[0]
        if kind == "task":
            return word == str(self.wanted.task)
        return kind != "line" or (word.isdigit() and int(word) in self.wanted.listed)


@dataclass(frozen=True)
class _Read:
    """What the page of a task was made of: its document's signature, the poll of that, and the first with it."""

    signature: tuple[str, ...]
    at: int
    since: int


class Live:
    """Everybody who looks, and the one poll for them all."""

    def __init__(self, reading: Reading, renderer: Renderer) -> None:
        self._reading = reading
        self._renderer = renderer
        self._viewers: set[Viewer] = set()
        self._somebody = anyio.Event()
        self._parts: dict[str, str] = {}
        self._read: dict[int, _Read] = {}
        self._polls = 0
        self.closed = False

    async def run(self) -> None:
        """Poll while somebody looks, until cancelled."""
        while True:
            if not self._viewers:
                self._parts, self._read = {}, {}
                self._somebody = anyio.Event()
                await self._somebody.wait()
            try:
                await self._poll()
                self._parts["away"] = ""
            except StoreError as error:
                log.info("page not updated", reason=brief(error))
                self._parts["away"] = AWAY
            except Exception:
                # A document that nobody thought of: whoever looks must not end the worker that it is looked at on.
                log.exception("bug in page")
            for viewer in self._viewers:
                viewer.news.set()
            await anyio.sleep(_POLL_SECONDS)

    @contextmanager
    def joined(self, wanted: Wanted) -> Iterator[Viewer]:
        """A page that is open inside this context. Raises Full."""
        if self.closed or len(self._viewers) >= MOST_VIEWERS:
            raise Full
        viewer = Viewer(wanted)
        self._viewers.add(viewer)
        self._somebody.set()
        try:
            yield viewer
        finally:
            self._viewers.discard(viewer)

    def close(self) -> None:
        """Let all go: the worker ends."""
        self.closed = True
        for viewer in self._viewers:
            viewer.news.set()

    def changes(self, viewer: Viewer) -> dict[str, str]:
        """The parts on its page that are not as they were sent last."""
        mine = {name: html for name, html in self._parts.items() if viewer.wants(name)}
        changed = {name: html for name, html in mine.items() if viewer.sent.get(name) != html}
        viewer.sent |= changed
        return changed

    async def _poll(self) -> None:
        self._polls += 1
        situation = await self._reading.situation()
        parts: dict[str, str] = dict(self._renderer.counts(situation))
        tasks = {viewer.wanted.task for viewer in self._viewers if viewer.wanted.task is not None}
        listed = tasks.union(*(viewer.wanted.listed for viewer in self._viewers))
        rows = await self._reading.store.overview.numbered(listed) if listed else []
        for row in rows:
            parts |= self._renderer.line(task_line(row, situation))
        self._read = {number: read for number, read in self._read.items() if number in tasks}
        for row in rows:
            if row.reference.isdigit() and (number := int(row.reference)) in tasks:
                parts |= await self._task(number, row, situation)
        # Of a task that is gone, or not read again now, the last word stands.
        together = {**self._parts, **parts}
        self._parts = {
            name: html for name, html in together.items() if any(viewer.wants(name) for viewer in self._viewers)
        }

    async def _task(self, number: int, row: Row, situation: Situation) -> dict[str, str]:
        """The parts of a task's page: its state each time, the rest when it may have changed."""
        now = signature(row.document)
        last = self._read.get(number)
        since = self._polls if last is None or last.signature != now else last.since
        # The last lines of an attempt are stored just after its end.
        moves = state(row.document) == "RUNNING" or self._polls <= since + _LAST_POLLS
        due = last is None or since == self._polls or (moves and self._polls >= last.at + _DETAIL_POLLS)
        parts = self._renderer.status(task_line(row, situation))
        if due and (detail := await self._reading.detail(str(number))):
            self._read[number] = _Read(now, at=self._polls, since=since)
            parts |= self._renderer.task(detail, situation)
        return parts


class EventStream(Response):
    """The answer to a page that wants to know: `data: {name of the part: its HTML}`, until it is closed."""

    def __init__(self, live: Live, wanted: Wanted) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._live = live
        self._wanted = wanted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what changes until the page is closed, or takes nothing any more, or the worker ends."""
        try:
            with self._live.joined(self._wanted) as viewer:
                await self._stream(viewer, receive, send)
        except Full:
            await PlainTextResponse("too many pages are open\n", status_code=503)(scope, receive, send)

    async def _stream(self, viewer: Viewer, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with anyio.create_task_group() as group:
            group.start_soon(self._until_gone, receive, group.cancel_scope)
            # What is not taken in this time is for nobody.
            with anyio.move_on_after(_SEND_SECONDS) as patience:
                await _send(send, "retry: 3000\n\n")
                while not self._live.closed:
                    text = await self._next(viewer, patience)
                    patience.deadline = anyio.current_time() + _SEND_SECONDS
                    await _send(send, text)
            group.cancel_scope.cancel()
        with anyio.move_on_after(1):
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self, viewer: Viewer, patience: anyio.CancelScope) -> str:
        patience.deadline = float("inf")
        while not (changed := self._live.changes(viewer)):
            with anyio.move_on_after(_QUIET_SECONDS) as quiet:
                await viewer.news.wait()
            if quiet.cancelled_caught or self._live.closed:
                return ": still here\n\n"
            viewer.news = anyio.Event()
        return f"data: {json.dumps(changed)}\n\n"

    @staticmethod
    async def _until_gone(receive: Receive, scope: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()


async def _send(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
