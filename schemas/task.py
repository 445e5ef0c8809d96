"""The task document: what a client inserts, and the normalised task that a worker runs."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

import bson
from bson import ObjectId
from bson.errors import BSONError, InvalidId
from pydantic import BaseModel, ConfigDict, Field

from schemas.networks import NETWORKS
from schemas.numbers import UINT64_MAX, whole_number
from schemas.params import ParamClass, check_params, shown, split_model_name
from schemas.trace import Trace, trace_of

#: Fields that only the service writes. Admission sets or unsets every one, so that none can be forged by a client or
#: carried over in a copy of an old document.
SERVICE_FIELDS = (
    "admitted_id",
    "status",
    "error_code",
    "error",
    "attempt",
    "failures",
    "failed_at",
    "owner",
    "lease_renewed_at",
    "not_before",
    "create_time",
    "start_time",
    "end_time",
    "progress",
    "snapshot",
    "result",
    "history",
    "batch_size_limit",
    "runs_alone",
    "schema_version",
)

#: Fields that can hold very long lists; fetched only by the one reader that needs them.
ID_LISTS = ("img_mongodb_ids", "val_img_mongodb_ids")

#: Fields of a client that say which trace it is at (see `schemas.trace`).
TRACE_FIELDS = ("traceparent", "tracestate")

#: A larger document is rejected, since MongoDB's 16 MB would leave no room for the answer.
MAX_DOCUMENT_BYTES = 12 * 1024 * 1024

DEFAULT_MAX_ATTEMPTS = 3

#: The largest whole number that MongoDB holds as one.
MAX_PATIENCE = 2**63 - 1


class TaskRequest(BaseModel):
    """What a client inserts into DL_TASK; this model is its documentation and JSON Schema.

    Documents are checked by `handlers.admission`, field by field, so that each fault gets its own code.
    """

    model_config = ConfigDict(frozen=True, extra="allow", arbitrary_types_allowed=True)

    task_id: int = Field(ge=0, le=UINT64_MAX, description="The task's number; unique.")
    task_type: Literal["TRAIN", "TEST"]
    param_request: dict[str, Any] = Field(default={}, description="ParamClass; see its fields.")
    img_mongodb_ids: list[str] = Field(default=[], description="ObjectIds in IMG_INFO, or their hex strings.")
    val_img_mongodb_ids: list[str] = Field(default=[], description="TRAIN: the images to validate on.")
    dataset: str | None = Field(default=None, description="Instead of ids: the images with this `dataset`…")
    split: str | None = Field(
        default=None, description="… and this `split`; all but `test` if absent. TRAIN: not `test`."
    )
    json_mongodb_id: str | None = Field(default=None, description="A stored request message to run on.")
    priority: int = Field(default=0, description="Higher first.")
    max_attempts: int = Field(default=DEFAULT_MAX_ATTEMPTS, ge=1, le=100)
    patience: int | None = Field(
        default=None,
        ge=1,
        le=MAX_PATIENCE,
        description="TRAIN: end once so many iterations have brought no better mAP on the validation images.",
    )
    mirror: bool = Field(default=True, description="TRAIN: mirror half of the training images, left to right.")
    cancel_requested: bool = Field(default=False, description="Set to true to cancel.")
    traceparent: str | None = Field(default=None, description="W3C Trace Context: the client's trace and span.")
    tracestate: str | None = Field(default=None, description="W3C Trace Context.")


class SnapshotRef(BaseModel):
    """The snapshot to resume from: a file in GridFS `models`."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    file_id: ObjectId
    iteration: int
    sha256: str
    #: The attempt that stored it; unknown of one that an older version of the service stored.
    attempt: int | None = None


class Task(BaseModel):
    """A claimed task: one attempt, owned by one worker process. The id lists are not part of it."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    #: `_id` of the document: an ObjectId, or whatever the client chose.
    key: Any
    task_id: int
    task_type: Literal["TRAIN", "TEST"]
    params: ParamClass
    dataset: str | None
    split: str | None
    json_mongodb_id: ObjectId | None
    owner: str
    attempt: int
    #: When it was admitted, by the server's clock. A document that is deleted and inserted again under its `_id` may be
    #: claimed by the same worker, as its first attempt again: this alone tells the two tasks apart.
    create_time: datetime
    snapshot: SnapshotRef | None
    #: Set after an attempt ran out of device memory.
    batch_size_limit: int | None = Field(ge=1, lt=2**32)
    #: The last attempt of a task that keeps losing its workers: nothing may run beside it.
    runs_alone: bool = False
    #: A training ends once so many iterations have brought no better mAP on the validation images; None: never early.
    patience: int | None = None
    #: A training mirrors half of its images; what release 0.1.0 admitted does not say so.
    mirror: bool = False
    #: The client's trace; None where it has none, or none that is one.
    trace: Trace | None = None
    #: Why what the client gave for a trace is none.
    trace_problem: str | None = None

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Task":
        """The task in an admitted and claimed document. Raises ValueError for one that admission did not write.

        Anybody may have changed it since, or have written `admitted_id` without any admission. So what a run rests on
        is checked once more, the tables apart, which may change at any time.
        """
        task_id = _whole(document, "task_id", 0, UINT64_MAX)
        create_time = document.get("create_time")
        if not isinstance(create_time, datetime):
            # Else it would be made of a number too, and be no part of the fence any more.
            raise ValueError(f"create_time is {shown(create_time)}; expected a date")
        params = check_params(document.get("param_request"))
        split_model_name(params.model_name)
        task_type, split = document.get("task_type"), document.get("split")
        trace, trace_problem = read_trace(document)
        if task_type == "TRAIN":
            if params.net_model not in NETWORKS:
                raise ValueError(f"network {shown(params.net_model)} cannot be trained")
            if split == "test":
                raise ValueError("split is 'test', which a training never reads")
        return cls(
            key=document["_id"],
            task_id=task_id,
            task_type=task_type,
            params=params,
            dataset=document.get("dataset"),
            split=split,
            json_mongodb_id=object_id(document.get("json_mongodb_id")),
            owner=document.get("owner"),
            attempt=_whole(document, "attempt", 1, 2**31 - 1),
            create_time=create_time,
            snapshot=document.get("snapshot"),
            batch_size_limit=document.get("batch_size_limit"),
            runs_alone=document.get("runs_alone") is True,
            patience=None if document.get("patience") is None else _whole(document, "patience", 1, MAX_PATIENCE),
            mirror=_flag(document, "mirror"),
            trace=trace,
            trace_problem=trace_problem,
        )


def _flag(document: Mapping[str, Any], field: str) -> bool:
    value = document.get(field)
    if not isinstance(value, bool | None):
        raise ValueError(f"{field} is {shown(value)}; expected true or false")
    return value is True


def read_trace(document: Mapping[str, Any]) -> tuple[Trace | None, str | None]:
    """(the trace that a document is a part of, why what stands there is none), each None where there is nothing."""
    try:
        return trace_of(document.get("traceparent"), document.get("tracestate")), None
    except ValueError as error:
        # Never a reason to reject a task: it runs as well without.
        return None, str(error)


def _whole(document: Mapping[str, Any], field: str, low: int, high: int) -> int:
    try:
        number = whole_number(document.get(field))
        if low <= number <= high:
            return number
    except ValueError:
        pass
    raise ValueError(f"{field} is {shown(document.get(field))}; expected a whole number from {low} to {high}")


def task_name(task_id: Any) -> str:
    """How a log names a task: by its number, however a client wrote it; any other value as it stands there."""
    try:
        return str(whole_number(task_id))
    except ValueError:
        return shown(task_id)


def same(one: Any, other: Any) -> bool:
    """Whether two values from documents are the same, as the server sees it: NaN is NaN, and so it is deep inside."""
    try:
        return bool(one == other) or bson.encode({"": one}) == bson.encode({"": other})
    except BSONError:
        return False  # an `_id` that no BSON can be made of again, and so that of nothing that runs


def admitted(document: Mapping[str, Any]) -> bool:
    """Whether this very document has been answered; a copy of an answered one has not."""
    return "admitted_id" in document and same(document["admitted_id"], document.get("_id"))


def object_id(value: Any) -> ObjectId | None:
    """`value` as an ObjectId, from one or its 24 hex digits; None for anything else."""
    if isinstance(value, ObjectId):
        return value
    # Twelve bytes would do for bson too, and would be a guess.
    if isinstance(value, str) and len(value) == 24:
        try:
            return ObjectId(value)
        except InvalidId:
            return None
    return None
