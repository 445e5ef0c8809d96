"""How good detections are: average precision, the best scores to cut at, what is taken for what, the worst images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from handlers.detection.boxes import Boxes, Detections
from handlers.detection.calibration import calibration
from handlers.detection.coco import ALL_SIZES, LARGE, MATCH_IOU, MEDIUM, SMALL, CocoEvaluation, collect, xywh
from handlers.detection.confusion import ConfusionCounts, confusion
from handlers.detection.errors import DataError
from handlers.detection.mistakes import ImageMistakes, worst_images
from handlers.detection.scores import Best, ClassScores, best_for_all, class_scores
from handlers.detection.suspicious import Suspect, Suspects, suspicious_labels
from schemas.result import (
    BACKGROUND,
    MAX_CLASSES_BYTES,
    MAX_CLASSES_IN_CONFUSION,
    MAX_CLASSES_LISTED,
    MAX_CLASSES_WITH_CURVE,
    MAX_SUSPICIOUS,
    MAX_WORST,
    RECALLS,
    AtThreshold,
    ClassMetrics,
    Confusion,
    Metrics,
    Rates,
    SizeMetrics,
    SuspicionKind,
    Suspicious,
    SuspiciousLabel,
    WorstImage,
)

#: Bytes of a row of `per_class` as BSON without its name and its curve, and those of a curve; rounded up.
_ROW_BYTES, _CURVE_BYTES = 370, 300


@dataclass(frozen=True)
class Evaluation:
    """The numbers for the result, and what the pictures show besides."""

    metrics: Metrics
    #: `class_names[i]` is class i + 1.
    class_names: tuple[str, ...]
    #: Interpolated precision at IoU 0.5 [recall 0, 0.01, … 1; class]; -1 where a class has no labelled object.
    precision: NDArray[np.float64]
    scores: list[ClassScores]
    #: The one threshold for all classes.
    threshold: float
    confusion: ConfusionCounts
    worst: list[ImageMistakes]
    suspects: Suspects

    @property
    def thresholds(self) -> tuple[float | None, ...]:
        """The best threshold of each class, in their order; None where nothing right was found."""
        return tuple(one.best().threshold for one in self.scores)


def measurable(truths: Iterable[Boxes]) -> bool:
    """Whether there is any labelled object to find; a crowd is none, and neither is what is difficult."""
    return any(boxes.counted.any() for boxes in truths)


def average_precision(
    image_ids: Sequence[int], truths: Mapping[int, Boxes], detections: Mapping[int, Detections], classes: int
) -> dict[str, float]:
    """`map`, `map_50` and `map_75` alone, as `evaluate` has them, in a fraction of its time. Raises DataError."""
    _check(image_ids, truths)
    precision = CocoEvaluation(collect(image_ids, truths, detections, classes)).precision([ALL_SIZES])[..., 0]
    return _overall(precision)


def evaluate(
    image_ids: Sequence[int],
    truths: Mapping[int, Boxes],
    detections: Mapping[int, Detections],
    class_names: Sequence[str],
    on: str,
    mongodb_ids: Mapping[int, str],
    thresholds: Sequence[float | None] = (),
) -> Evaluation:
    """Measure `detections` on the images `image_ids`, whose labels are `truths` (by image id, both in pixels).

    Average precision is COCO's (Lin et al. 2014, https://cocodataset.org/#detection-eval; computed by
    faster-coco-eval): `map` is over IoU thresholds 0.50, 0.55, … 0.95 and all classes that have a labelled object.
    What the other numbers are is said in `schemas.result`; all but the confusion rest on the same matches as `map_50`.
    `class_names[i]` is class i + 1; boxes of other classes do not count, and neither do images that are not in
    `image_ids`. `on` names the split; `mongodb_ids` are the ids of the images in IMG_INFO. `thresholds` are those that
    the model brought along, one for each class (None is unknown), if it did. Of more classes than a result can list,
    those with most labelled objects are listed.

    Raises DataError where no image has a labelled object: then there is nothing to measure (see `measurable`).
    """
    _check(image_ids, truths)
    measured = collect(image_ids, truths, detections, len(class_names))
    coco = CocoEvaluation(measured)
    by_size = coco.precision([ALL_SIZES, SMALL, MEDIUM, LARGE])
    precision = by_size[..., 0]
    found = coco.match(same_class=True)
    scores = class_scores(measured, found)
    threshold, f1 = best_for_all(scores)
    taken = confusion(measured, coco.match(same_class=False), threshold)
    worst = worst_images(measured, found, threshold, MAX_WORST)
    suspects = suspicious_labels(measured, scores, MAX_SUSPICIOUS)
    given = _at_thresholds(scores, thresholds)
    detected = _count(len(class_names), (detections[i].class_ids for i in image_ids if i in detections))
    metrics = Metrics(
        **_overall(precision),
        per_class=_listed(class_names, precision, scores, detected, given),
        on=on,
        threshold=threshold,
        f1=f1,
        confusion=_confusion(taken, class_names, threshold),
        size=SizeMetrics(
            small=_average(by_size[..., 1]), medium=_average(by_size[..., 2]), large=_average(by_size[..., 3])
        ),
        worst=tuple(
            WorstImage(img_id=mongodb_ids[image.image_id], missed=image.missed_count, false=image.false_count)
            for image in worst
        ),
        at_model_thresholds=_mean(list(given.values())),
        suspicious=_suspicious(suspects, class_names, mongodb_ids),
        calibration=calibration(scores),
    )
    return Evaluation(metrics, tuple(class_names), precision[0], scores, threshold, taken, worst, suspects)


def names_that_fit(names: Iterable[str], room: int, each: int = 10) -> tuple[str, ...]:
    """The first `MAX_CLASSES_LISTED` of `names`, or fewer: with `each` bytes beside a name, all fit into `room`."""
    fitting = []
    for name in islice(names, MAX_CLASSES_LISTED):
        room -= each + len(name.encode(errors="replace"))
        if room < 0:
            break
        fitting.append(name)
    return tuple(fitting)


def _check(image_ids: Sequence[int], truths: Mapping[int, Boxes]) -> None:
    if not measurable(truths[image_id] for image_id in image_ids if image_id in truths):
        raise DataError("no image has a labelled object to measure against")


def _overall(precision: NDArray[np.float64]) -> dict[str, float]:
    return {
        "map": _average(precision) or 0.0,
        "map_50": _average(precision[0]) or 0.0,
        "map_75": _average(precision[5]) or 0.0,
    }


def _listed(
    class_names: Sequence[str],
    precision: NDArray[np.float64],
    scores: Sequence[ClassScores],
    detected: Any,
    given: Mapping[int, AtThreshold],
) -> tuple[ClassMetrics, ...]:
    """A row for each class, in the order of their ids; of too many, for those with most labelled objects."""
    with_curve = len(class_names) <= MAX_CLASSES_WITH_CURVE
    order = sorted(range(len(class_names)), key=lambda index: -scores[index].instances)
    each = _ROW_BYTES + (_CURVE_BYTES if with_curve else 0)
    fitting = names_that_fit((class_names[index] for index in order), MAX_CLASSES_BYTES, each)
    rows = (
        _row(index, class_names[index], precision[:, :, index], scores[index], int(detected[index]), with_curve)
        for index in sorted(order[: len(fitting)])
    )
    return tuple(row.model_copy(update={"at_model_threshold": given.get(row.class_id - 1)}) for row in rows)


def _at_thresholds(scores: Sequence[ClassScores], thresholds: Sequence[float | None]) -> dict[int, AtThreshold]:
    """What comes of the given thresholds, by the index of the class; of classes with a threshold and an object."""
    found = {}
    for index, (one, threshold) in enumerate(zip(scores, thresholds, strict=False)):
        if threshold is not None and one.instances:
            at = one.at(threshold)
            found[index] = AtThreshold(threshold=threshold, precision=at.precision, recall=at.recall, f1=at.f1)
    return found


def _mean(rates: Sequence[AtThreshold]) -> Rates | None:
    if not rates:
        return None
    precision, recall, f1 = np.mean([(one.precision, one.recall, one.f1) for one in rates], axis=0).tolist()
    return Rates(precision=precision, recall=recall, f1=f1)


def _suspicious(suspects: Suspects, class_names: Sequence[str], mongodb_ids: Mapping[int, str]) -> Suspicious:
    def box(suspect: Suspect) -> tuple[float, float, float, float]:
        left, top, width, height = (round(value, 2) for value in xywh(suspect.xyxy[None])[0])
        return left, top, width, height

    examples = tuple(
        SuspiciousLabel(
            img_id=mongodb_ids[one.image_id],
            kind=one.kind,
            class_name=class_names[one.class_id - 1],
            detected_as=None if one.detected_as is None else class_names[one.detected_as - 1],
            score=one.score,
            iou=one.iou,
            bbox=box(one),
        )
        for one in suspects.worst
    )
    return Suspicious(counts={kind: suspects.counts[kind] for kind in get_args(SuspicionKind)}, examples=examples)


def _row(
    index: int, name: str, precision: NDArray[np.float64], scores: ClassScores, detected: int, with_curve: bool
) -> ClassMetrics:
    common: dict[str, Any] = {
        "class_id": index + 1,
        "class_name": name,
        "map": _average(precision),
        "map_50": _average(precision[0]),
        "instances": scores.instances,
        "detections": detected,
    }
    if not scores.instances:
        return ClassMetrics(**common)
    best: Best = scores.best()
    # Every fifth of COCO's 101 recalls.
    curve = tuple(precision[0, :: 100 // (len(RECALLS) - 1)].tolist()) if with_curve else None
    return ClassMetrics(
        **common,
        precision=best.precision,
        recall=best.recall,
        f1=best.f1,
        threshold=best.threshold,
        precision_at_recall=curve,
    )


def _confusion(taken: ConfusionCounts, class_names: Sequence[str], threshold: float) -> Confusion | None:
    if len(class_names) > MAX_CLASSES_IN_CONFUSION:
        return None
    counts = taken.table(range(1, len(class_names) + 1)).tolist()
    return Confusion(iou=MATCH_IOU, threshold=threshold, labels=(*class_names, BACKGROUND), counts=counts)


def _count(classes: int, class_ids: Iterable[Any]) -> Any:
    counts = np.zeros(classes + 1, np.int64)
    for ids in class_ids:
        counts += np.bincount(ids[ids <= classes], minlength=classes + 1)
    return counts[1:]


def _average(precision: NDArray[np.float64]) -> float | None:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None
