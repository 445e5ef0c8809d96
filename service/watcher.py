"""The watcher: change events, turned into a look at once. Losing one costs a sweep interval, and never a task."""

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import anyio
import structlog
from anyio.streams.memory import MemoryObjectSendStream

from handlers.store import Store
from handlers.store.database import StoreError, brief
from handlers.store.stream import Hint, hints
from service.metrics import Metrics

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_PAUSE_SECONDS = 0.5


class Watcher:
    """Opens the stream, sweeps, passes hints on; again after any error, lost history included.

    `new` takes the hints of documents to admit. While it is full the stream waits: its events keep on the server, and
    one that was dropped could be the only hint of a copied document, which no ordinary sweep looks for.
    """

    def __init__(
        self,
        store: Store,
        *,
        new: MemoryObjectSendStream[Hint],
        sweep_all: Callable[[], Awaitable[None]],
        cancel: Callable[[Any], Awaitable[None]],
        wake: Callable[[], None],
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._new = new
        self._sweep_all = sweep_all
        self._cancel = cancel
        self._wake = wake
        self._sweep_due = anyio.Event()
        #: Set while a stream is open.
        self.opened = anyio.Event()

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            try:
                await self._watch()
                self._metrics.stream_ended()
                log.warning("change stream ended")
            except* StoreError as errors:
                first = errors.exceptions[0]
                self._metrics.stream_ended(first if isinstance(first, StoreError) else None)
                log.warning("change stream lost", reason=brief(first))
            except* Exception:
                self._metrics.stream_ended(bug=True)
                log.exception("bug in watcher")
            # While the server is away, opening the stream waits for it; this is for what fails at once.
            await anyio.sleep(_PAUSE_SECONDS)

    async def _watch(self) -> None:
        """One life of the stream, from open to broken."""
        self.opened = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(self._sweep_when_due)
            async with aclosing(hints(self._store.database, self.opened, self._metrics.stream_reached)) as stream:
                async for hint in stream:
                    await self._pass_on(hint)
            group.cancel_scope.cancel()

    async def _sweep_when_due(self) -> None:
        """Open first, then sweep: what is inserted in between is seen twice, and nothing is missed."""
        await self.opened.wait()
        self._metrics.stream_opened()
        log.info("change stream opened")
        while True:
            # Before the sweep, so that what is dropped during one has the next one; beside the stream, which goes on.
            self._sweep_due = anyio.Event()
            await self._sweep_all()
            await self._sweep_due.wait()
            log.warning("collection dropped or renamed")

    async def _pass_on(self, hint: Hint) -> None:
        if hint.tables:
            self._metrics.hinted("tables")
            self._sweep_due.set()
        elif hint.new:
            self._metrics.hinted("new")
            await self._new.send(hint)
        elif hint.cancel:
            self._metrics.hinted("cancel")
            await self._cancel(hint.key)
        else:
            self._metrics.hinted("pending")
            self._wake()
