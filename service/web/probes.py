"""`/livez` and `/readyz`, as Kubernetes asks for them."""

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route


def probe_routes(why_not_ready: Callable[[], str]) -> list[Route]:
    """The probes; `why_not_ready` says why this worker accepts no work now, or nothing if it does."""

    async def livez(request: Request) -> Response:
        # Only that the event loop turns. Never the database: a restart of every worker mends no outage of MongoDB.
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        reason = why_not_ready()
        return PlainTextResponse(f"{reason or 'ok'}\n", status_code=503 if reason else 200)

    return [Route("/livez", livez), Route("/readyz", readyz)]
