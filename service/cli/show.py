"""Tables for the terminal, by Rich. What they say is in `service.show`. Nothing here reads or prints."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from handlers.store.database import Document
from service.show import (
    age,
    iso,
    json_text,
    number,
    outcome_text,
    part,
    printable,
    progress_text,
    state,
    task_number,
    why_waiting,
)

#: Colour of each state.
_STYLES = {"SUCCEEDED": "green", "FAILED": "red", "REJECTED": "red", "CANCELLED": "yellow", "RUNNING": "cyan"}


def state_text(document: Document) -> Text:
    """The state, in its colour."""
    current = state(document)
    return Text(printable(current), style=_STYLES.get(current, ""))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> Table:
    """A table whose cells cannot carry markup or control characters; numbers stand to the right."""
    rows = [list(row) for row in rows]
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        # On a narrow terminal long texts fold; numbers and names stay whole, so that they can be copied.
        short = all(len(printable(row[index])) <= 20 for row in rows)
        made.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=short)
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(printable(cell)) for cell in row))
    return made


def tasks_table(
    tasks: Sequence[Document], queue: Sequence[Document], workers: Sequence[Document], *, waiting: int
) -> Table:
    """One line a task. `queue`: the first of those that wait, best first; `waiting`: how many there are."""
    now = datetime.now(UTC)
    rows = []
    for task in tasks:
        model = part(task, "param_request").get("model_name", "")
        why = why_waiting(task, queue, workers, now, waiting=waiting)
        about = why or (progress_text(task) if state(task) == "RUNNING" else outcome_text(task))
        kind, when = task.get("task_type", ""), age(task.get("create_time"), now)
        rows.append([task_number(task.get("task_id")), kind, model, state_text(task), when, about])
    return table(("TASK", "TYPE", "MODEL", "STATE", "AGE", ""), rows)


def task_table(task: Document, queue: Sequence[Document], workers: Sequence[Document], *, waiting: int) -> Table:
    """One task, a field a line; `queue` and `waiting` as above."""
    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column(style="bold")
    made.add_column(overflow="fold")

    def line(name: str, value: Any) -> None:
        if value not in (None, "", [], {}):
            made.add_row(name, value if isinstance(value, Text) else Text(printable(value)))

    line("task", task_number(task.get("task_id")))
    line("type", task.get("task_type"))
    line("state", state_text(task))
    line("waits", why_waiting(task, queue, workers, datetime.now(UTC), waiting=waiting))
    line("progress", progress_text(task))
    line("outcome", outcome_text(task))
    line("field", part(task, "error").get("field"))
    line("error_code", task.get("error_code"))
    line("attempt", task.get("attempt"))
    line("owner", task.get("owner"))
    for name in ("dataset", "split", "json_mongodb_id"):
        line(name, task.get(name))
    for name in ("create_time", "start_time", "end_time"):
        time = task.get(name)
        line(name, iso(time) if isinstance(time, datetime) else time)
    params = task.get("param_request")
    line("parameters", json_text(params) if params else None)
    if result := part(task, "result"):
        for name in ("device", "seconds", "initial_weights", "resumed_from_iteration", "images_per_second"):
            value = result.get(name)
            line(name, round(value, 2) if isinstance(value, float) else value)
        images = part(result, "images")
        line("images", f"{images.get('used')} used, {images.get('skipped')} skipped")
        notes = result.get("notes")
        for note in notes if isinstance(notes, list) else ():
            line("note", note)
        line("reports", ", ".join(part(result, "reports")))
    history = task.get("history") if state(task) != "NEW" else None
    for change in history if isinstance(history, list) else ():
        if isinstance(change, Mapping):
            what = " ".join(f"{key}={value}" for key, value in change.items() if key not in ("at", "status"))
            at = change.get("at")
            line("history", f"{iso(at) if isinstance(at, datetime) else at} {change.get('status')} {what}")
    return made


def classes_table(metrics: Mapping[str, Any]) -> Table:
    """Average precision of each class. Detections are left out: COCO counts those of the lowest score too."""
    rows = [
        [
            entry.get("class_name"),
            entry.get("instances"),
            *("–" if entry.get(name) is None else f"{number(entry[name]):.3f}" for name in ("map", "map_50")),
        ]
        for entry in metrics.get("per_class", ())
        if isinstance(entry, Mapping)
    ]
    return table(("CLASS", "BOXES", "mAP", "mAP@.5"), rows)
