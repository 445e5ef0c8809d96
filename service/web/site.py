"""All that a worker serves over HTTP, put together: the probes, the metrics, the page."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import anyio

from handlers.store import Store
from service.gpus import Gpus
from service.metrics import Metrics
from service.settings import Settings
from service.web.guard import is_loopback
from service.web.live import Live
from service.web.metrics import keep_reading, metrics_routes
from service.web.page import Pages
from service.web.probes import probe_routes
from service.web.reading import Reading
from service.web.render import Renderer
from service.web.server import http_server


@asynccontextmanager
async def site(
    settings: Settings,
    store: Store,
    metrics: Metrics,
    *,
    environment: Mapping[str, str],
    why_not_ready: Callable[[], str],
    look: Callable[[], None],
) -> AsyncIterator[None]:
    """Serve inside this context, unless the port is `off`.

    `environment` is that of programs that are started; `why_not_ready` says why this worker accepts no work now, or
    nothing; `look` brings the metrics of the worker itself up to date.
    """
    if settings.http_port == "off":
        yield
        return
    reading, renderer = Reading(store), Renderer()
    live = Live(reading, renderer)
    pages = Pages(reading, renderer, live, local=is_loopback(settings.http_host))
    routes = [*probe_routes(why_not_ready), *metrics_routes(metrics, Gpus(environment), look), *pages.routes()]
    async with anyio.create_task_group() as group:
        group.start_soon(keep_reading, store, metrics)
        group.start_soon(live.run)
        async with http_server(routes, settings.http_host, settings.http_port):
            try:
                yield
            finally:
                # First: the server waits for its answers, and those to open pages never end by themselves.
                live.close()
        group.cancel_scope.cancel()
