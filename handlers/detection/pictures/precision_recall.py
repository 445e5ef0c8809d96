"""Precision over recall, and F1 over the score from which on detections count."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from handlers.detection.coco import MATCH_IOU
from handlers.detection.pictures.figure import COLOURS, add_legend, class_name, new_figure, save
from handlers.detection.scores import ClassScores

#: Of more classes, those with the lowest average precision are named, and the others thin lines.
MAX_NAMED = 8
#: Lines differ in dashes and marks too, not in colour alone; yellow is too pale on white.
_COLOURS = [colour for colour in COLOURS if colour != "#f0e442"]
_LINES = ("-", "--", "-.", (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5, 1, 1.5)))
_MARKS = "os^Dv<P*"
_OTHERS = "#bbbbbb"
_WIDTH, _PANEL, _ROW = 1200, 520, 24


def precision_recall_picture(
    precision: NDArray[np.float64],
    scores: Sequence[ClassScores],
    class_names: Sequence[str],
    threshold: float,
    path: Path,
) -> None:
    """Write a PNG of two panels, with a line for each class that has labelled objects and one for their mean.

    `precision` [recall 0, 0.01, … 1; class] is interpolated, at IoU 0.5; `threshold` is that of the best mean F1.
    """
    known = [index for index, one in enumerate(scores) if one.instances]
    average = {index: float(precision[:, index].mean()) for index in known}
    named = known if len(known) <= MAX_NAMED else sorted(sorted(known, key=average.__getitem__)[:MAX_NAMED])
    entries: list[tuple[Any, str]] = []
    thresholds = np.linspace(0, 1, 501)
    recalls = np.linspace(0, 1, len(precision))
    mean_f1 = np.zeros(len(thresholds))
    # Two columns below: the named, their mean if there are several, the others if there are any.
    rows = math.ceil((len(named) + (len(known) > 1) + (len(named) < len(known))) / 2)
    height = _PANEL + 60 + rows * _ROW
    figure, _ = new_figure(_WIDTH, height)
    bottom, top = (rows * _ROW + 90) / height, 1 - 50 / height
    left = figure.add_axes((0.06, bottom, 0.41, top - bottom))
    right = figure.add_axes((0.56, bottom, 0.41, top - bottom))
    for index in known:
        f1 = scores[index].f1_at(thresholds)
        mean_f1 += f1 / len(known)
        if index not in named:
            for axes, x, y in ((left, recalls, precision[:, index]), (right, thresholds, f1)):
                axes.plot(x, y, color=_OTHERS, linewidth=0.7, zorder=1)
            continue
        number, best = len(entries), scores[index].best()
        style: dict[str, Any] = {
            "color": _COLOURS[number % len(_COLOURS)],
            "linestyle": _LINES[number % len(_LINES)],
            "linewidth": 1.7,
        }
        mark: dict[str, Any] = {
            "marker": _MARKS[number],
            "markersize": 8,
            "markeredgecolor": "black",
            "markeredgewidth": 0.6,
        }
        left.plot(recalls, precision[:, index], zorder=3, **style)
        right.plot(thresholds, f1, zorder=3, **style)
        if best.threshold is not None:
            left.plot([best.recall], [best.precision], color=style["color"], zorder=5, **mark)
            right.plot([best.threshold], [best.f1], color=style["color"], zorder=5, **mark)
        text = f"{class_name(class_names, index + 1)}: AP@.5 {average[index]:.2f}"
        if best.threshold is None:
            text += ", nothing right found"
        else:
            text += f", best F1 {best.f1:.2f} at score {best.threshold:.2f}"
        entries.append((Line2D([], [], **style, **mark), text))
    if len(known) > 1:
        style = {"color": "black", "linewidth": 2.8, "alpha": 0.85}
        left.plot(recalls, precision[:, known].mean(axis=1), zorder=4, **style)
        right.plot(thresholds, mean_f1, zorder=4, **style)
        mean = f"mean of {len(known)} classes: mAP@.5 {np.mean(list(average.values())):.2f}"
        entries.append((Line2D([], [], **style), mean))
    right.axvline(threshold, color="black", linewidth=1, linestyle=(0, (2, 2)), zorder=2)
    best_mean = float(np.mean([scores[index].f1_at(np.array([threshold]))[0] for index in known]))
    beside: dict[str, Any] = {"ha": "left"} if threshold < 0.5 else {"ha": "right"}
    shift = 0.015 if threshold < 0.5 else -0.015
    told = f"best {'mean ' if len(known) > 1 else ''}F1: {best_mean:.2f}\nat score {threshold:.2f}"
    right.text(threshold + shift, 0.04, told, fontsize=10, va="bottom", zorder=6, **beside)
    if len(named) < len(known):
        others = f"the other {len(known) - len(named)} classes (named: the lowest AP@.5)"
        entries.append((Line2D([], [], color=_OTHERS, linewidth=1), others))
    _label(left, "recall: share of the objects that are found", "precision: share of the detections that are right")
    _label(right, "score from which on detections count", "F1")
    left.set_title(f"Precision over recall, at IoU {MATCH_IOU:g}", fontsize=12)
    right.set_title("F1 = 2 · precision · recall / (precision + recall)", fontsize=12)
    add_legend(figure, entries, loc="lower center", ncols=2, frameon=False, fontsize=10.5, handlelength=3.4)
    note = "Marks: the score of the best F1. Precision is interpolated: the highest at this recall or above."
    figure.text(0.5, (rows * _ROW + 28) / height, note, fontsize=9.5, color="#444444", ha="center", va="center")
    save(figure, path)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.set_xlabel(x, fontsize=10.5)
    axes.set_ylabel(y, fontsize=10.5)
    axes.set_xticks(np.linspace(0, 1, 11))
    axes.set_yticks(np.linspace(0, 1, 11))
    axes.grid(alpha=0.3)
