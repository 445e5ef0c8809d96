"""What a training task needs before its child starts, and what becomes of what the child made."""

from pathlib import Path
from typing import Any

import structlog

from handlers.detection.job import Job, Trained
from handlers.errors import LostTask, PermanentError
from handlers.images import ImageCache
from handlers.prepare import Uploads, prepare_job
from handlers.store import Store
from handlers.store.files import FileMissing
from schemas.enums import TaskStatus
from schemas.numbers import bson_uint64
from schemas.records import ModelRecord
from schemas.result import Result
from schemas.task import Task

log: structlog.stdlib.BoundLogger = structlog.get_logger()


async def prepare(store: Store, cache: ImageCache, task: Task, folder: Path, devices: tuple[str, ...]) -> Job:
    """Put everything the child needs into `folder`. Raises PermanentError, TemporaryError or LostTask."""
    job = await prepare_job(store, cache, task, folder, devices)
    snapshot = await _snapshot(store, task, folder / "snapshot")
    return job.model_copy(update={"resume_from": snapshot, "batch_size_limit": task.batch_size_limit})


async def _snapshot(store: Store, task: Task, path: Path) -> Path | None:
    """The snapshot that the task document names, on disk; None if there is none that can be trusted."""
    if task.snapshot is None:
        return None
    try:
        digest = await store.files.models.fetch(task.snapshot.file_id, path)
        if digest == task.snapshot.sha256:
            return path
        problem = f"its sha256 is {digest}; expected {task.snapshot.sha256}"
    except FileMissing as error:
        problem = str(error)
    log.warning("snapshot unusable", iteration=task.snapshot.iteration, reason=problem)
    await store.tasks.drop_snapshot(task)
    return None


async def finish(
    store: Store, task: Task, made: Trained, uploads: Uploads, *, seconds: float, notes: tuple[str, ...]
) -> dict[str, Any]:
    """Store and register the model and end the task, both or neither. Returns the result as it is stored.

    Raises LostTask, and PermanentError if a deleted task of this number has made a model before.
    """
    file_id = await uploads.model(made.onnx, f"{task.params.model_name}.onnx")
    reports = await uploads.reports(made.reports)

    async def both(session: Any) -> tuple[dict[str, Any], bool]:
        version = await store.models.next_version(task.params.model_name, session)
        result = Result(
            model_name=task.params.model_name,
            version=version,
            device=made.device,
            metrics=made.metrics,
            leaks=made.leaks,
            images=made.images,
            seconds=seconds,
            reports=reports,
            notes=notes,
            iterations=made.iterations,
            best_iteration=made.best_iteration,
            resumed_from_iteration=made.resumed_from_iteration,
            initial_weights=made.initial_weights,
            class_names=made.class_names,
            data_fingerprint=made.data_fingerprint,
        ).document("TRAIN")
        # The fence first: an attempt that is not the owner's any more must not get as far as the registry.
        first = await store.tasks.finish(task, TaskStatus.SUCCEEDED, result=result, session=session)
        if first:
            model = ModelRecord(
                model_name=task.params.model_name,
                version=version,
                task_id=task.task_id,
                attempt=task.attempt,
                net_model=task.params.net_model,
                model_scope=task.params.model_scope.name,
                class_names=made.class_names,
                input_size=made.input_size,
                file_id=file_id,
                sha256=made.sha256,
                metrics=made.metrics.model_dump(mode="json"),
                data_fingerprint=made.data_fingerprint,
            )
            await store.models.insert(model, session)
        return result, first

    try:
        result, first = await store.database.transaction(both)
    except (LostTask, PermanentError):
        # Nobody will ever refer to the file, and the janitor would find it a day later; unless a call before this one
        # registered it, its answer got lost, and somebody has deleted the task since.
        model = await store.models.made_by(bson_uint64(task.task_id))
        if model is None or model.get("file_id") != file_id:
            await store.files.models.delete(file_id)
        raise
    if first:
        return result
    # An earlier call did all this and its answer got lost: what that one wrote stands, version and all.
    ended = await store.tasks.get(bson_uint64(task.task_id))
    return (ended or {}).get("result") or result
