"""Admission: is this document a task? If so normalise it, else say what is wrong with it.

Quick, and needs no GPU, so that a client learns within milliseconds. When several things are wrong the first of this
order is the answer: task id, task type, parameters, model, empty collections, request message, images.
"""

import unicodedata
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Literal

import anyio
import structlog
from bson.errors import InvalidBSON

from handlers.store import Store
from handlers.store.database import StoreError, Unreadable, brief
from handlers.store.documents import Unnameable, strictly
from handlers.store.tasks import Rejection, unfit
from schemas.enums import TaskErrorCode, TaskTypeClass, member
from schemas.networks import NETWORKS
from schemas.numbers import UINT64_MAX, bson_uint64, whole_number
from schemas.params import ParamClass, ParamError, check_params, shown, split_model_name, stored_params
from schemas.task import (
    DEFAULT_MAX_ATTEMPTS,
    ID_LISTS,
    MAX_DOCUMENT_BYTES,
    MAX_PATIENCE,
    object_id,
    read_trace,
    task_name,
)

log: structlog.stdlib.BoundLogger = structlog.get_logger()

#: Bad ids named in a message; their whole number stands beside them.
_IDS_NAMED = 10


class _Rejected(Exception):
    def __init__(self, code: TaskErrorCode, field: str, message: str) -> None:
        super().__init__(message)
        self.rejection = Rejection(code, field, message)


async def admit(store: Store, key: Any) -> TaskErrorCode | None:
    """Answer the document with this `_id`: PENDING or REJECTED. Returns the code.

    None, and nothing happens, if it has its answer already.
    """
    if isinstance(key, Unnameable):
        problem = "_id is of a form that no driver can write; expected an ObjectId, or what a driver can make of one"
        unnameable = Rejection(TaskErrorCode.PARAM_INVALID, "_id", problem)
        return await _reject(store, key, None, unnameable, drop_all=True)
    data = await store.tasks.unadmitted(key)
    if data is None:
        return None
    if len(data) > MAX_DOCUMENT_BYTES:
        # Not decoded, which takes many times its size. The name could stand in some text: then the code is that of ids.
        by_ids = b"\x04img_mongodb_ids\x00" in data
        too_large = Rejection(
            TaskErrorCode.IMAG_MONGOID_INVALID if by_ids else TaskErrorCode.PARAM_INVALID,
            "img_mongodb_ids",
            f"the document has {len(data)} bytes; expected at most {MAX_DOCUMENT_BYTES}: "
            "name a dataset and split, or send ids as ObjectIds",
        )
        return await _reject(store, key, None, too_large, drop_all=True)
    try:
        document = strictly(data)
    except InvalidBSON as error:
        # Whoever read the whole document would choke on it, `dltask status` too.
        invalid = Rejection(TaskErrorCode.PARAM_INVALID, "", f"the document is no valid BSON: {error}")
        return await _reject(store, key, None, invalid, drop_all=True)
    trace, _ = read_trace(document)
    with structlog.contextvars.bound_contextvars(**(trace.bound if trace else {})):
        return await _answer(store, key, document)


async def _answer(store: Store, key: Any, document: Mapping[str, Any]) -> TaskErrorCode | None:
    checked = await check(store, document)
    if isinstance(checked, Rejection):
        return await _reject(store, key, document.get("task_id"), checked)
    try:
        admitted = await store.tasks.admit(key, checked)
    except StoreError as error:
        if not unfit(error):
            raise
        full = Rejection(TaskErrorCode.PARAM_INVALID, "", f"the document has no room for its state: {brief(error)}")
        return await _reject(store, key, document.get("task_id"), full, drop_all=True)
    if not admitted:
        return None
    log.info("task admitted", task_id=str(checked["task_id"]), task_type=checked["task_type"])
    return TaskErrorCode.OK


async def _reject(
    store: Store, key: Any, task_id: Any, rejection: Rejection, *, drop_all: bool = False
) -> TaskErrorCode | None:
    if not await store.tasks.reject(key, rejection, drop_all=drop_all):
        return None
    log.warning(
        "task rejected",
        task_id=task_name(task_id),
        key=shown(key),
        code=rejection.code.name,
        field=rejection.field,
        reason=rejection.message,
    )
    return rejection.code


async def check(store: Store, document: Mapping[str, Any]) -> dict[str, Any] | Rejection:
    """The normalised fields of a client's document, or why it is rejected. Writes nothing."""
    try:
        task_id = _task_id(document)
        task_type = _task_type(document)
        unused = partial(_number_unused, store, task_id, task_type)
        try:
            params, beside = _parameters(document, task_type)
        except _Rejected:
            await unused()
            raise
        filled = [partial(_filled, store, "IMG_INFO")]
        if task_type is TaskTypeClass.TRAIN:
            filled.append(partial(_filled, store, "IMG_LAB_INFO"))
        images = partial(_images, store, document, task_type)
        # Ids are looked for once all else is right: half a million take seconds, and memory.
        by_id = any(document.get(name) for name in ID_LISTS)
        found = await _in_order(
            unused,
            partial(_model, store, task_type, params),
            *filled,
            partial(_message, store, document),
            *([] if by_id else [images]),
        )
        message_id, split = (found[-1], await images()) if by_id else found[-2:]
    except _Rejected as rejected:
        return rejected.rejection
    except Unreadable as error:
        return Rejection(TaskErrorCode.IMAG_MONGOID_INVALID, "img_mongodb_ids", f"IMG_INFO cannot be read: {error}")
    fields: dict[str, Any] = {
        "task_id": bson_uint64(task_id),
        "task_type": task_type.name,
        "param_request": stored_params(params),
        **beside,
    }
    if message_id is not None:
        fields["json_mongodb_id"] = message_id
    if split is not None:
        fields["split"] = split
    return fields


def _task_id(document: Mapping[str, Any]) -> int:
    value = document.get("task_id")
    try:
        task_id = whole_number(value)
        if 0 <= task_id <= UINT64_MAX:
            return task_id
        problem = "expected a whole number"
    except ValueError as error:
        problem = str(error)
    raise _Rejected(
        TaskErrorCode.TASK_ID_INVALID,
        "task_id",
        f"task_id is {shown(value) if 'task_id' in document else 'missing'}; {problem} from 0 to 2^64-1",
    )


async def _in_order(*checks: Callable[[], Awaitable[Any]]) -> list[Any]:
    """What each of `checks` returns, or what the first of them raises that does.

    All at once: each is a round trip or more, and a client waits for the sum of them.
    """
    returned: list[Any] = [None] * len(checks)
    raised: dict[int, _Rejected | StoreError] = {}

    async def run(index: int, check: Callable[[], Awaitable[Any]]) -> None:
        try:
            returned[index] = await check()
        except (_Rejected, StoreError) as error:
            raised[index] = error

    async with anyio.create_task_group() as group:
        for index, check in enumerate(checks):
            group.start_soon(run, index, check)
    if raised:
        try:
            raise raised[min(raised)]
        finally:
            # An error knows where it was raised, so this frame too, and with it the whole document.
            raised.clear()
    return returned


async def _number_unused(store: Store, task_id: int, task_type: TaskTypeClass) -> None:
    if task_type is not TaskTypeClass.TRAIN:
        return
    # The unique index on DL_TASK cannot see a task that somebody has deleted; its model is still there.
    model = await store.models.made_by(bson_uint64(task_id))
    if model is not None:
        raise _Rejected(
            TaskErrorCode.TASK_ID_INVALID,
            "task_id",
            f"task_id is {task_id}; an earlier task of that number made {model['model_name']}:{model['version']}",
        )


def _task_type(document: Mapping[str, Any]) -> TaskTypeClass:
    value = document.get("task_type")
    try:
        return member(TaskTypeClass, value)
    except ValueError as error:
        given = shown(value) if "task_type" in document else "missing"
        raise _Rejected(TaskErrorCode.TASK_TYPE_ERROR, "task_type", f"task_type is {given}; {error}") from None


def _parameters(document: Mapping[str, Any], task_type: TaskTypeClass) -> tuple[ParamClass, dict[str, int | bool]]:
    """The deep-learning parameters, and what stands beside them."""
    try:
        params = check_params(document.get("param_request"))
        _check_model_name(params)
        beside: dict[str, int | bool] = {
            "priority": _whole(document, "priority", 0, -(2**31), 2**31 - 1),
            "max_attempts": _whole(document, "max_attempts", DEFAULT_MAX_ATTEMPTS, 1, 100),
        }
        if document.get("patience") is not None:
            beside["patience"] = _whole(document, "patience", 0, 1, MAX_PATIENCE)
        mirror = _flag(document, "mirror", default=True)
        if task_type is TaskTypeClass.TRAIN:
            # Written down, since a task that 0.1.0 admitted says nothing, and was never to be mirrored.
            beside["mirror"] = mirror
        for field in ("dataset", "split"):
            _name(document, field)
        if task_type is TaskTypeClass.TRAIN and document.get("split") == "test":
            # What is kept for testing is never trained on, also when somebody asks for it.
            raise ParamError(
                "split", "split is 'test'; expected another one, or none: a training never reads that split"
            )
    except ParamError as error:
        raise _Rejected(TaskErrorCode.PARAM_INVALID, error.field, str(error)) from None
    return params, beside


def _check_model_name(params: ParamClass) -> None:
    field = "param_request.model_name"
    if params.model_name == "":
        raise ParamError(field, f"{field} is missing; expected the name of the model to train or to test")
    try:
        split_model_name(params.model_name)
    except ValueError as error:
        raise ParamError(field, f"{field} is {shown(params.model_name)}; {error}") from None


def _whole(document: Mapping[str, Any], field: str, default: int, low: int, high: int) -> int:
    value = document.get(field)
    if value is None:
        return default
    try:
        number = whole_number(value)
        if low <= number <= high:
            return number
    except ValueError:
        pass
    raise ParamError(field, f"{field} is {shown(value)}; expected a whole number from {low} to {high}")


def _flag(document: Mapping[str, Any], field: str, *, default: bool) -> bool:
    value = document.get(field)
    if not isinstance(value, bool | None):
        raise ParamError(field, f"{field} is {shown(value)}; expected true or false")
    return default if value is None else value


def _name(document: Mapping[str, Any], field: str) -> None:
    value = document.get(field)
    if value is None:
        return
    # These names are printed; a control character or a change of direction in one could forge what a person reads.
    if not isinstance(value, str) or len(value) > 200 or any(unicodedata.category(c) in ("Cc", "Cf") for c in value):
        raise ParamError(field, f"{field} is {shown(value)}; expected a text of at most 200 printable characters")


async def _model(store: Store, task_type: TaskTypeClass, params: ParamClass) -> None:
    if task_type is TaskTypeClass.TRAIN:
        if params.net_model not in NETWORKS:
            raise _Rejected(
                TaskErrorCode.MODEL_INVALID,
                "param_request.net_model",
                f"param_request.net_model is {shown(params.net_model)}; expected one of {', '.join(NETWORKS)}",
            )
        if split_model_name(params.model_name)[1] is None:
            return
    model = await store.models.find(params.model_name)
    if model is None:
        raise _Rejected(
            TaskErrorCode.MODEL_INVALID,
            "param_request.model_name",
            f"param_request.model_name is {shown(params.model_name)}; expected a registered model, "
            "as `name` or `name:version` (see `dltask models`)",
        )
    if task_type is TaskTypeClass.TRAIN:
        _can_begin(model, params)


def _can_begin(model: Mapping[str, Any], params: ParamClass) -> None:
    """Whether a training can begin with the weights of this version."""
    if model.get("net_model") != params.net_model:
        raise _Rejected(
            TaskErrorCode.MODEL_INVALID,
            "param_request.net_model",
            f"param_request.net_model is {shown(params.net_model)}; expected {shown(model.get('net_model'))}, "
            f"the network of {shown(params.model_name)}",
        )
    if model.get("weights_file_id") is None:
        raise _Rejected(
            TaskErrorCode.MODEL_INVALID,
            "param_request.model_name",
            f"param_request.model_name is {shown(params.model_name)}, a version without stored weights, as release "
            "0.1.0 made them; expected a version that was trained since, or a name without a version",
        )


async def _filled(store: Store, table: Literal["IMG_INFO", "IMG_LAB_INFO"]) -> None:
    if await store.records.is_empty(table):
        raise _Rejected(TaskErrorCode.COLLECTIONS_EMPTY, table, f"{table} is empty; expected at least one document")


async def _message(store: Store, document: Mapping[str, Any]) -> str | None:
    value = document.get("json_mongodb_id")
    if value is None or value == "":
        return None
    file_id = object_id(value)
    if file_id is None:
        raise _Rejected(
            TaskErrorCode.JASON_MONGOID_INVALID,
            "json_mongodb_id",
            f"json_mongodb_id is {shown(value)}; expected the 24 hex digits of a request message in GridFS `messages`",
        )
    if not await store.files.messages.exists(file_id):
        raise _Rejected(
            TaskErrorCode.JASON_MONGOID_INVALID,
            "json_mongodb_id",
            f"json_mongodb_id is {shown(value)}; expected the id of a request message that is in GridFS `messages`",
        )
    return str(file_id)


async def _images(store: Store, document: Mapping[str, Any], task_type: TaskTypeClass) -> str | None:
    """The split to use: the one asked for; else None, or for a test the one that is kept for tests."""
    if document.get("json_mongodb_id") not in (None, ""):
        return document.get("split")  # Its message names the images.
    for field in ("img_mongodb_ids", "val_img_mongodb_ids"):
        ids = document.get(field)
        if ids is None:
            continue
        if not isinstance(ids, list):
            raise _Rejected(
                TaskErrorCode.IMAG_MONGOID_INVALID, field, f"{field} is {shown(ids)}; expected a list of image ids"
            )
        if missing := await store.records.missing(ids):
            named = ", ".join(shown(str(value)) for value in missing[:_IDS_NAMED])
            raise _Rejected(
                TaskErrorCode.IMAG_MONGOID_INVALID,
                field,
                f"{field}: {len(missing)} of {len(ids)} ids are not in IMG_INFO: {named}"
                f"{', …' if len(missing) > _IDS_NAMED else ''}; expected ObjectIds or their 24 hex digits",
            )
    dataset, split = document.get("dataset"), document.get("split")
    if document.get("img_mongodb_ids"):
        return split
    if not dataset:
        raise _Rejected(
            TaskErrorCode.IMAG_MONGOID_INVALID,
            "img_mongodb_ids",
            "img_mongodb_ids is empty; expected image ids, a dataset, or a json_mongodb_id",
        )
    if task_type is TaskTypeClass.TEST and split is None and await store.records.has_images(dataset, "test"):
        split = "test"
    if not await store.records.has_images(dataset, split):
        raise _Rejected(
            TaskErrorCode.IMAG_MONGOID_INVALID,
            "dataset",
            f"dataset is {shown(dataset)}; expected one with images in IMG_INFO in "
            f"{'any split but test' if split is None else f'split {shown(split)}'}",
        )
    return split
