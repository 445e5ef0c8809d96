"""The child's contract: a job comes in as one folder with a `job.json`, JSON lines go out.

The worker that starts a child and the child agree on this file alone. The child is given no MongoDB address; files are
its whole world. It writes one JSON object a line, each with an `event` (see the models below), and its own log to
stderr.

A child decodes whatever images people have, and may one day be led astray by one. So what it says is held to bounds
here, once: numbers that MongoDB can hold, names that may be fields, files in its own folder. Texts for people are cut.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationInfo, with_config
from typing_extensions import TypedDict  # pydantic wants it, not that of `typing`, before Python 3.12

from schemas.card import TrainingFacts
from schemas.numbers import UINT64_MAX, Count
from schemas.result import ImagesUsed, Leaks, Metrics

#: Characters kept of a text for people.
_MAX_TEXT = 3000


def _cut(text: str) -> str:
    return text[:_MAX_TEXT]


def _made(path: Path, info: ValidationInfo) -> Path:
    """`path`, if it is a file in the folder `out` of the context; without a context, any path."""
    if info.context is not None:
        out: Path = info.context["out"]
        try:
            # Resolved, so that neither `..` nor a link leads out of it.
            good = path.resolve().is_relative_to(out.resolve()) and path.is_file()
        except (OSError, RuntimeError, ValueError):  # A loop of links, a name too long or with a zero byte.
            good = False
        if not good:
            raise ValueError(f"expected a file in {out}")
    return path


Text = Annotated[str, AfterValidator(_cut)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
#: A file that the child made.
Made = Annotated[Path, AfterValidator(_made)]
Positive = Annotated[float, Field(ge=0)]
Reports = Annotated[
    dict[Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")], Made], Field(max_length=100)
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TestedModel(_Frozen):
    """The registered model that a test runs."""

    #: ONNX file: network, box decoding and non-maximum suppression (see `handlers.detection.export`).
    onnx: Path
    #: `class_names[i]` is class id i + 1.
    class_names: tuple[str, ...]
    #: Side of the square input, pixels.
    input_size: int
    #: The score from which on detections of a class count, as its training measured it, in the order of `class_names`;
    #: None where that is unknown. Empty for models of release 0.1.0.
    thresholds: tuple[float | None, ...] = ()
    #: `name:version`.
    reference: str = ""


class Job(_Frozen):
    """One attempt at one task."""

    task_id: str
    attempt: int
    kind: Literal["TRAIN", "TEST"]
    #: ParamClass, checked; enumerations by name.
    params: dict[str, object]
    #: torch names, one process each: `cuda:0`, … or `cpu`.
    devices: tuple[str, ...]
    seed: int = 0
    #: The request message, JSON.
    message: Path
    #: JSON lines, one an image of the message: `{"id": 1, "path": "…"}` or `{"id": 1, "reason": "why there is none"}`.
    images: Path
    #: Where the child puts what comes out.
    out: Path
    #: Variables that the child sets for itself and all that it starts: the client's trace, for the child's own
    #: instrumentation (TRACEPARENT, TRACESTATE). Not when the child is started, since a warm one knows no task yet.
    environment: dict[Literal["TRACEPARENT", "TRACESTATE"], str] = {}
    #: TRAIN: the snapshot to go on from.
    resume_from: Path | None = None
    #: TRAIN: the weights to begin with (see `handlers.detection.fine_tune`), where there is no snapshot.
    start_from: Path | None = None
    #: Images in a forward pass instead of `batch_size`, over all devices, after running out of device memory.
    batch_size_limit: int | None = None
    #: TRAIN: end once so many iterations have brought no better mAP on the validation images; None: never early.
    patience: int | None = None
    #: TRAIN: mirror half of the training images, left to right.
    mirror: bool = True
    #: TEST only.
    model: TestedModel | None = None


class Received(_Frozen):
    """The child has its job. One that dies before it says so would have died of any other job as well."""

    event: Literal["received"] = "received"


class Started(_Frozen):
    """The data is read and the network is built; the first iteration begins."""

    event: Literal["started"] = "started"
    device: Text
    #: TRAIN: where the weights came from, and the iteration they stand at.
    initial_weights: Text | None = None
    iteration: Count = 0


class Progress(_Frozen):
    """How far the attempt is; at most a few a second. In a test, an iteration is an image."""

    event: Literal["progress"] = "progress"
    iteration: Count
    max_num_iters: int = Field(ge=0, le=UINT64_MAX)
    loss: float | None = None
    learning_rate: float | None = None
    images_per_second: Positive
    eta_seconds: Positive


class Measured(_Frozen):
    """A measurement worth keeping, one for each of some iterations: `loss`, `learning_rate`, `map`, `map_50`, …"""

    event: Literal["measured"] = "measured"
    iteration: Count
    #: The names are fields of a document of DL_TASK_METRIC.
    values: dict[Annotated[str, Field(pattern="^[a-z][a-z0-9_]{0,63}$")], float] = Field(min_length=1, max_length=100)


class Snapshot(_Frozen):
    """A snapshot to resume from is on disk, whole. The worker may delete it once a newer one is stored."""

    event: Literal["snapshot"] = "snapshot"
    path: Made
    iteration: Count
    sha256: Sha256


class Note(_Frozen):
    """Something for the log and for the `notes` of the result."""

    event: Literal["note"] = "note"
    message: Text


class Trained(_Frozen):
    """The training is over; `onnx` is the model to register, `weights` what another training can begin with."""

    event: Literal["trained"] = "trained"
    onnx: Made
    sha256: Sha256
    weights: Made | None = None
    weights_sha256: Sha256 | None = None
    class_names: tuple[str, ...]
    input_size: Count
    iterations: Count
    best_iteration: Count
    resumed_from_iteration: Count | None
    initial_weights: Text
    #: `dataset_info.fingerprint` of the message.
    data_fingerprint: Text
    device: Text
    metrics: Metrics
    leaks: Leaks | None = None
    images: ImagesUsed
    #: Name of each picture, and of `report.html`, with its file.
    reports: Reports
    card: TrainingFacts | None = None


class Tested(_Frozen):
    """The test is over. `detections` is a file of JSON lines, one an image that was used (see `DETECTIONS`)."""

    event: Literal["tested"] = "tested"
    detections: Made
    detection_count: Count
    images_per_second: Positive
    device: Text
    metrics: Metrics | None
    leaks: Leaks | None = None
    images: ImagesUsed
    reports: Reports


class Stopped(_Frozen):
    """SIGTERM was heard; the last snapshot (TRAIN) is on disk and was announced."""

    event: Literal["stopped"] = "stopped"
    iteration: Count


class Failed(_Frozen):
    """The attempt cannot go on.

    `data`: too few usable images, a message that is none. `loss`: a loss that is not finite. `memory`: out of device
    memory. `snapshot`: the snapshot to resume from cannot be read. `machine`: a full disk or the like, so that another
    machine may do better. `bug`: anything else, with its traceback on stderr.
    """

    event: Literal["failed"] = "failed"
    kind: Literal["data", "loss", "memory", "snapshot", "machine", "bug"]
    message: Text
    field: Text | None = None


Event = Annotated[
    Received | Started | Progress | Measured | Snapshot | Note | Trained | Tested | Stopped | Failed,
    Field(discriminator="event"),
]
EVENT: TypeAdapter[Event] = TypeAdapter(Event)


def parse_event(line: bytes, out: Path) -> Event:
    """The event that a child said in `line`; its files lie in the folder `out`. Raises ValidationError."""
    return EVENT.validate_json(line, context={"out": out})


@with_config(ConfigDict(extra="forbid", allow_inf_nan=False))
class _Detection(TypedDict):
    class_id: Count
    class_name: str
    score: float
    #: x, y, w, h in pixels of the image as its labels are.
    bbox: Annotated[list[float], Field(min_length=4, max_length=4)]


@with_config(ConfigDict(extra="forbid"))
class _ImageDetections(TypedDict):
    image_id: Count
    #: Best score first.
    detections: Annotated[list[_Detection], Field(max_length=1000)]


#: One line of the file of detections. Plain dictionaries, since there are millions.
DETECTIONS: TypeAdapter[_ImageDetections] = TypeAdapter(_ImageDetections)
