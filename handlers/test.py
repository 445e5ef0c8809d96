"""What a testing task needs before its child starts, and what becomes of the detections."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
from bson import ObjectId
from bson.errors import InvalidId
from pydantic import ValidationError

from handlers.detection.job import DETECTIONS, Job, Tested, TestedModel
from handlers.errors import PermanentError
from handlers.images import ImageCache
from handlers.prepare import Uploads, fetch_of_model, find_model, prepare_job
from handlers.store import Store
from handlers.store.database import Document
from schemas.enums import TaskStatus
from schemas.numbers import bson_uint64
from schemas.result import Result
from schemas.task import Task

#: Rows of DL_TEST_RESULT in one write.
_BATCH = 500
#: Bytes of a row, at most.
_MAX_ROW = 4 << 20


async def prepare(
    store: Store, cache: ImageCache, task: Task, folder: Path, devices: tuple[str, ...]
) -> tuple[Job, Document]:
    """Put everything the child needs into `folder`; returns the job and the registered model that it tests.

    Raises PermanentError, TemporaryError or LostTask.
    """
    name = task.params.model_name
    model = await find_model(store, name)
    onnx = folder / "model.onnx"
    await fetch_of_model(store, model["file_id"], model["sha256"], onnx, f"the file of model {name!r}")
    job = await prepare_job(store, cache, task, folder, devices)
    tested = TestedModel(
        onnx=onnx,
        class_names=tuple(model["class_names"]),
        input_size=model["input_size"],
        thresholds=_thresholds(model),
        reference=f"{model['model_name']}:{model['version']}",
    )
    return job.model_copy(update={"model": tested}), model


async def finish(
    store: Store,
    task: Task,
    made: Tested,
    uploads: Uploads,
    *,
    model: Document,
    refs: Path,
    seconds: float,
    notes: tuple[str, ...],
) -> dict[str, Any]:
    """Store the detections of every image and end the task. Returns the result.

    Raises LostTask, and PermanentError where the file of detections is none.

    Rows are written before the task ends, under this attempt's number: readers look at the attempt that finished.
    """
    for rows in _rows(task, made.detections, refs):
        await store.results.put(rows)
    result = Result(
        model_name=model["model_name"],
        version=model["version"],
        device=made.device,
        metrics=made.metrics,
        leaks=made.leaks,
        images=made.images,
        seconds=seconds,
        reports=await uploads.reports(made.reports),
        notes=notes,
        images_per_second=made.images_per_second,
        detections=made.detection_count,
    ).document("TEST")
    await store.tasks.finish(task, TaskStatus.SUCCEEDED, result=result)
    return result


def _thresholds(model: Document) -> tuple[float | None, ...]:
    """Those of the model's classes, in their order: whoever changes them in DL_MODEL has others. Empty for none."""
    metrics = model.get("metrics")
    rows = metrics.get("per_class") if isinstance(metrics, dict) else None
    known = {
        row.get("class_id"): float(row["threshold"])
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict) and _is_score(row.get("threshold")) and isinstance(row.get("class_id"), int)
    }
    return tuple(known.get(number) for number in range(1, len(model["class_names"]) + 1)) if known else ()


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _rows(task: Task, detections: Path, refs: Path) -> Iterator[list[Document]]:
    with refs.open("rb") as lines:
        mongodb_ids = {ref["id"]: ref["mongodb_id"] for ref in map(orjson.loads, lines)}
    rows: list[Document] = []
    with detections.open("rb") as lines:
        # Read by pieces, since a file that is none may have no line ends; a cut line is then no row.
        for number, line in enumerate(iter(lambda: lines.readline(_MAX_ROW), b""), 1):
            try:
                found = DETECTIONS.validate_json(line)
                img_id = ObjectId(mongodb_ids[found["image_id"]])
            except (ValidationError, KeyError, InvalidId) as error:
                why = (
                    error.errors()[0]["msg"] if isinstance(error, ValidationError) else "expected an image of the task"
                )
                raise PermanentError(
                    "output", f"line {number} of the child's detections is {line[:80]!r}; {why}"
                ) from None
            rows.append(
                {
                    "task_id": bson_uint64(task.task_id),
                    "attempt": task.attempt,
                    "img_id": img_id,
                    "detections": found["detections"],
                }
            )
            if len(rows) == _BATCH:
                yield rows
                rows = []
    yield rows
