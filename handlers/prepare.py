"""What trainings and tests have in common: data and models on local disk before, what was made in GridFS after."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bson import ObjectId

from handlers.detection.job import Job
from handlers.errors import PermanentError, TemporaryError
from handlers.images import ImageCache
from handlers.message import build_message, read_given
from handlers.store import Store
from handlers.store.database import Document
from handlers.store.files import Bucket, FileMissing
from schemas.enums import TaskErrorCode
from schemas.numbers import bson_uint64
from schemas.params import stored_params
from schemas.task import Task
from schemas.version import SCHEMA_VERSION, is_newer


async def prepare_job(store: Store, cache: ImageCache, task: Task, folder: Path, devices: tuple[str, ...]) -> Job:
    """Put the request message and the images of `task` into `folder`; returns the job without what one kind adds.

    The first attempt builds the message, stores it and records its id; later ones, and tasks that were given one, read
    it. Raises PermanentError, TemporaryError or LostTask.
    """
    message, refs = folder / "message.json", folder / "refs.jsonl"
    if task.json_mongodb_id is None:
        await build_message(store, task, message, refs)
        file_id = await store.files.messages.put(
            message, f"{task.task_id}.json", {"task_id": bson_uint64(task.task_id)}
        )
        await store.tasks.note_message(task, str(file_id))
    else:
        try:
            await store.files.messages.fetch(task.json_mongodb_id, message)
        except FileMissing as error:
            raise PermanentError(
                "data",
                f"the request message is gone: {error}",
                field="json_mongodb_id",
                code=TaskErrorCode.JASON_MONGOID_INVALID,
            ) from None
        await read_given(store, message, refs)
    images = await cache.fetch(store, refs, folder)
    out = folder / "out"
    out.mkdir()
    params = stored_params(task.params)
    # As plain ints: what MongoDB holds above 2^63 is no JSON.
    params.update(max_num_iters=task.params.max_num_iters, snap_shot_ivterval=task.params.snap_shot_ivterval)
    return Job(
        task_id=str(task.task_id),
        attempt=task.attempt,
        kind=task.task_type,
        params=params,
        devices=devices,
        # The same task gives the same model.
        seed=task.task_id % 2**31,
        message=message,
        images=images,
        out=out,
        environment={} if task.trace is None else task.trace.environment,
    )


class Uploads:
    """The files that an attempt puts into GridFS, each of them once, however often its end has to be tried."""

    def __init__(self, store: Store, task: Task) -> None:
        self._store = store
        self._task_id = bson_uint64(task.task_id)
        self._ids: dict[Path, ObjectId] = {}

    async def model(self, path: Path, name: str) -> ObjectId:
        """Store a model's file; returns its id."""
        return await self._put(self._store.files.models, path, name)

    async def weights(self, path: Path, name: str) -> ObjectId:
        """Store a model's weights; returns their id."""
        return await self._put(self._store.files.models, path, name, "weights_of")

    async def reports(self, reports: Mapping[str, Path]) -> dict[str, str]:
        """Store the pictures a child made; returns the hex id of each."""
        bucket = self._store.files.reports
        return {name: str(await self._put(bucket, path, path.name)) for name, path in reports.items()}

    async def _put(self, bucket: Bucket, path: Path, name: str, owner: str = "task_id") -> ObjectId:
        if path not in self._ids:
            self._ids[path] = await bucket.put(path, name, {owner: self._task_id})
        return self._ids[path]


async def find_model(store: Store, reference: str) -> Document:
    """The registered version that `reference` names. Raises PermanentError, and TemporaryError for a newer form."""
    model = await store.models.find(reference)
    if model is None:
        raise _model_error(f"model {reference!r} is no longer registered")
    if is_newer(model.get("schema_version")):
        # Not for good: another worker may be of that version already.
        raise TemporaryError(
            "version",
            f"model {reference!r} was registered by a newer version of dltask (schema "
            f"{model['schema_version']}); this worker knows {SCHEMA_VERSION}: upgrade it",
            delay=60,
        )
    return model


async def fetch_of_model(store: Store, file_id: Any, sha256: Any, path: Path, what: str) -> None:
    """Write a file of a registered version to `path`; `what` names it for people.

    Raises PermanentError where it is gone or damaged: trying again would end the same way.
    """
    try:
        digest = await store.files.models.fetch(file_id, path)
    except FileMissing as error:
        raise _model_error(f"{what} is gone: {error}") from None
    if digest != sha256:
        raise _model_error(f"{what} is damaged: sha256 {digest}; expected {sha256}")


def _model_error(message: str) -> PermanentError:
    return PermanentError("model", message, field="param_request.model_name", code=TaskErrorCode.MODEL_INVALID)
