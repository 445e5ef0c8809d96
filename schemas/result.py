"""`result` of a task document: the same names in documents, in `--json` and in reports."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.numbers import Count

#: Most images or classes named in a result; the counts beside them are whole.
MAX_EXAMPLES = 20
MAX_CLASSES_LISTED = 1000


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ClassMetrics(_Frozen):
    """COCO average precision of one class, 0 … 1; None where the measured images have none of it."""

    class_id: Count
    class_name: str
    map: float | None
    map_50: float | None
    instances: Count
    detections: Count


class Metrics(_Frozen):
    """COCO average precision (Lin et al. 2014), 0 … 1, over the images of one split."""

    map: float
    map_50: float
    map_75: float
    per_class: tuple[ClassMetrics, ...] = Field(max_length=MAX_CLASSES_LISTED)
    #: The split that was measured: train, val or test.
    on: str
    #: Classes of the data that the model does not know, and of the model that the data does not have.
    classes_not_in_model: tuple[str, ...] = ()
    classes_not_in_data: tuple[str, ...] = ()


class SkippedImage(_Frozen):
    """An image that was not used; `img_id` is its hex id in IMG_INFO."""

    img_id: str
    reason: str


class ImagesUsed(_Frozen):
    """How many images took part."""

    used: Count
    skipped: Count
    skipped_examples: tuple[SkippedImage, ...] = Field((), max_length=MAX_EXAMPLES)


class Result(_Frozen):
    """What a finished task says. Fields below `reports` belong to one kind of task and are absent in the other."""

    model_name: str
    version: int
    #: What really ran: `cuda:0`, `cpu`, `cpu (fallback)`.
    device: str
    #: Absent where there are no labels.
    metrics: Metrics | None = None
    images: ImagesUsed
    seconds: float = Field(ge=0)
    #: Name of each report file, with its hex id in GridFS `reports`.
    reports: dict[str, str] = {}
    #: Things the reader should know: a smaller batch after running out of memory, no validation images, …
    notes: tuple[str, ...] = ()

    # TRAIN
    iterations: int | None = None
    best_iteration: int | None = None
    resumed_from_iteration: int | None = None
    initial_weights: str | None = None
    class_names: tuple[str, ...] | None = None
    data_fingerprint: str | None = None

    # TEST
    images_per_second: float | None = None
    detections: int | None = None

    def document(self, task_type: Literal["TRAIN", "TEST"]) -> dict[str, Any]:
        """As stored: the fields of `task_type`, JSON types only, without what is absent."""
        other = {"images_per_second", "detections"} if task_type == "TRAIN" else set(_TRAIN_ONLY)
        document = self.model_dump(mode="json", exclude=other)
        keep_null = {"resumed_from_iteration"}
        return {key: value for key, value in document.items() if value is not None or key in keep_null}


_TRAIN_ONLY = (
    "iterations",
    "best_iteration",
    "resumed_from_iteration",
    "initial_weights",
    "class_names",
    "data_fingerprint",
)
