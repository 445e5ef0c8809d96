"""How documents are read for people, in the terminal and in the browser: as JSON and as text. Nothing here reads them
from anywhere, and nothing prints.
"""

import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from bson import Decimal128
from bson.datetime_ms import DatetimeMS

from handlers.store.database import Document
from schemas.task import admitted, same
from schemas.version import is_newer


def json_text(value: Any) -> str:
    """`value`, documents inside, as JSON: ids as hex, times as ISO 8601 in UTC, 64-bit task ids as numbers."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal128):
        number = value.to_decimal()
        whole = number.is_finite() and number.adjusted() < 40 and number == number.to_integral_value()
        return int(number) if whole else str(number)
    if isinstance(value, datetime):
        return iso(value)
    if isinstance(value, DatetimeMS):
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    return str(value)


def iso(time: datetime) -> str:
    """`time` in UTC, to the millisecond."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def printable(value: Any) -> str:
    """`value` as one line of text. Documents are anybody's: no control character of theirs reaches the terminal."""
    bad = ("Cc", "Cf", "Cs")
    return "".join(c if unicodedata.category(c) not in bad else " " if c in "\n\t" else "?" for c in str(value))


def state(document: Document) -> str:
    """The state of a task as its reader should see it: NEW until a worker has answered this very document."""
    # What a client wrote there, or copied from another document, is no answer.
    return str(document.get("status")) if admitted(document) else "NEW"


def part(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The document in field `name`; empty for anything else that a client wrote there."""
    value = document.get(name)
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> float:
    """`value` as a number that can be counted and compared; 0 for anything else, which somebody wrote by hand."""
    if isinstance(value, Decimal128):
        value = float(value.to_decimal()) if value.to_decimal().is_finite() else 0
    plain = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if plain else 0


def progress_text(document: Document) -> str:
    """`120/300 · loss 2.310 · 25.0 img/s · 0:00:48 left`, as far as it is known, of a task that has not ended."""
    if state(document) not in ("RUNNING", "PENDING"):
        return ""
    progress = part(document, "progress")
    done, total = progress.get("iteration"), progress.get("max_num_iters")
    # Before its first word a test has the total of a training; an iteration of a test is an image.
    if not done:
        return ""
    parts = [f"{done}/{total}" if total else f"{done}"]
    if isinstance(progress.get("loss"), int | float):
        parts.append(f"loss {float(progress['loss']):.3f}")
    if isinstance(progress.get("images_per_second"), int | float):
        parts.append(f"{progress['images_per_second']:.1f} img/s")
    if isinstance(progress.get("eta_seconds"), int | float) and state(document) == "RUNNING":
        parts.append(f"{duration(progress['eta_seconds'])} left")
    return " · ".join(parts)


def outcome_text(document: Document) -> str:
    """What came of an ended task, in one line."""
    error, result = part(document, "error"), part(document, "result")
    if state(document) != "SUCCEEDED":
        return f"{error.get('kind')}: {error.get('message')}" if error else ""
    text = f"{result.get('model_name')}:{result.get('version')}"
    if metrics := part(result, "metrics"):
        scores = f"mAP {number(metrics.get('map')):.3f} · mAP@.5 {number(metrics.get('map_50')):.3f}"
        text += f" · {scores} ({metrics.get('on')})"
    return text


def why_waiting(
    document: Document,
    queue: Sequence[Document],
    workers: Sequence[Mapping[str, Any]],
    now: datetime,
    *,
    waiting: int,
) -> str:
    """Why a NEW or PENDING task does not run. Empty for other states.

    `queue` is the first of the PENDING tasks, best first, and `waiting` how many there are.
    """
    current = state(document)
    if current == "NEW":
        return "no worker is alive to admit it" if not workers else "not looked at yet"
    if current != "PENDING":
        return ""
    if document.get("cancel_requested") is True:
        return "is being cancelled"
    not_before = document.get("not_before")
    if isinstance(not_before, datetime) and not_before > now:
        failures = document.get("failures")
        return f"retry at {iso(not_before)}" + (f" after {failures} faults" if failures else "")
    if not workers:
        return "no worker is alive"
    newest = max(number(worker.get("schema_version", 1)) for worker in workers)
    if is_newer(document.get("schema_version")) and number(document["schema_version"]) > newest:
        return f"written by a newer version (schema {document['schema_version']}); no live worker understands it"
    params = part(document, "param_request")
    kind, needed = str(params.get("device_type")), number(params.get("device_num"))
    able = [
        worker
        for worker in workers
        if number(part(worker, "devices").get(kind)) >= needed >= number(worker.get("min_device_num"))
    ]
    if not able:
        return f"needs {needed} {kind}; no live worker has them"
    if all(worker.get("resting") is True for worker in able):
        return "every worker that could take it rests after a fault of its machine (see its log)"
    if document.get("runs_alone") is True:
        return "waits for a worker that runs nothing else, since it has lost its worker before"
    position = next((place for place, other in enumerate(queue, 1) if same(other["_id"], document["_id"])), None)
    total = max(waiting, len(queue))
    if position:
        return f"position {position} of {total} in the queue{_of_devices(kind, needed, position, workers, able)}"
    return f"in the queue, behind the first {len(queue)} of {total}" if queue and total > len(queue) else "in the queue"


def _of_devices(
    kind: str, needed: float, position: int, workers: Sequence[Mapping[str, Any]], able: Sequence[Mapping[str, Any]]
) -> str:
    """What the workers' devices have to do with it that a task waits, after a comma; empty where nothing is known."""

    def free(worker: Mapping[str, Any]) -> float:
        return number(part(worker, "free").get(kind))

    if any(free(worker) >= needed for worker in able):
        return ", and devices are free: about to be claimed, or kept for one before it" if position > 1 else ""
    if not all(part(worker, "free") for worker in able):
        return ""
    if any(free(worker) >= needed for worker in workers):
        return f", and the free {kind} are of workers that take no task for {needed} (DLTASK_MIN_DEVICE_NUM)"
    return f", and no worker has {needed} {kind} free"


def duration(seconds: float) -> str:
    """`1:02:03`."""
    whole = max(0, round(seconds)) if math.isfinite(seconds) else 0
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def age(time: Any, now: datetime) -> str:
    """How long ago `time` was: `3 s`, `5 min`, `2 h`, `4 d`."""
    if not isinstance(time, datetime):
        return ""
    seconds = max(0.0, (now - time).total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def log_text(line: str) -> str:
    """A stored log line (JSON) as a person reads it; a line that was cut off as it is."""
    try:
        event: dict[str, Any] = dict(json.loads(line))
        time, level, what = (str(event.pop(key, "")) for key in ("timestamp", "level", "event"))
    except (ValueError, TypeError):
        return printable(line)
    hidden = ("task_id", "owner", "trace_id", "span_id")
    rest = " ".join(f"{key}={value}" for key, value in event.items() if key not in hidden)
    return printable(f"{time} {level:9} {what} {rest}".rstrip())


def task_number(value: Any) -> str:
    """A task_id, of whatever type, as text."""
    plain = _plain(value)
    return str(plain)[:40] if plain is not None else ""
