"""Documents into HTML: whole pages, and the parts of them that change while somebody looks."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from handlers.store.database import Document
from service.show import number, part, state
from service.web.outcome import outcome_of, training_charts
from service.web.reading import Detail, Situation
from service.web.text import environment
from service.web.view import STATES, TaskLine, model_url, rows_of, task_line, task_url

#: The files in `static/`, and what they are.
_STATIC = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}

#: The parts of a task's page, each sent again when it changes.
TASK_PARTS = ("facts", "curves", "result", "history", "log")

_LEVELS = ("debug", "info", "warning", "error", "critical")


@dataclass(frozen=True)
class StaticFile:
    """A file that every page needs."""

    content: bytes
    media_type: str
    #: Changes with its content, so that a browser may keep it for good.
    mark: str


@dataclass(frozen=True)
class LogLine:
    """A stored log line; one that was cut off has a text only."""

    time: str
    level: str
    attempt: str
    owner: str
    event: str
    rest: str


class Renderer:
    """The templates. Pure: the same documents are the same page."""

    def __init__(self) -> None:
        folder = files("service.web") / "static"
        self.static = {}
        for name, media_type in _STATIC.items():
            content = (folder / name).read_bytes()
            self.static[name] = StaticFile(content, media_type, hashlib.sha256(content).hexdigest()[:16])
        self._templates = environment(lambda: datetime.now(UTC))
        self._templates.globals |= {
            "asset": lambda name: f"/static/{name}?v={self.static[name].mark}",
            "model_url": model_url,
            "task_url": task_url,
            "states": STATES,
        }

    def page(self, template: str, **values: Any) -> str:
        """A whole page."""
        return self._templates.get_template(template).render(**values)

    def _part(self, template: str, **values: Any) -> Markup:
        return Markup(self.page(template, **values))  # noqa: S704 -- templates escape

    # ---- what moves on the pages

    def counts(self, situation: Situation) -> dict[str, str]:
        """The numbers beside the states."""
        told = {f"count:{name}": self._part("part_count.html", value=situation.counts.get(name, 0)) for name in STATES}
        return {**told, "count:ALL": self._part("part_count.html", value=situation.total)}

    def line(self, line: TaskLine) -> dict[str, str]:
        """State and progress of a task in a list."""
        return {
            f"line:{line.word}:state": self._part("part_state.html", line=line),
            f"line:{line.word}:about": self._part("part_about.html", line=line),
        }

    def status(self, line: TaskLine) -> dict[str, str]:
        """State and progress at the head of a task's page, and what a screen reader is told of it: the state alone."""
        return {
            f"task:{line.word}:status": self._part("task_status.html", line=line),
            f"task:{line.word}:said": self._part("part_said.html", line=line),
        }

    def task(self, detail: Detail, situation: Situation) -> dict[str, str]:
        """The other parts of a task's page, by their names in TASK_PARTS."""
        document = detail.row.document
        line = task_line(detail.row, situation)
        result = part(document, "result")
        values: dict[str, Any] = {
            "line": line,
            "task": document,
            "ended": line.state not in ("NEW", "PENDING", "RUNNING"),
            "error": part(document, "error") if line.state != "NEW" else {},
            "result": result if line.state != "NEW" else {},
            "outcome": outcome_of(result if line.state != "NEW" else {}),
            "charts": training_charts(detail.curves, _iterations(document)),
            "history": rows_of(document.get("history"), 100)[::-1] if line.state != "NEW" else [],
            "log": [_log_line(text) for text in detail.log],
            "log_kept": detail.log_kept,
            "made": detail.made,
            "images": part(result, "images"),
            "skipped": rows_of(part(result, "images").get("skipped_examples"), 20),
            "notes": _texts(result.get("notes")),
            "class_names": _texts(result.get("class_names")),
            "params": list(part(document, "param_request").items())[:100],
        }
        return {f"task:{line.word}:{name}": self._part(f"task_{name}.html", **values) for name in TASK_PARTS}


def signature(document: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells that a task's page has to be read again."""
    return (state(dict(document)), *(str(document.get(name))[:100] for name in ("attempt", "end_time", "owner")))


def _iterations(document: Document) -> float:
    return number(part(document, "param_request").get("max_num_iters"))


def _texts(value: Any) -> Sequence[Any]:
    return value[:100] if isinstance(value, list) else ()


def _log_line(text: str) -> LogLine:
    try:
        event: dict[str, Any] = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return LogLine("", "", "", "", text, "")
    time, level, attempt, owner, what = (
        str(event.pop(name, "")) for name in ("timestamp", "level", "attempt", "owner", "event")
    )
    for name in ("task_id", "trace_id", "span_id"):
        event.pop(name, None)
    rest = " ".join(f"{key}={value}" for key, value in event.items())
    return LogLine(time, level if level in _LEVELS else "", attempt, owner, what, rest)
