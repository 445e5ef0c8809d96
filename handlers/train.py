"""What a training task needs before its child starts, and what becomes of what the child made."""

from pathlib import Path
from typing import Any

import structlog

from handlers.detection.job import Job, Trained
from handlers.errors import LostTask, PermanentError
from handlers.images import ImageCache
from handlers.prepare import Uploads, fetch_of_model, find_model, prepare_job
from handlers.store import Store
from handlers.store.files import FileMissing
from schemas.card import Card
from schemas.enums import TaskStatus
from schemas.numbers import bson_uint64
from schemas.params import split_model_name, stored_params
from schemas.records import ModelRecord
from schemas.result import Result
from schemas.task import Task

log: structlog.stdlib.BoundLogger = structlog.get_logger()


async def prepare(store: Store, cache: ImageCache, task: Task, folder: Path, devices: tuple[str, ...]) -> Job:
    """Put everything the child needs into `folder`. Raises PermanentError, TemporaryError or LostTask."""
    snapshot = await _snapshot(store, task, folder / "snapshot")
    # A snapshot has the weights in it, and may outlive the version that they came from.
    weights = await _weights(store, task, folder / "weights.pt") if snapshot is None else None
    job = await prepare_job(store, cache, task, folder, devices)
    return job.model_copy(
        update={
            "resume_from": snapshot,
            "start_from": weights,
            "batch_size_limit": task.batch_size_limit,
            "patience": task.patience,
            "mirror": task.mirror,
        }
    )


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


async def _weights(store: Store, task: Task, path: Path) -> Path | None:
    """The weights of the version to begin with, on disk; None for a training that begins with the network's own."""
    reference = task.params.model_name
    if split_model_name(reference)[1] is None:
        return None
    model = await find_model(store, reference)
    file_id, sha256 = model.get("weights_file_id"), model.get("weights_sha256")
    await fetch_of_model(store, file_id, sha256, path, f"the weights file of model {reference!r}")
    return path


async def finish(
    store: Store, task: Task, made: Trained, uploads: Uploads, *, seconds: float, notes: tuple[str, ...]
) -> dict[str, Any]:
    """Store and register the model and end the task, both or neither. Returns the result as it is stored.

    Raises LostTask, and PermanentError if a deleted task of this number has made a model before.
    """
    name, parent = split_model_name(task.params.model_name)
    file_id = await uploads.model(made.onnx, f"{name}.onnx")
    weights_id = await uploads.weights(made.weights, f"{name}.pt") if made.weights is not None else None
    reports = await uploads.reports(made.reports)

    async def both(session: Any) -> tuple[dict[str, Any], bool]:
        version = await store.models.next_version(name, session)
        result = Result(
            model_name=name,
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
            parent_version=parent,
            class_names=made.class_names,
            data_fingerprint=made.data_fingerprint,
        ).document("TRAIN")
        # The fence first: an attempt that is not the owner's any more must not get as far as the registry.
        first = await store.tasks.finish(task, TaskStatus.SUCCEEDED, result=result, session=session)
        if first:
            model = ModelRecord(
                model_name=name,
                version=version,
                task_id=task.task_id,
                attempt=task.attempt,
                net_model=task.params.net_model,
                model_scope=task.params.model_scope.name,
                class_names=made.class_names,
                input_size=made.input_size,
                file_id=file_id,
                sha256=made.sha256,
                weights_file_id=weights_id,
                weights_sha256=made.weights_sha256,
                metrics=made.metrics.model_dump(mode="json"),
                data_fingerprint=made.data_fingerprint,
                parent_version=parent,
                card=_card(task, made, seconds),
            )
            await store.models.insert(model, session)
        return result, first

    try:
        result, first = await store.database.transaction(both)
    except (LostTask, PermanentError):
        # Nobody will ever refer to the files, and the janitor would find them a day later; unless a call before this
        # one registered them, its answer got lost, and somebody has deleted the task since.
        model = await store.models.made_by(bson_uint64(task.task_id))
        if model is None or model.get("file_id") != file_id:
            for unnamed in (file_id, weights_id):
                if unnamed is not None:
                    await store.files.models.delete(unnamed)
        raise
    if first:
        return result
    # An earlier call did all this and its answer got lost: what that one wrote stands, version and all.
    ended = await store.tasks.get(bson_uint64(task.task_id))
    return (ended or {}).get("result") or result


def _card(task: Task, made: Trained, seconds: float) -> dict[str, Any] | None:
    if made.card is None:
        return None
    card = Card(
        **made.card.model_dump(),
        images_skipped=made.images.skipped,
        parameters=stored_params(task.params),
        initial_weights=made.initial_weights,
        iterations=made.iterations,
        best_iteration=made.best_iteration,
        device=made.device,
        seconds=seconds,
    )
    return card.model_dump()
