"""`dltask submit`, `status`, `wait`, `cancel`, `logs`, `report`: one task from its document to its pictures."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from service.cli.common import MAX_TASK_ID, AsJson, TaskId, fail, out, print_json, with_store

if TYPE_CHECKING:
    from handlers.store import Store

app = typer.Typer()


@app.command()
def submit(
    task_type: Annotated[str, typer.Argument(metavar="train|test", show_default=False)],
    model_name: Annotated[str, typer.Option(help="The model to train (NAME:VERSION begins with that one) or to test.")],
    dataset: Annotated[str, typer.Option(help="The data set to use.")],
    split: Annotated[str | None, typer.Option(help="Else `test`, or all but that for a training.")] = None,
    param: Annotated[list[str] | None, typer.Option(metavar="FIELD=VALUE", help="A parameter; repeatable.")] = None,
    mirror: Annotated[bool, typer.Option(help="A training mirrors half of its images, left to right.")] = True,
    task_id: Annotated[int | None, typer.Option(min=0, max=MAX_TASK_ID, help="Else a fresh one.")] = None,
    wait_for_it: Annotated[bool, typer.Option("--wait", help="Follow the task to its end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Insert a task document; print its task_id."""
    from schemas.numbers import bson_uint64

    if task_type not in ("train", "test"):
        fail(f"the task type is {task_type!r}; expected train or test")
    params = _params(param or [])
    if "model_name" in params:
        fail("--param model_name=… is --model-name")
    document: dict[str, Any] = {"task_type": task_type.upper(), "param_request": {"model_name": model_name, **params}}
    document |= {"dataset": dataset} | ({"split": split} if split is not None else {})
    document |= {} if mirror else {"mirror": False}
    # Microseconds since 1970: unique for one person at a keyboard, and below 2^53, so that any client reads it exactly.
    number = time.time_ns() // 1000 if task_id is None else task_id

    async def insert(store: "Store") -> int:
        await store.indexes.create("DL_TASK")
        chosen = number
        while not await store.tasks.insert({"task_id": bson_uint64(chosen), **document}):
            if task_id is not None:
                fail(f"task_id {task_id} is already used; choose another one, or none for a fresh one")
            chosen += 1
        return chosen

    chosen = with_store(insert)
    if wait_for_it:
        wait(chosen, as_json)
    elif as_json:
        print_json({"task_id": chosen})
    else:
        print(chosen)


def _params(pairs: list[str]) -> dict[str, Any]:
    """`field=value` pairs as a document; whether the values are good is for admission to say."""
    from schemas.params import PARAM_ALIASES, ParamClass

    params: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            fail(f"--param {pair!r}; expected field=value")
        known = PARAM_ALIASES.get(name, name)
        if known not in ParamClass.__dataclass_fields__:
            fail(f"--param {name!r} is not a parameter; expected one of {', '.join(ParamClass.__dataclass_fields__)}")
        if known in params:
            fail(f"--param {name} is given twice")
        params[known] = _value(known, text)
    return params


def _value(field: str, text: str) -> Any:
    from bson import Int64

    from schemas.numbers import INT64_MAX, bson_uint64

    if field in ("model_name", "net_model"):
        return text  # a model may be called 123
    try:
        value = json.loads(text)
    except ValueError:
        return [part.strip() for part in text.split(",")] if field == "dataset_expansion_lst" else text
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > INT64_MAX:
        # Decimal128 holds 34 digits; what is longer goes as text, for admission to refuse with its reason.
        return bson_uint64(value) if 0 < value < 10**34 else text
    return Int64(value) if type(value) is int else value


@app.command()
def status(
    task_id: Annotated[int | None, typer.Argument(min=0, max=MAX_TASK_ID, show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most tasks in the list.")] = 50,
    as_json: AsJson = False,
) -> None:
    """What runs, what waits and why, and what ended last; or one task in detail."""
    from service.cli.show import task_table, tasks_table

    async def read(store: "Store") -> tuple[Any, Any, Any, Any]:
        found = await (store.overview.listed(limit) if task_id is None else _task(store, task_id))
        return found, await store.overview.queue(), await store.workers.all(), await store.overview.total()

    found, (queue, waiting), alive, total = with_store(read)
    if as_json:
        print_json(found)
    elif task_id is not None:
        out().print(task_table(found, queue, alive, waiting=waiting))
    elif not found:
        print("no tasks; `dltask submit` inserts one")
    else:
        out().print(tasks_table(found, queue, alive, waiting=waiting))
        if total > limit:
            print(f"… of {total} tasks in all", file=sys.stderr)


async def _task(store: "Store", task_id: int) -> dict[str, Any]:
    from schemas.numbers import bson_uint64

    found = await store.tasks.get(bson_uint64(task_id))
    if found is None:
        fail(f"there is no task {task_id}; see `dltask status`")
    return found


@app.command()
def wait(task_id: TaskId, as_json: AsJson = False) -> None:
    """Follow a task to its end; exit 1 unless it succeeded."""
    from service.cli.follow import follow, task_reporter
    from service.cli.show import classes_table
    from service.show import outcome_text, part, printable, state

    # With --json stdout is for the document alone, so a bar goes to stderr, and lines nowhere.
    console = Console(stderr=True) if as_json else out()
    with task_reporter(console, quiet=as_json) as report:
        document = with_store(lambda store: follow(store, task_id, report))
    if document is None:
        fail(f"there is no task {task_id}; see `dltask status`")
    if as_json:
        print_json(document)
    else:
        console.print(Text(printable(f"{state(document)} {outcome_text(document)}".rstrip())), soft_wrap=True)
        metrics = part(part(document, "result"), "metrics")
        if isinstance(metrics.get("per_class"), list):
            console.print(classes_table(metrics))
    raise typer.Exit(0 if state(document) == "SUCCEEDED" else 1)


@app.command()
def cancel(task_id: TaskId) -> None:
    """Ask for a task to be cancelled."""
    from schemas.enums import END_STATES
    from schemas.numbers import bson_uint64
    from service.show import state

    async def ask(store: "Store") -> str:
        found = await _task(store, task_id)
        await store.tasks.request_cancel(bson_uint64(task_id))
        return state(found)

    before = with_store(ask)
    if before in {end.name for end in END_STATES}:
        print(f"task {task_id} has already ended: {before}")
    else:
        print(f"task {task_id} ({before}) is being cancelled")


@app.command()
def logs(
    task_id: TaskId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the task has ended.")] = False,
    as_json: AsJson = False,
) -> None:
    """One task's story: its states and its log lines, over all workers and attempts."""
    from service.cli.story import entry_text, tell

    entries: list[Any] = []

    def say(entry: Any) -> None:
        if as_json:
            entries.append(entry)
        else:
            print(entry_text(entry), flush=True)

    if not with_store(lambda store: tell(store, task_id, say, follow=follow)):
        fail(f"there is no task {task_id}; see `dltask status`")
    if as_json:
        print_json(entries)


@app.command()
def report(task_id: TaskId, folder: Annotated[Path, typer.Argument(metavar="DIR")], as_json: AsJson = False) -> None:
    """Write the pictures of a task, and report.html with all of them, into DIR; print their paths."""
    from service.cli.fetch import fetch_reports

    async def fetch(store: "Store") -> list[Path]:
        return await fetch_reports(store, await _task(store, task_id), folder)

    paths = with_store(fetch)
    if as_json:
        print_json(paths)
    elif paths:
        print("\n".join(map(str, paths)))
    else:
        print(f"task {task_id} has no pictures", file=sys.stderr)
