"""Lines of the task list, as templates show them. Nothing here reads; every value of a document may be anything."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from handlers.store.database import Document
from handlers.store.overview import NEW, Row
from schemas.enums import TaskStatus
from service.show import number, outcome_text, part, progress_text, state, task_number, why_waiting
from service.web.reading import Situation

#: The states in the order of a task's life; what else stands in a document's `status` is shown as it is.
STATES = (NEW, *(status.name for status in TaskStatus))


@dataclass(frozen=True)
class Progress:
    """How far a task is: `value` of `most` iterations, or images of a test."""

    value: float
    most: float

    @property
    def percent(self) -> int:
        """0 … 100."""
        return int(100 * self.value / self.most)


@dataclass(frozen=True)
class TaskLine:
    """One task in a list."""

    #: `Row.reference`; empty for one that has no page.
    word: str
    number: str
    kind: Any
    model: Any
    state: str
    #: Class of the state in the style sheet.
    chip: str
    created: Any
    #: Why it waits, how far it is, or what came of it.
    about: str
    progress: Progress | None

    @property
    def url(self) -> str:
        """Its page."""
        return f"/tasks/{self.word}" if self.word else ""


def task_line(row: Row, situation: Situation) -> TaskLine:
    """The line of one task."""
    document = row.document
    now = state(document)
    return TaskLine(
        word=row.reference,
        number=task_number(document.get("task_id")) or "(none)",
        kind=document.get("task_type"),
        model=part(document, "param_request").get("model_name"),
        state=now,
        chip=now.lower() if now in STATES else "other",
        created=document.get("create_time") if now != NEW else None,
        about=_about(document, now, situation),
        progress=_progress(document) if now in ("RUNNING", "PENDING") else None,
    )


def _about(document: Document, now: str, situation: Situation) -> str:
    if now in (NEW, "PENDING"):
        queue = [row.document for row in situation.waiting]
        counted = situation.counts.get("PENDING", 0)
        return why_waiting(document, queue, situation.workers, situation.now, waiting=counted)
    if now == "RUNNING":
        return progress_text(document) or "starting: the data are being made ready"
    return outcome_text(document)


def _progress(document: Document) -> Progress | None:
    progress = part(document, "progress")
    value, most = number(progress.get("iteration")), number(progress.get("max_num_iters"))
    # Before its first word a test has the total of a training.
    return Progress(min(value, most), most) if value > 0 and most > 0 else None


def model_url(name: Any) -> str:
    """The page of a model by its name; empty for what is no name."""
    return f"/models/{quote(name, safe='')}" if isinstance(name, str) and 0 < len(name) <= 200 else ""


def task_url(task_id: Any) -> str:
    """The page of the task with this number; empty for what is none."""
    text = task_number(task_id)
    return f"/tasks/{text}" if text.isascii() and text.isdigit() else ""


def rows_of(value: Any, most: int) -> list[Mapping[str, Any]]:
    """The documents in a list of documents, up to `most`; of anything else none."""
    return [row for row in value[:most] if isinstance(row, Mapping)] if isinstance(value, list) else []
