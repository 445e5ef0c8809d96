"""How often detections of a score are right, beside how often their score says so."""

from pathlib import Path

import numpy as np

from handlers.detection.pictures.figure import COLOURS, DASHES, new_figure, save
from schemas.result import Calibration

_WIDTH, _HEIGHT = 720, 720
_BLUE, _GREY = COLOURS[4], "#8a8a8a"


def calibration_picture(calibration: Calibration, path: Path) -> None:
    """Write a PNG: precision over the score, a mark for each bin, with the line of equality; below, how many they are.

    Bins below `calibration.from_score`, which the error leaves out, are hollow.
    """
    figure, _ = new_figure(_WIDTH, _HEIGHT, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    scores = np.array([one.score for one in calibration.bins])
    precisions = np.array([one.precision for one in calibration.bins])
    counts = np.array([one.count for one in calibration.bins])
    above.plot((0, 1), (0, 1), color=_GREY, linestyle=DASHES, linewidth=1.2, label="as right as the score says")
    above.plot(scores, precisions, color=_BLUE, linewidth=1.4, zorder=2)
    counted = scores >= calibration.from_score
    for rows, face, text in (
        (counted, _BLUE, "detections of like scores"),
        (~counted, "white", "the same, not counted"),
    ):
        if rows.any():
            above.scatter(scores[rows], precisions[rows], s=46, facecolor=face, edgecolor=_BLUE, zorder=3, label=text)
    above.vlines(scores, np.minimum(scores, precisions), np.maximum(scores, precisions), color=_BLUE, alpha=0.35)
    error = "no detections" if calibration.ece is None else f"expected error {calibration.ece:.3f}"
    above.set_title(f"Precision by score: {error} from score {calibration.from_score:g} on", fontsize=12)
    above.text(0.98, 0.03, "below the line: too sure", ha="right", fontsize=9.5, color="#444444")
    above.text(0.02, 0.72, "above it: too modest", ha="left", fontsize=9.5, color="#444444")
    above.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="share that is right (IoU ≥ 0.5)")
    above.set_yticks(np.linspace(0, 1, 11))
    above.legend(loc="upper left", fontsize=9.5)
    below.bar(scores, counts, width=0.06, color=_BLUE)
    if len(counts):
        below.set_yscale("log")
        below.set_ylim(bottom=0.7)
    below.set(xlabel="score", ylabel="detections")
    below.set_xticks(np.linspace(0, 1, 11))
    for panel in (above, below):
        panel.grid(alpha=0.3)
    save(figure, path)
