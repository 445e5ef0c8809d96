"""`result` of a task document: the same names in documents, in `--json` and in reports."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from schemas.numbers import Count

#: Most images or classes named in a result; the counts beside them are whole.
MAX_EXAMPLES = 20
MAX_CLASSES_LISTED = 1000
#: Bytes that the rows of `per_class` may take as BSON, about: names have up to 200 characters.
MAX_CLASSES_BYTES = 400_000
#: Bytes that either list of classes that one side lacks may take.
MAX_NAMES_BYTES = 100_000
#: With more classes than these there is no `precision_at_recall`, and no `confusion`.
MAX_CLASSES_WITH_CURVE = 100
MAX_CLASSES_IN_CONFUSION = 50
#: The recalls of `precision_at_recall`.
RECALLS = tuple(step / 20 for step in range(21))
#: Most images in `worst`.
MAX_WORST = 8
#: Most labels in `suspicious.examples`, and bins of `calibration`.
MAX_SUSPICIOUS = 20
MAX_BINS = 20
#: The name in a confusion matrix for where there is no object, and for where none was found.
BACKGROUND = "background"

#: 0 … 1.
Share = Annotated[float, Field(ge=0, le=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Sparse(_Frozen):
    """In documents, fields that may be left out are absent where they are None; those that are required are null."""

    @model_serializer(mode="wrap")
    def _present(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        document: dict[str, Any] = serialize(self)
        return {key: value for key, value in document.items() if value is not None or fields[key].is_required()}


class Rates(_Frozen):
    """Precision, recall and F1 at IoU 0.5."""

    precision: Share
    recall: Share
    f1: Share


class AtThreshold(Rates):
    """What comes of a threshold that was chosen on other images: it is not the best one here, and so no optimist."""

    #: Detections of at least this score count.
    threshold: float


class ClassMetrics(_Sparse):
    """How well one class is found. Where the measured images have none of it, `map` and `map_50` are null, and the
    fields below the counts are absent.
    """

    class_id: Count
    class_name: str
    #: COCO average precision, 0 … 1: over IoU 0.50, 0.55, … 0.95, and at IoU 0.50.
    map: float | None
    map_50: float | None
    #: Labelled objects; detections of whatever score.
    instances: Count
    detections: Count
    #: At IoU 0.5 and the score at which F1 is highest: the share of the detections that are right, the share of the
    #: objects that are found, and 2 * precision * recall / (precision + recall). 0 where nothing right was found.
    precision: Share | None = None
    recall: Share | None = None
    f1: Share | None = None
    #: That score: detections of at least this count. Absent where nothing right was found.
    threshold: float | None = None
    #: TEST: the same at the threshold that the model brought along from its validation images; absent without one.
    at_model_threshold: AtThreshold | None = None
    #: The highest precision at IoU 0.5 with at least the recall of each of `RECALLS`; absent above
    #: `MAX_CLASSES_WITH_CURVE` classes.
    precision_at_recall: tuple[Share, ...] | None = Field(None, min_length=len(RECALLS), max_length=len(RECALLS))


class Confusion(_Frozen):
    """What was taken for what: `counts[i][j]` objects of `labels[i]` were detected as `labels[j]`.

    Detections of at least the score `threshold` are matched to objects of any class (see
    `handlers.detection.confusion`). The last row counts detections that found no object, the last column objects that
    no detection found.
    """

    iou: Share
    threshold: float
    #: The model's classes, and `BACKGROUND`.
    labels: tuple[str, ...] = Field(max_length=MAX_CLASSES_IN_CONFUSION + 1)
    counts: tuple[Annotated[tuple[Count, ...], Field(max_length=MAX_CLASSES_IN_CONFUSION + 1)], ...] = Field(
        max_length=MAX_CLASSES_IN_CONFUSION + 1
    )


class SizeMetrics(_Frozen):
    """COCO average precision over objects of an area in pixels up to 32², up to 96², above; None where there are none.

    The area is that of the labelled box, in the image as it is stored.
    """

    small: float | None
    medium: float | None
    large: float | None


class WorstImage(_Frozen):
    """An image with many mistakes: objects that were missed, detections that are false, at `Metrics.threshold`.

    An object that is found as another class counts in both.
    """

    #: Its hex id in IMG_INFO.
    img_id: str
    missed: Count
    false: Count


SuspicionKind = Literal["unlabelled", "wrong_class", "poor_box", "no_object", "duplicate"]


class SuspiciousLabel(_Sparse):
    """A label that may be wrong, or a detection that may lack its label (see `handlers.detection.suspicious`)."""

    #: Hex id in IMG_INFO.
    img_id: str
    kind: SuspicionKind
    #: Of the label; `unlabelled`: of the detection.
    class_name: str
    #: `wrong_class`: the class that was found there.
    detected_as: str | None = None
    #: Of the detection that disagrees; absent where none does.
    score: Share | None = None
    #: Of the label with that detection; `duplicate`: with the other label.
    iou: Share | None = None
    #: The label, `unlabelled`: the detection, `[x, y, w, h]` in pixels of the image as labelled.
    bbox: tuple[float, float, float, float]


class Suspicious(_Frozen):
    """Where labels and confident detections disagree."""

    #: How many there are of each kind, whole.
    counts: dict[SuspicionKind, Count]
    #: The most suspicious first.
    examples: tuple[SuspiciousLabel, ...] = Field(max_length=MAX_SUSPICIOUS)


class CalibrationBin(_Frozen):
    """Detections of like scores."""

    #: Their mean score, and the share of them that is right.
    score: Share
    precision: Share
    count: Count


class Calibration(_Frozen):
    """Whether scores can be read as probabilities (see `handlers.detection.calibration`)."""

    #: Expected calibration error, 0 … 1, over the detections from the score `from_score` on; None without any.
    ece: Share | None
    from_score: Share
    #: By score, lowest first, from 0 on; bins without detections are left out.
    bins: tuple[CalibrationBin, ...] = Field(max_length=MAX_BINS)


class Metrics(_Sparse):
    """COCO average precision (Lin et al. 2014), 0 … 1, over the images of one split, and where it is lost.

    The fields below `classes_not_in_data` are absent in the results of release 0.1.0.
    """

    map: float
    map_50: float
    map_75: float
    per_class: tuple[ClassMetrics, ...] = Field(max_length=MAX_CLASSES_LISTED)
    #: The split that was measured: train, val or test.
    on: str
    #: Classes of the data that the model does not know, and of the model that the data does not have.
    classes_not_in_model: tuple[str, ...] = ()
    classes_not_in_data: tuple[str, ...] = ()
    #: The score at which the mean F1 of the classes (at IoU 0.5, one score for all) is highest, and that F1. The score
    #: is 0.5 where nothing right was found.
    threshold: float | None = None
    f1: Share | None = None
    #: Absent above `MAX_CLASSES_IN_CONFUSION` classes.
    confusion: Confusion | None = None
    size: SizeMetrics | None = None
    #: Most mistakes first.
    worst: tuple[WorstImage, ...] | None = Field(None, max_length=MAX_WORST)
    #: TEST: means over the classes that have labelled objects and a threshold of the model; absent without any.
    at_model_thresholds: Rates | None = None
    suspicious: Suspicious | None = None
    calibration: Calibration | None = None


class SkippedImage(_Frozen):
    """An image that was not used; `img_id` is its hex id in IMG_INFO."""

    img_id: str
    reason: str


class ImagesUsed(_Frozen):
    """How many images took part."""

    used: Count
    skipped: Count
    skipped_examples: tuple[SkippedImage, ...] = Field((), max_length=MAX_EXAMPLES)


class NearIdentical(_Frozen):
    """A measured image, and the training image that it is nearly identical to; hex ids in IMG_INFO."""

    img_id: str
    other_img_id: str
    #: Differing bits of their fingerprints.
    distance: Count


class Leaks(_Sparse):
    """Images that are measured on and, nearly the same, trained on: what is measured there is too good to be true."""

    #: Measured images with a nearly identical training image, of those that were compared.
    count: Count
    compared: Count
    #: Training images that they were compared with.
    training_images: Count
    #: TRAIN: training images whose fingerprint another one has too, beyond the first of each.
    duplicates_in_training: Count | None = None
    #: The most alike first.
    examples: tuple[NearIdentical, ...] = Field(max_length=MAX_EXAMPLES)


class Result(_Frozen):
    """What a finished task says. Fields below `reports` belong to one kind of task and are absent in the other."""

    model_name: str
    version: int
    #: What really ran: `cuda:0`, `cpu`, `cpu (fallback)`.
    device: str
    #: Absent where there are no labels.
    metrics: Metrics | None = None
    #: Absent where there is nothing to compare with: of models of release 0.1.0 nobody knows the training images.
    leaks: Leaks | None = None
    images: ImagesUsed
    seconds: float = Field(ge=0)
    #: Name of each report file (pictures, `report.html`), with its hex id in GridFS `reports`.
    reports: dict[str, str] = {}
    #: Things the reader should know: batches taken in parts after running out of memory, no validation images, …
    notes: tuple[str, ...] = ()

    # TRAIN
    iterations: int | None = None
    best_iteration: int | None = None
    resumed_from_iteration: int | None = None
    initial_weights: str | None = None
    #: The version whose weights the training began with; absent where it began with the network's own.
    parent_version: int | None = None
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
    "parent_version",
    "class_names",
    "data_fingerprint",
)
