"""The page: what an operator and a maker of models look at in the browser. Read-only, and it disturbs no work.

Every page is one bounded read of the database and one template. Only a few are read at once; the others wait a moment,
and are then told to come again. Everybody may look who can reach the port: see docs/page.md.
"""

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlencode

import anyio
import structlog
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Route

from handlers.store.database import StoreError, brief
from handlers.store.files import FileMissing
from handlers.store.overview import PAGE_ROWS
from schemas.numbers import UINT64_MAX
from schemas.task import object_id
from service import model_card
from service.web.guard import REPORT_POLICY, Guard
from service.web.live import MOST_FOLLOWED, EventStream, Live, Wanted
from service.web.models_view import compared, versions_chart
from service.web.reading import Reading
from service.web.render import Renderer
from service.web.view import STATES, task_line
from service.web.workers_view import worker_line

log: structlog.stdlib.BoundLogger = structlog.get_logger()

#: Pages read at once, and seconds that one waits for its turn.
_READERS = 4
_TURN_SECONDS = 5.0
#: Bytes of a report file; pictures have a few millions.
_MOST_BYTES = 24 * 2**20
#: Names of models on one page, and versions of one model.
_MODELS = 50
_VERSIONS = 200
#: The last page that is read: an index is gone through to get there.
_LAST_PAGE = 100_000

_IMAGES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
#: How `report.html` begins; whatever else begins like this is as harmless under REPORT_POLICY.
_REPORT = b"<!doctype html>\n"

Handler = Callable[[Request], Awaitable[Response]]


class NotHere(Exception):
    """There is no such thing; the message is for people."""


class Pages:
    """The handlers of all pages; `local`: only this machine reaches them."""

    def __init__(self, reading: Reading, renderer: Renderer, live: Live, *, local: bool) -> None:
        self._reading = reading
        self._renderer = renderer
        self._live = live
        self._local = local
        self._turns = anyio.Semaphore(_READERS)

    def routes(self) -> list[BaseRoute]:
        """Every route of the page, with its headers."""
        read: dict[str, Handler] = {
            "/": self._queue,
            "/tasks/{word}": self._task,
            "/models": self._models,
            "/models/{name:path}": self._model,
            "/workers": self._workers,
            "/reports/{file_id}": self._report,
        }
        at_once: dict[str, Handler] = {"/events": self._events, "/static/{name}": self._static}
        guard = [Middleware(Guard, local=self._local)]
        return [
            *(Route(path, self._turn(handler), methods=["GET"], middleware=guard) for path, handler in read.items()),
            *(Route(path, handler, methods=["GET"], middleware=guard) for path, handler in at_once.items()),
        ]

    def _turn(self, handler: Handler) -> Handler:
        """`handler` when it is its turn, and its errors as pages."""

        async def answer(request: Request) -> Response:
            try:
                with anyio.fail_after(_TURN_SECONDS):
                    await self._turns.acquire()
            except TimeoutError:
                return self._plain(503, "Too many pages are being read", "Try again in a moment.")
            try:
                return await handler(request)
            except NotHere as error:
                return self._plain(404, "Not found", str(error))
            except StoreError as error:
                log.info("page not read", path=request.url.path[:200], reason=brief(error))
                return self._plain(
                    503, "The database does not answer", "This worker goes on trying; reload in a moment."
                )
            except Exception:
                # The one broad catch: a document that nobody thought of costs its page, and is told of in the log.
                log.exception("bug in page", path=request.url.path[:200])
                return self._plain(500, "This page cannot be shown", "It is a fault of dltask; the log has the reason.")
            finally:
                self._turns.release()

        return answer

    def _html(self, template: str, **values: Any) -> Response:
        return HTMLResponse(self._renderer.page(template, **values), headers={"cache-control": "no-store"})

    def _plain(self, status: int, title: str, text: str) -> Response:
        response = self._html("plain.html", title=title, text=text, here="")
        response.status_code = status
        if status == 503:
            response.headers["retry-after"] = "5"
        return response

    # ---- pages

    async def _queue(self, request: Request) -> Response:
        state = request.query_params.get("state")
        if state is not None and state not in STATES:
            raise NotHere(f"There is no such state; expected one of {', '.join(STATES)}.")
        number = _page_number(request)
        situation = await self._reading.situation()
        page = await self._reading.store.overview.page(state, number)
        first = state is None and number == 1
        shown = [*page.rows, *(situation.running if first else ()), *(situation.waiting[:5] if first else ())]
        return self._html(
            "queue.html",
            here="queue",
            state=state,
            number=number,
            more=page.more,
            first_row=(number - 1) * PAGE_ROWS + 1,
            lines=[task_line(row, situation) for row in page.rows],
            running=[task_line(row, situation) for row in situation.running] if first else [],
            waiting=[task_line(row, situation) for row in situation.waiting[:5]] if first else [],
            total=situation.total if state is None else situation.counts.get(state, 0),
            parts=self._renderer.counts(situation),
            now=situation.now,
            events=_events_url(rows=",".join(sorted({row.reference for row in shown if row.reference.isdigit()}))),
        )

    async def _task(self, request: Request) -> Response:
        word = request.path_params["word"]
        detail = await self._reading.detail(word)
        if detail is None:
            raise NotHere("There is no such task. Its number may be wrong, or it was deleted.")
        situation = await self._reading.situation()
        line = task_line(detail.row, situation)
        return self._html(
            "task.html",
            here="queue",
            line=line,
            parts=self._renderer.status(line) | self._renderer.task(detail, situation),
            now=situation.now,
            events=_events_url(task=line.word) if line.word.isdigit() else "",
        )

    async def _models(self, request: Request) -> Response:
        number = _page_number(request)
        skip = (number - 1) * _MODELS
        found = await self._reading.store.models.newest_of_each(skip, _MODELS + 1)
        return self._html(
            "models.html", here="models", models=found[:_MODELS], more=len(found) > _MODELS, number=number
        )

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        models = self._reading.store.models
        with self._reading.store.database.looking():
            versions = await models.versions(name, _VERSIONS)
            if not versions:
                raise NotHere("There is no model of this name.")
            known = {str(version.get("version")): version.get("version") for version in versions}
            numbers = list(known)
            newer = request.query_params.get("b", numbers[0])
            older = request.query_params.get("a", numbers[1] if len(numbers) > 1 else numbers[0])
            if newer not in known or older not in known:
                raise NotHere("There is no such version of this model.")
            before = await models.per_class(name, known[older])
            after = await models.per_class(name, known[newer])
            shown = await models.with_card(name, known[newer])
        return self._html(
            "model.html",
            here="models",
            name=name,
            versions=versions,
            numbers=numbers,
            older=older,
            newer=newer,
            rows=compared(before, after),
            card=model_card.facts(shown) if shown else {},
            chart=versions_chart(versions),
            limited=len(versions) == _VERSIONS,
        )

    async def _workers(self, request: Request) -> Response:
        situation = await self._reading.situation()
        lines = [worker_line(worker) for worker in situation.workers]
        return self._html("workers.html", here="workers", workers=lines, now=situation.now)

    # ---- files and events

    async def _report(self, request: Request) -> Response:
        word = request.path_params["file_id"]
        file_id = object_id(word)
        if file_id is None:
            raise NotHere("There is no such report.")
        try:
            content = await self._reading.store.files.reports.read(file_id, _MOST_BYTES)
        except FileMissing:
            raise NotHere("There is no such report, or not all of it.") from None
        # By what it is, never by what somebody called it.
        media_type = next((kind for magic, kind in _IMAGES.items() if content.startswith(magic)), None)
        # A file never changes under its id.
        headers = {"cache-control": "private, max-age=31536000, immutable", "etag": f'"{file_id}"'}
        if content.startswith(_REPORT):
            media_type = "text/html; charset=utf-8"
            headers["content-security-policy"] = REPORT_POLICY
        if media_type is None:
            headers["content-disposition"] = f'attachment; filename="{file_id}"'
        return Response(content, media_type=media_type or "application/octet-stream", headers=headers)

    async def _events(self, request: Request) -> Response:
        wanted = Wanted(
            listed=frozenset(_numbers(request.query_params.get("rows", ""))[:MOST_FOLLOWED]),
            task=next(iter(_numbers(request.query_params.get("task", ""))), None),
        )
        return EventStream(self._live, wanted)

    async def _static(self, request: Request) -> Response:
        file = self._renderer.static.get(request.path_params["name"])
        if file is None:
            return Response("not found\n", status_code=404, media_type="text/plain")
        # Under its mark it never changes; without, somebody typed the address.
        fresh = request.query_params.get("v") == file.mark
        headers = {"cache-control": "public, max-age=31536000, immutable" if fresh else "no-cache"}
        return Response(file.content, media_type=file.media_type, headers=headers)


def _page_number(request: Request) -> int:
    text = request.query_params.get("page", "1")
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= 6 else 0
    if not 1 <= number <= _LAST_PAGE:
        raise NotHere(f"There is no such page; expected a number from 1 to {_LAST_PAGE}.")
    return number


def _numbers(text: str) -> list[int]:
    words = [word for word in text[:4000].split(",") if word.isascii() and word.isdigit() and len(word) <= 20]
    return [number for number in map(int, words) if number <= UINT64_MAX]


def _events_url(**wanted: str) -> str:
    return f"/events?{urlencode(wanted)}"
