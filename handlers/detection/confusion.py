"""Which class was taken for which."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from handlers.detection.boxes import Ints
from handlers.detection.coco import Measured
from handlers.detection.scores import uncounted

#: Stands for the class of what is no object, and of what was not found.
BACKGROUND_ID = 0


@dataclass(frozen=True)
class ConfusionCounts:
    """The entries of a confusion matrix that are not zero: there may be thousands of classes."""

    #: int64 [N]: class ids; `BACKGROUND_ID` for detections that found no object.
    truth: Ints
    #: The same for what was detected; `BACKGROUND_ID` for objects that no detection found.
    prediction: Ints
    #: int64 [N], from 1.
    counts: Ints

    def table(self, class_ids: Sequence[int]) -> Ints:
        """The matrix [truth, prediction] of these classes and, last, of the background; others are left out."""
        order = [*class_ids, BACKGROUND_ID]
        size = int(max(*order, self.truth.max(initial=0), self.prediction.max(initial=0))) + 1
        place = np.full(size, -1)
        place[order] = np.arange(len(order))
        rows, columns = place[self.truth], place[self.prediction]
        inside = (rows >= 0) & (columns >= 0)
        table = np.zeros((len(order), len(order)), np.int64)
        table[rows[inside], columns[inside]] = self.counts[inside]
        return table


def confusion(measured: Measured, found: Ints, threshold: float) -> ConfusionCounts:
    """Count what the detections of at least `threshold` took for what.

    `found` is what each detection found of any class (`CocoEvaluation.match`): matched greedily by score at IoU 0.5
    and regardless of the class, as the confusion matrix of faster-coco-eval is (`PreviewResults`, with `useCats` 0).
    An object and the detection that takes it are one count in the row of its class and the column of the detection's;
    an object that none takes is one in the column of the background; a detection that takes none, one in its row.
    Crowds and difficult objects do not count, and neither does a detection that finds one. So a row has as many counts
    as its class has objects, a column as many as its class has other detections of at least the threshold.
    """
    truths, detections = measured.truths, measured.found
    counted = (detections.scores >= threshold) & ~uncounted(measured, found)
    takes = counted & (found >= 0)
    false = counted & (found < 0)
    left = truths.counted
    left[found[takes]] = False
    missed, false_ids = truths.class_ids[left], detections.class_ids[false]
    nothing = np.full(max(len(missed), len(false_ids)), BACKGROUND_ID)
    pairs = np.stack(
        [
            np.concatenate([truths.class_ids[found[takes]], missed, nothing[: len(false_ids)]]),
            np.concatenate([detections.class_ids[takes], nothing[: len(missed)], false_ids]),
        ]
    )
    unique, counts = np.unique(pairs, axis=1, return_counts=True)
    return ConfusionCounts(unique[0], unique[1], counts.astype(np.int64))
