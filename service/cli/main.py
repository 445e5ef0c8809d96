"""The command itself, and the commands that belong to no task: serve, demo, mongo, doctor, workers."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.text import Text

from service.cli import data, tasks
from service.cli.common import AsJson, load_settings, out, print_json, with_store

app = typer.Typer(
    help="Train and test object detectors from MongoDB. Settings come from the environment (DLTASK_…).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=True,
)
app.add_typer(tasks.app)
app.add_typer(data.datasets, name="dataset")
app.add_typer(data.models, name="models")


def main() -> NoReturn:
    """Run `dltask`: exits 0 for success, 1 for a task that failed or was rejected, 2 for anything wrong with us."""
    try:
        app(prog_name="dltask")
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:
        message = _explained(error)
        if message is None:
            raise
        print(f"dltask: {message}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _explained(error: BaseException) -> str | None:
    """The one line for an error that is no bug of ours, or None."""
    if isinstance(error, SystemExit):
        return None
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    from pydantic import ValidationError

    from handlers.errors import StartupError
    from handlers.store.database import StoreError, brief
    from service.dataset_files import DatasetError
    from service.embedded import EmbeddedMongoError

    if isinstance(error, StoreError):
        return _masked(f"MongoDB does not answer as it should: {brief(error)}; check DLTASK_MONGODB_URI")
    if isinstance(error, ValidationError) and error.title == "Settings":
        first = error.errors(include_url=False)[0]
        if not first["loc"]:  # between settings: it names them itself
            return _masked(first["msg"].removeprefix("Value error, "))
        name = "DLTASK_" + "_".join(str(part) for part in first["loc"][:1]).upper()
        expected = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected").replace("\n", " ")
        return _masked(f"{name} is {str(first['input'])[:200]!r}; {expected}")
    if isinstance(error, StartupError | DatasetError | EmbeddedMongoError):
        return _masked(str(error))
    if isinstance(error, OSError) and error.filename is not None:
        return str(error)  # a folder that cannot be written, say
    return None


def _masked(text: str) -> str:
    from handlers.settings import uri_to_mask
    from handlers.store.database import masked

    return masked(text, uri_to_mask())


@app.command()
def serve(
    once: Annotated[
        bool, typer.Option("--once", help="Run one task and exit; exit too if there is none to take.")
    ] = False,
) -> None:
    """Run the service until SIGTERM."""
    from service import app as service
    from service.settings import Settings

    raise typer.Exit(service.run(Settings(), once=once))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where logs, data and pictures go.")] = Path("demo-output"),
) -> None:
    """Train and test a detector on this machine: embedded MongoDB, sample images, service; no settings needed."""
    from service.cli.demo import run_demo

    raise typer.Exit(run_demo(output))


@app.command()
def mongo(
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 0,
    data_dir: Annotated[Path | None, typer.Option(help="Where the data live; else temporary.")] = None,
) -> None:
    """Run the embedded MongoDB, a one-node replica set, until SIGTERM; print its URI when it accepts writes."""
    import anyio

    from service.cli.until_signal import until_signal
    from service.embedded import embedded_mongo

    async def run() -> None:
        async with embedded_mongo(port, data_dir) as uri:
            print(uri, flush=True)
            await anyio.sleep_forever()

    anyio.run(until_signal, run)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check database, machine, libraries and GPU, each with its fix; exit 2 if something must be mended."""
    import anyio

    from service.cli.doctor import examine
    from service.cli.show import table

    checks = anyio.run(examine, load_settings())
    if as_json:
        print_json([{**vars(check), "ok": check.ok} for check in checks])
    else:
        marks = {"ok": Text("ok", style="green"), "warning": Text("warning", style="yellow")}
        rows = []
        for check in checks:
            rows.append([marks.get(check.state, Text("FAILED", style="red")), check.name, check.found])
            if check.fix:
                rows.append(["", "", f"→ {check.fix}"])
        out().print(table(("", "CHECK", "FOUND"), rows))
    raise typer.Exit(0 if all(check.ok for check in checks) else 2)


@app.command()
def workers(as_json: AsJson = False) -> None:
    """Who is alive, with which devices."""
    from datetime import UTC, datetime

    from service.cli.show import table
    from service.show import age

    found = with_store(lambda store: store.workers.all())
    if as_json:
        print_json(found)
        return
    now = datetime.now(UTC)
    rows = [
        [
            worker["_id"],
            worker.get("host", ""),
            " ".join(f"{number} {kind}" for kind, number in (worker.get("devices") or {}).items()),
            " ".join(str(task) for task in worker.get("running") or ()),
            age(worker.get("renewed_at"), now),
        ]
        for worker in found
    ]
    out().print(table(("WORKER", "HOST", "DEVICES", "RUNNING", "SEEN"), rows) if rows else "no worker is alive")
