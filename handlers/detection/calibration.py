"""Whether a score can be read as a probability: how often detections of a score are right."""

from collections.abc import Sequence

import numpy as np

from handlers.detection.scores import ClassScores
from schemas.result import Calibration, CalibrationBin

#: Bins of equal width over the scores 0 … 1.
BINS = 10
#: The error is taken over detections from this score on. The network keeps them from 0.01 on: they are nearly all, and
#: nearly all false and known to be, so that any model would look honest.
FROM_SCORE = 0.3


def calibration(scores: Sequence[ClassScores]) -> Calibration:
    """The detections of all classes by score, right or false at IoU 0.5, and the expected calibration error.

    The error is the mean of |share that is right - mean score| over the bins, weighted by their detections: D-ECE over
    the score alone (Küppers et al. 2020, "Multivariate Confidence Calibration for Object Detection", eq. 5), from the
    score `FROM_SCORE` on. 0 is a detector of whose detections with a score of 0.7 seven in ten are right.
    """
    values = np.concatenate([one.scores for one in scores] or [np.zeros(0, np.float32)]).astype(np.float64)
    right = np.concatenate([one.right for one in scores] or [np.zeros(0, np.bool_)])
    # In single precision 0.3 is a little more than in double; the last bin has its upper edge too.
    place = np.minimum((values * BINS + 1e-6).astype(np.int64), BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    filled = np.maximum(counts, 1)
    score = np.bincount(place, values, BINS) / filled
    precision = np.bincount(place, right, BINS) / filled
    counted = counts * (np.arange(BINS) >= round(FROM_SCORE * BINS))
    error = float((counted * np.abs(precision - score)).sum() / counted.sum()) if counted.any() else None
    return Calibration(
        ece=error,
        from_score=FROM_SCORE,
        bins=tuple(
            CalibrationBin(score=float(score[at]), precision=float(precision[at]), count=int(counts[at]))
            for at in np.flatnonzero(counts)
        ),
    )
