"""What the commands of `dltask` share: settings, the store, what goes to stdout, and how a command gives up."""

import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console

if TYPE_CHECKING:
    from handlers.store import Store
    from service.settings import Settings

T = TypeVar("T")

MAX_TASK_ID = 2**64 - 1

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else.")]
TaskId = Annotated[int, typer.Argument(min=0, max=MAX_TASK_ID, metavar="TASK_ID", show_default=False)]


def fail(message: str) -> NoReturn:
    """Wrong usage: one clear line, exit 2."""
    print(f"dltask: {message}", file=sys.stderr)
    raise typer.Exit(2)


def out() -> Console:
    """Where answers for people go."""
    # Piped into a file or `grep`, a line of a table must not be folded to a terminal's width.
    return Console() if sys.stdout.isatty() else Console(width=250)


def print_json(value: Any) -> None:
    """One JSON document onto stdout."""
    from service.show import json_text

    print(json_text(value))


def load_settings() -> "Settings":
    """The settings, with the log set up as they say. Raises pydantic.ValidationError."""
    from handlers.store.database import masked
    from service import logs
    from service.settings import Settings

    settings = Settings()
    uri = settings.mongodb_uri.get_secret_value()
    logs.configure(settings.log_format, settings.log_level, mask=lambda text: masked(text, uri), stream=sys.stderr)
    return settings


def with_store(body: "Callable[[Store], Awaitable[T]]") -> T:
    """What `body` returns, run over the configured database."""
    import anyio

    from handlers.store import connect_store

    settings = load_settings()

    async def run() -> T:
        async with connect_store(settings.mongodb_uri.get_secret_value(), settings.database) as store:
            return await body(store)

    return anyio.run(run)
