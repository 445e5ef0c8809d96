"""Running something until it ends or somebody asks us to stop."""

import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

T = TypeVar("T")


async def until_signal(body: Callable[[], Awaitable[T]]) -> tuple[T | None, int | None]:
    """(what `body` returned, None), or (None, the number of the SIGINT or SIGTERM on which it was cancelled).

    Its clean-up has run by then. Signals count from the start, so that one in the middle of a start ends cleanly too.
    """
    result: T | None = None
    received: int | None = None
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                nonlocal received
                async for number in signals:
                    received = int(number)
                    group.cancel_scope.cancel()
                    return

            group.start_soon(watch)
            result = await body()
            group.cancel_scope.cancel()
    return result, received
