"""Precision, recall and F1 of one class over the score from which on its detections count; and the best such score."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from handlers.detection.boxes import Floats, Ints
from handlers.detection.coco import Measured

#: Stands for the best score where nothing right was found at any.
DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class Best:
    """A threshold on the score, with what comes of it. All is 0, and the threshold None, if nothing right was found."""

    threshold: float | None
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class ClassScores:
    """The detections of one class, best first; without those that found what does not count, which are not false."""

    #: float32 [N], descending.
    scores: Floats
    #: bool [N].
    right: NDArray[np.bool_]
    #: Labelled objects that count.
    instances: int

    def best(self) -> Best:
        """The threshold of the highest F1; of equals the highest. See `_below`."""
        f1 = self.f1()
        if not self.right.any() or not self.instances:
            return Best(None, 0.0, 0.0, 0.0)
        # Detections of one score stand or fall together.
        last = np.append(self.scores[1:] < self.scores[:-1], True)
        at = int(np.where(last, f1, -1).argmax())
        right = int(self.right[: at + 1].sum())
        return Best(_below(self.scores, at), right / (at + 1), right / self.instances, float(f1[at]))

    def at(self, threshold: float) -> Best:
        """What comes of `threshold`; without a detection that counts, all is 0."""
        counted = int(np.searchsorted(-self.scores, -np.float32(threshold), side="right"))
        right = int(self.right[:counted].sum())
        if not right or not self.instances:
            return Best(threshold, 0.0, 0.0, 0.0)
        return Best(threshold, right / counted, right / self.instances, 2 * right / (counted + self.instances))

    def f1_at(self, thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
        """F1 if detections of at least each of `thresholds` count."""
        counted = np.searchsorted(-self.scores, -thresholds, side="right")
        return np.concatenate([[0.0], self.f1()])[counted]

    def f1(self) -> NDArray[np.float64]:
        """F1 of the first 1, 2, … detections: twice the right ones over detections and objects."""
        count = np.arange(1, len(self.scores) + 1)
        return np.asarray(2 * np.cumsum(self.right) / (count + self.instances), np.float64)


def class_scores(measured: Measured, found: Ints) -> list[ClassScores]:
    """Of each class. `found` is what each detection found of its class (`CocoEvaluation.match`)."""
    truths, detections = measured.truths, measured.found
    instances = np.bincount(truths.class_ids[truths.counted], minlength=measured.classes + 1)
    rows = np.flatnonzero(~uncounted(measured, found))
    # Equal scores in the order of the images' ids, as in COCO's evaluation.
    rows = rows[np.lexsort((measured.found_images[rows], -detections.scores[rows], detections.class_ids[rows]))]
    bounds = np.searchsorted(detections.class_ids[rows], np.arange(1, measured.classes + 2))
    return [
        ClassScores(detections.scores[rows[start:end]], found[rows[start:end]] >= 0, int(instances[class_id]))
        for class_id, (start, end) in enumerate(pairwise(bounds), 1)
    ]


def uncounted(measured: Measured, found: Ints) -> NDArray[np.bool_]:
    """Which detections found what does not count: a crowd, or a difficult object."""
    return np.append(~measured.truths.counted, False)[found]


def best_for_all(classes: Sequence[ClassScores]) -> tuple[float, float]:
    """The one threshold at which the mean F1 of the classes with objects is highest (as in `best`), and it.

    `DEFAULT_THRESHOLD` and 0 where no class has a right detection.
    """
    known = [one for one in classes if one.instances]
    if not any(one.right.any() for one in known):
        return DEFAULT_THRESHOLD, 0.0
    # From the best detection down, each changes the F1 of its class: what that adds up to is the sum over classes.
    scores = np.concatenate([one.scores for one in known])
    changes = np.concatenate([np.diff(one.f1(), prepend=0.0) for one in known])
    order = np.argsort(-scores, kind="stable")
    scores, means = scores[order], np.cumsum(changes[order]) / len(known)
    last = np.append(scores[1:] < scores[:-1], True)
    at = int(np.where(last, means, -1).argmax())
    return _below(scores, at), float(np.clip(means[at], 0, 1))


def _below(scores: Floats, at: int) -> float:
    """Halfway between the last score that counts and the first that does not, or 0.

    On what was measured every threshold between them does the same. On other images the score of the last right
    detection itself would lose one object of so many as there are, and be the stricter the fewer were measured.
    """
    last, following = float(scores[at]), float(scores[at + 1]) if at + 1 < len(scores) else 0.0
    halfway = (last + following) / 2
    # Scores are compared in single precision.
    return halfway if np.float32(halfway) > following else last
