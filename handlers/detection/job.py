"""The child's contract: a job comes in as one folder with a `job.json`, JSON lines go out.

The worker that starts a child and the child agree on this file alone. The child is given no MongoDB address; files are
its whole world. It writes one JSON object a line, each with an `event` (see the models below), and its own log to
stderr.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from schemas.result import ImagesUsed, Metrics


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TestedModel(_Frozen):
    """The registered model that a test runs."""

    #: ONNX file: network, box decoding and non-maximum suppression (see `handlers.detection.export`).
    onnx: Path
    #: `class_names[i]` is class id i + 1.
    class_names: tuple[str, ...]
    #: Side of the square input, pixels.
    input_size: int


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
    #: TRAIN: the snapshot to go on from.
    resume_from: Path | None = None
    #: TRAIN: images in a step instead of `batch_size`, after running out of device memory.
    batch_size_limit: int | None = None
    #: TEST only.
    model: TestedModel | None = None


class Started(_Frozen):
    """The data is read and the network is built; the first iteration begins."""

    event: Literal["started"] = "started"
    device: str
    #: TRAIN: where the weights came from, and the iteration they stand at.
    initial_weights: str | None = None
    iteration: int = 0


class Progress(_Frozen):
    """How far the attempt is; at most a few a second. In a test, an iteration is an image."""

    event: Literal["progress"] = "progress"
    iteration: int
    max_num_iters: int
    loss: float | None = None
    learning_rate: float | None = None
    images_per_second: float
    eta_seconds: float


class Measured(_Frozen):
    """A measurement worth keeping, one for each of some iterations: `loss`, `learning_rate`, `map`, `map_50`, …"""

    event: Literal["measured"] = "measured"
    iteration: int
    values: dict[str, float]


class Snapshot(_Frozen):
    """A snapshot to resume from is on disk, whole. The worker may delete it once a newer one is stored."""

    event: Literal["snapshot"] = "snapshot"
    path: Path
    iteration: int
    sha256: str


class Note(_Frozen):
    """Something for the log and for the `notes` of the result."""

    event: Literal["note"] = "note"
    message: str


class Trained(_Frozen):
    """The training is over; `onnx` is the model to register."""

    event: Literal["trained"] = "trained"
    onnx: Path
    sha256: str
    class_names: tuple[str, ...]
    input_size: int
    iterations: int
    best_iteration: int
    resumed_from_iteration: int | None
    initial_weights: str
    #: `dataset_info.fingerprint` of the message.
    data_fingerprint: str
    device: str
    metrics: Metrics
    images: ImagesUsed
    #: Name of each picture, with its file.
    reports: dict[str, Path]


class Tested(_Frozen):
    """The test is over. `detections` is a file of JSON lines, one an image that was used:

    `{"image_id": 1, "detections": [{"class_id", "class_name", "score", "bbox": [x, y, w, h]}]}`, boxes in pixels of the
    image as its labels are, best score first.
    """

    event: Literal["tested"] = "tested"
    detections: Path
    detection_count: int
    images_per_second: float
    device: str
    metrics: Metrics | None
    images: ImagesUsed
    reports: dict[str, Path]


class Stopped(_Frozen):
    """SIGTERM was heard; the last snapshot (TRAIN) is on disk and was announced."""

    event: Literal["stopped"] = "stopped"
    iteration: int


class Failed(_Frozen):
    """The attempt cannot go on.

    `data`: too few usable images, a message that is none. `loss`: a loss that is not finite. `memory`: out of device
    memory. `snapshot`: the snapshot to resume from cannot be read. `bug`: anything else, with its traceback on stderr.
    """

    event: Literal["failed"] = "failed"
    kind: Literal["data", "loss", "memory", "snapshot", "bug"]
    message: str
    field: str | None = None


Event = Annotated[
    Started | Progress | Measured | Snapshot | Note | Trained | Tested | Stopped | Failed,
    Field(discriminator="event"),
]
EVENT: TypeAdapter[Event] = TypeAdapter(Event)
