"""The published Python interface: ask for a run, and for the result of a test.

    from handlers.task_process import TaskProcess
    from schemas.params import ParamClass

    with TaskProcess() as process:
        code = process.task_start_request(ParamClass("cells"), 1, TaskTypeClass.TRAIN, image_ids, "")

It checks with the same code as the workers, and inserts the document that any other client would insert.
"""

import threading
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, TypeVar
from weakref import finalize

import bson
from anyio.from_thread import BlockingPortal, start_blocking_portal
from bson import ObjectId

from handlers.admission import check
from handlers.settings import DatabaseSettings
from handlers.store import Store, connect_store
from handlers.store.tasks import Rejection
from schemas.enums import TaskErrorCode, TaskStatus, TaskTypeClass, member
from schemas.numbers import UINT64_MAX, bson_uint64, whole_number
from schemas.params import ParamClass
from schemas.task import MAX_DOCUMENT_BYTES, admitted, object_id

A = TypeVar("A")
R = TypeVar("R")


class TaskProcess:
    """Training and testing for a platform's own code. Synchronous; one instance serves any number of threads.

    Settings are read from `DLTASK_MONGODB_URI` or `DLTASK_MONGODB_URI_FILE`, and `DLTASK_DATABASE`, when it is made
    (pydantic.ValidationError if they are wrong). It connects at the first call, keeps that one connection, and closes
    it in `close`, at the end of a `with` block, or at the end of the program. Every method raises
    `handlers.errors.StartupError` for a URI that is none, and `handlers.store.database.StoreError` while the database
    does not answer.
    """

    def __init__(self) -> None:
        self._settings = DatabaseSettings()
        self._opening = threading.Lock()
        self._opened: tuple[BlockingPortal, Store] | None = None
        self._close: Callable[[], Any] = lambda: None

    def task_start_request(
        self,
        param_request: ParamClass,
        task_id: int,
        task_type: TaskTypeClass,
        img_mongodb_ids: list[Any],
        json_mongodb_id: str | None,
        *,
        mirror: bool = True,
    ) -> TaskErrorCode:
        """Ask for a training or a test; anything but OK has inserted nothing.

        `img_mongodb_ids` are ObjectIds in IMG_INFO or their hex strings. `json_mongodb_id` is the hex id of a stored
        request message to run on, or `''` or None to have one built. A `task_id` (0 … 2^64-1) that is already used is
        TASK_ID_INVALID. When several things are wrong, the first of the codes 4, 1, 7, 8, 5, 2, 3 is returned.
        `mirror`: whether a training mirrors half of its images, left to right.
        """
        document = {
            "task_id": task_id,
            "task_type": task_type,
            "param_request": param_request,
            "img_mongodb_ids": list(img_mongodb_ids) if isinstance(img_mongodb_ids, tuple) else img_mongodb_ids,
            "json_mongodb_id": json_mongodb_id,
            **({} if mirror else {"mirror": False}),
        }
        return self._run(_start, document)

    def task_test_result(self, task_id: int) -> tuple[TaskErrorCode, dict[str, Any] | None]:
        """What came of a test: OK with the result, once it has ended.

        The result has a `status`. SUCCEEDED: with the fields of `schemas.result.Result`. FAILED, REJECTED or CANCELLED:
        with `error`, which is `{kind, message, field}` or None. Before that the code is TASK_TEST_NOT_OVER; for a task
        that is unknown or no test it is TASK_ID_INVALID.
        """
        return self._run(_result, task_id)

    def close(self) -> None:
        """Close the connection; the next call would open a new one."""
        with self._opening:
            self._opened = None
            self._close()

    def __enter__(self) -> "TaskProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, body: Callable[[Store, A], Awaitable[R]], argument: A) -> R:
        with self._opening:
            portal, store = self._opened or self._open()
        return portal.call(body, store, argument)

    def _open(self) -> tuple[BlockingPortal, Store]:
        with ExitStack() as stack:
            # PyMongo's asynchronous client needs asyncio.
            portal = stack.enter_context(start_blocking_portal("asyncio", name="TaskProcess"))
            context = connect_store(self._settings.mongodb_uri.get_secret_value(), self._settings.database)
            store = stack.enter_context(portal.wrap_async_context_manager(context))
            # Two requests with one task_id are told apart by the unique index, so it must be there before the first.
            portal.call(store.indexes.create, "DL_TASK")
            # Also runs when nobody closes us: at garbage collection and at the end of the program.
            self._close = finalize(self, stack.pop_all().close)
        self._opened = portal, store
        return self._opened


async def _start(store: Store, document: dict[str, Any]) -> TaskErrorCode:
    # Before everything else, since a bad task_id is the first of the codes.
    if await _used(store, document["task_id"]):
        return TaskErrorCode.TASK_ID_INVALID
    fields = await check(store, document)
    if isinstance(fields, Rejection):
        return fields.code
    ids: list[ObjectId] = [oid for value in document["img_mongodb_ids"] or () if (oid := object_id(value)) is not None]
    # Nothing that the caller did not say: the rest is the worker's to fill in, as for any client that leaves it out.
    request = {name: fields[name] for name in document if name in fields} | {"img_mongodb_ids": ids}
    if len(bson.encode(request)) > MAX_DOCUMENT_BYTES:
        return TaskErrorCode.IMAG_MONGOID_INVALID
    return TaskErrorCode.OK if await store.tasks.insert(request) else TaskErrorCode.TASK_ID_INVALID


async def _used(store: Store, task_id: Any) -> bool:
    try:
        number = whole_number(task_id)
    except ValueError:
        return False
    return 0 <= number <= UINT64_MAX and await store.tasks.get(bson_uint64(number)) is not None


async def _result(store: Store, task_id: Any) -> tuple[TaskErrorCode, dict[str, Any] | None]:
    try:
        number = whole_number(task_id)
        document = await store.tasks.get(bson_uint64(number)) if 0 <= number <= UINT64_MAX else None
        is_test = document is not None and member(TaskTypeClass, document.get("task_type")) is TaskTypeClass.TEST
    except ValueError:
        return TaskErrorCode.TASK_ID_INVALID, None
    if document is None or not is_test:
        return TaskErrorCode.TASK_ID_INVALID, None
    # A state that a client wrote, or copied from another task, is none: only an admitted document has one.
    status = document.get("status") if admitted(document) else None
    if status == TaskStatus.SUCCEEDED.name:
        result = document.get("result")
        return TaskErrorCode.OK, {"status": status, **(result if isinstance(result, dict) else {})}
    if status in (TaskStatus.FAILED.name, TaskStatus.REJECTED.name, TaskStatus.CANCELLED.name):
        return TaskErrorCode.OK, {"status": status, "error": document.get("error")}
    return TaskErrorCode.TASK_TEST_NOT_OVER, None
