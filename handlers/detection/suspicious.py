"""Labels that may be wrong: where a detector that is good at a class, and sure of itself, disagrees with them.

The kinds of errors are those of ObjectLab (Tkachenko et al. 2023, "ObjectLab: Automated Diagnosis of Mislabeled Images
in Object Detection Data": overlooked, swapped and badly located boxes), with duplicates and labels without an object.
When a detector is sure of itself is after confident learning (Northcutt et al. 2021, "Confident Learning: Estimating
Uncertainty in Dataset Labels"): not one score for all classes, but for each class its mean score where it is right.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from handlers.detection.boxes import Boxes, Detections, Floats, Ints, overlaps
from handlers.detection.coco import MATCH_IOU, Measured
from handlers.detection.scores import ClassScores
from schemas.result import SuspicionKind

#: A detection and a label that overlap by less are of different things.
LEAST_IOU = 0.3
#: Two labels of one class that overlap by more are of one object.
DUPLICATE_IOU = 0.9
#: A class is known well enough to doubt its labels from this F1 on, at its best threshold: more is right than wrong.
KNOWN_F1 = 0.5
#: That nothing at all is found is told of a class from this recall on, at its best threshold.
KNOWN_RECALL = 0.8

#: Labels that are compared with others of their class at once: somebody may have 10,000 in one image.
_BLOCK = 500


@dataclass(frozen=True)
class Suspect:
    """One label, or one detection that may lack its label."""

    image_id: int
    kind: SuspicionKind
    #: Of the label; of the detection where there is none. From 1.
    class_id: int
    #: Left, top, right, bottom, in pixels of the image as labelled.
    xyxy: Floats
    #: 0 … 1, to order suspects of all kinds by.
    suspicion: float
    #: The detection that disagrees, if one does, and its overlap with the label.
    detected_as: int | None = None
    score: float | None = None
    iou: float | None = None


@dataclass(frozen=True)
class Suspects:
    """How many there are of each kind, and the most suspicious of them, the first first."""

    counts: Counter[SuspicionKind]
    worst: list[Suspect]


@dataclass(frozen=True)
class _Knowledge:
    """What is known of each class; position 0 belongs to none."""

    #: A detection of at least this score is sure of itself; infinite for classes that are not known well enough.
    confident: Floats
    #: The best threshold.
    threshold: Floats
    #: Recall at that threshold, 0 for classes that are not known well enough.
    recall: Floats


@dataclass(frozen=True)
class _Image:
    id: int
    truths: Boxes
    #: The best first.
    found: Detections
    #: [detection, label].
    iou: Floats
    #: bool [detection]: it is sure of itself.
    sure: NDArray[np.bool_]
    #: bool [detection]: its class is labelled where it is, so that it disagrees with nobody.
    explained: NDArray[np.bool_]


def suspicious_labels(measured: Measured, scores: Sequence[ClassScores], most: int) -> Suspects:
    """Count the suspicious labels among the measured images, and name the `most` most suspicious.

    A detection is sure of itself from the mean score of the right detections of its class on (those of at least the
    class's best threshold); only classes with an F1 of at least `KNOWN_F1` there are heard. Then, by IoU:

    - `unlabelled`: a sure detection that overlaps no label, of whatever class, by `LEAST_IOU`. Of several in one place
      the best counts. Suspicion: its score.
    - `wrong_class`: a label that a sure detection of another class overlaps by 0.5, where no label of that other class
      does, and no detection of the label's own class that is as good. Suspicion: score times IoU.
    - `poor_box`: a label that a sure detection of its class overlaps by `LEAST_IOU` but not by 0.5, where that
      detection has no other label, and the label no other detection that counts. Suspicion: score times (1 - IoU).
    - `no_object`: a label that no detection of any class and score overlaps by `LEAST_IOU`, if its class has a recall
      of at least `KNOWN_RECALL`. Suspicion: that recall.
    - `duplicate`: a label that overlaps an earlier one of its class by more than `DUPLICATE_IOU`. Suspicion: the IoU.

    A label is named once: the first of `duplicate`, `wrong_class`, `poor_box`, `no_object` that fits. Crowds and
    difficult objects are not suspected, and explain the detections in them.
    """
    known = _knowledge(scores)
    counts: Counter[SuspicionKind] = Counter()
    worst: list[Suspect] = []
    for image in _images(measured, known):
        for suspect in _in_image(image, known):
            counts[suspect.kind] += 1
            worst.append(suspect)
        if len(worst) > 100 * most:
            worst = _worst(worst, most)
    return Suspects(counts, _worst(worst, most))


def _worst(suspects: list[Suspect], most: int) -> list[Suspect]:
    return sorted(suspects, key=lambda suspect: -suspect.suspicion)[:most]


def _knowledge(scores: Sequence[ClassScores]) -> _Knowledge:
    confident, threshold, recall = [np.inf], [np.inf], [0.0]
    for one in scores:
        best = one.best()
        known = best.threshold is not None and best.f1 >= KNOWN_F1
        right = one.scores[one.right & (one.scores >= best.threshold)] if best.threshold is not None else one.scores
        confident.append(float(right.mean(dtype=np.float64)) if known else np.inf)
        threshold.append(np.inf if best.threshold is None else best.threshold)
        recall.append(best.recall if known else 0.0)
    return _Knowledge(*(np.array(values, np.float32) for values in (confident, threshold, recall)))


def _images(measured: Measured, known: _Knowledge) -> Iterator[_Image]:
    """Each image with anything on it."""
    truth_order = np.argsort(measured.truth_images, kind="stable")
    found_order = np.argsort(measured.found_images, kind="stable")
    truth_images, found_images = measured.truth_images[truth_order], measured.found_images[found_order]
    for image_id in np.union1d(truth_images, found_images).tolist():
        of_truths, of_found = (
            order[slice(*np.searchsorted(images, [image_id, image_id + 1]))]
            for order, images in ((truth_order, truth_images), (found_order, found_images))
        )
        truths, all_found = measured.truths.select(of_truths), measured.found
        found = Detections(all_found.xyxy[of_found], all_found.class_ids[of_found], all_found.scores[of_found])
        iou = overlaps(found.xyxy, truths.xyxy, truths.crowd)
        explained = ((iou >= MATCH_IOU) & (found.class_ids[:, None] == truths.class_ids)).any(axis=1)
        sure = found.scores >= known.confident[found.class_ids]
        yield _Image(image_id, truths, found, iou, sure, explained)


def _in_image(image: _Image, known: _Knowledge) -> Iterator[Suspect]:
    truths = image.truths
    twins = _duplicates(truths)
    near = image.iou >= LEAST_IOU
    # Nearly every label is found as it is, and there is no more to ask of it.
    doubted: NDArray[np.bool_] = np.logical_or(near[image.sure & ~image.explained].any(axis=0), ~near.any(axis=0))
    for row in np.flatnonzero(truths.counted).tolist():
        if twins[row] > DUPLICATE_IOU:
            twin = float(twins[row])
            yield Suspect(image.id, "duplicate", int(truths.class_ids[row]), truths.xyxy[row], twin, iou=twin)
        elif doubted[row]:
            yield from _doubted(image, row, known)
    if image.sure.any():
        yield from _unlabelled(image)


def _doubted(image: _Image, row: int, known: _Knowledge) -> Iterator[Suspect]:
    """The label `row`, if it is suspicious and no duplicate."""
    found, near, sure = image.found, image.iou[:, row], image.sure & ~image.explained
    class_id, box = int(image.truths.class_ids[row]), image.truths.xyxy[row]
    own = found.class_ids == class_id
    for_it = found.scores[own & (near >= MATCH_IOU)].max(initial=0)
    # Detections are sorted, the best first.
    others = np.flatnonzero(sure & ~own & (near >= MATCH_IOU) & (found.scores > for_it))
    beside = np.flatnonzero(sure & own & (near >= LEAST_IOU) & (near < MATCH_IOU))
    if len(others):
        score, iou = float(found.scores[others[0]]), float(near[others[0]])
        detected_as = int(found.class_ids[others[0]])
        yield Suspect(image.id, "wrong_class", class_id, box, score * iou, detected_as, score, iou)
    elif len(beside) and for_it < known.threshold[class_id]:
        score, iou = float(found.scores[beside[0]]), float(near[beside[0]])
        yield Suspect(image.id, "poor_box", class_id, box, score * (1 - iou), None, score, iou)
    elif known.recall[class_id] >= KNOWN_RECALL and not (near >= LEAST_IOU).any():
        yield Suspect(image.id, "no_object", class_id, box, float(known.recall[class_id]))


def _unlabelled(image: _Image) -> Iterator[Suspect]:
    """The best of the sure detections in each place where there is no label."""
    found = image.found
    named: list[int] = []
    for row in np.flatnonzero(image.sure & ~(image.iou >= LEAST_IOU).any(axis=1)).tolist():
        if not (overlaps(found.xyxy[row : row + 1], found.xyxy[named]) >= MATCH_IOU).any():
            named.append(row)
            score = float(found.scores[row])
            yield Suspect(image.id, "unlabelled", int(found.class_ids[row]), found.xyxy[row], score, score=score)


def _duplicates(truths: Boxes) -> Floats:
    """float32 [len(truths)]: how much each overlaps the earlier one of its class that it overlaps most; no crowds."""
    most = np.zeros(len(truths), np.float32)
    for class_id in np.unique(truths.class_ids[~truths.crowd]).tolist():
        rows: Ints = np.flatnonzero((truths.class_ids == class_id) & ~truths.crowd)
        for start in range(0, len(rows), _BLOCK):
            part = rows[start : start + _BLOCK]
            earlier = rows[: start + len(part)]
            iou = overlaps(truths.xyxy[part], truths.xyxy[earlier])
            most[part] = np.where(earlier[None] < part[:, None], iou, 0).max(axis=1)
    return most
