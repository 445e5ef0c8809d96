"""`report.html`: all that a training or a test found, in one file that can be mailed.

It needs no other file and no server: pictures are in it, there is no script, and its own policy lets the browser load
nothing. Every name in it comes from a database and may be anything: jinja2 escapes them all.
"""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from handlers.detection.job import Event, Job, Note, Tested, Trained
from schemas.message import RequestMessage

NAME = "report.html"
#: Bytes of all pictures together, as they stand in the file; those that no longer fit are left out.
MAX_PICTURE_BYTES = 6_000_000
#: Classes with a row of their own.
_MAX_CLASSES = 200
_MAX_TEXT = 200
#: Notes told; a training has a handful.
_MAX_NOTES = 50
#: Pixels: pictures are no wider.
_MAX_WIDTH = 1600
#: Photographs take a tenth of the bytes as JPEG; lines and text are smaller and sharper as they are.
_JPEG_QUALITY = 82
_SMALL_PNG = 300_000

_TEMPLATES = Path(__file__).parent / "templates"


class Notes:
    """Passes events on, and keeps the texts of the notes among them."""

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self.texts: list[str] = []

    def __call__(self, event: Event) -> None:
        """Pass `event` on."""
        if isinstance(event, Note):
            self.texts.append(event.message)
        self._emit(event)


def html_report(job: Job, message: RequestMessage, made: Trained | Tested, notes: Sequence[str]) -> Path:
    """Write what `made` says, with its pictures, to `report.html` in the folder `job.out`; returns the path.

    `notes` are the texts that its reader should know. A few megabytes at most.
    """
    templates = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined)
    templates.filters |= {"text": _text, "share": _share, "count": _count}
    rows = made.metrics.per_class if made.metrics else ()
    html = templates.get_template(NAME).render(
        kind=job.kind,
        job=job,
        info=message.dataset_info,
        classes=[row.name for row in message.class_info],
        made=made,
        metrics=made.metrics,
        rows=rows[:_MAX_CLASSES],
        rows_left_out=max(len(rows) - _MAX_CLASSES, 0),
        has_given=any(row.at_model_threshold for row in rows),
        params=sorted(job.params.items()),
        model=job.model.reference if job.model else job.params.get("model_name", ""),
        notes=notes[:_MAX_NOTES],
        pictures=_pictures(made.reports),
    )
    path = job.out / NAME
    path.write_text(html, encoding="utf-8")
    return path


def _pictures(reports: dict[str, Path]) -> dict[str, str]:
    """Each picture as an address that holds it, by its name without the ending."""
    room, found = MAX_PICTURE_BYTES, {}
    for name, path in reports.items():
        address = _embedded(path)
        if address is not None and len(address) <= room:
            room -= len(address)
            found[Path(name).stem] = address
    return found


def _embedded(path: Path) -> str | None:
    content, kind = path.read_bytes(), "png"
    if len(content) > _SMALL_PNG:
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if image is None:
            return None
        if image.shape[1] > _MAX_WIDTH:
            size = (_MAX_WIDTH, max(round(image.shape[0] * _MAX_WIDTH / image.shape[1]), 1))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        kind, content = "jpeg", cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _text(value: Any) -> str:
    """`value` in one line: no control and direction marks, not endless."""
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    line = "".join(character if character.isprintable() else "\ufffd" for character in str(value)[: _MAX_TEXT + 1])
    return line if len(line) <= _MAX_TEXT else f"{line[:_MAX_TEXT]}…"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _count(value: int) -> str:
    return f"{value:,}"
