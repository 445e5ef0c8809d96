"""The HTTP server inside the worker: one small Starlette application on uvicorn, on the worker's own event loop."""

import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import anyio
import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.routing import BaseRoute

log: structlog.stdlib.BoundLogger = structlog.get_logger()

#: Seconds that requests in progress get at the end; streams of events never end by themselves.
_CLOSE_SECONDS = 1


class _Server(uvicorn.Server):
    """uvicorn, but the worker's own signals stay its own: SIGTERM drains it, and it is served to the end of that."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


@asynccontextmanager
async def http_server(routes: Sequence[BaseRoute], host: str, port: int) -> AsyncIterator[None]:
    """Serve `routes` on `host:port` (0: any free port) inside this context.

    A port that cannot be had is logged, and the work goes on without: it does not need anybody to look at it.
    """
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        log.warning("http not served", host=host, port=port, reason=str(error))
        yield
        return
    with listening:
        config = uvicorn.Config(
            Starlette(routes=routes),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_CLOSE_SECONDS,
        )
        server = _Server(config)
        log.info("http served", host=host, port=listening.getsockname()[1])
        async with anyio.create_task_group() as group:
            group.start_soon(server.serve, [listening])
            try:
                yield
            finally:
                server.should_exit = True
