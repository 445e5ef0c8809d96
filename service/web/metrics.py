"""`/metrics`, as Prometheus scrapes it. It never waits for MongoDB: see `keep_reading`."""

from collections.abc import Callable

import anyio
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from handlers.store import Store
from handlers.store.database import StoreError
from handlers.store.queue import Queue
from service.gpus import Gpus
from service.metrics import Metrics

log: structlog.stdlib.BoundLogger = structlog.get_logger()

#: Seconds between two looks at the queue, however often somebody scrapes.
_READ_SECONDS = 5.0


def metrics_routes(metrics: Metrics, gpus: Gpus, look: Callable[[], None]) -> list[Route]:
    """The route; `look` has this worker tell `metrics` what it has and does."""

    async def show(request: Request) -> Response:
        look()
        metrics.gpus(await gpus.read())
        text, media_type = metrics.text()
        return Response(text, media_type=media_type)

    return [Route("/metrics", show)]


async def keep_reading(store: Store, metrics: Metrics, *, every_seconds: float = _READ_SECONDS) -> None:
    """Look at the queue from time to time, until cancelled.

    Beside the scrapes and not in them: while the database is away one look takes its whole time-out, and a call of
    PyMongo cannot be given up in the middle.
    """
    queue = Queue(store.database)
    while True:
        try:
            metrics.queue_read(await queue.read())
        except StoreError:
            # The sweep beside it has a line for it.
            metrics.queue_unread()
        except Exception:
            metrics.queue_unread()
            log.exception("bug in look at queue")
        await anyio.sleep(every_seconds)
