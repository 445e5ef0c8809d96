"""Precision over recall, and F1 over the score from which on detections count."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from handlers.detection.coco import MATCH_IOU
from handlers.detection.pictures.figure import COLOURS, add_legend, class_name, new_figure, save
from handlers.detection.scores import Best, ClassScores

#: Of more classes, those with the lowest average precision are named, and the others thin lines.
MAX_NAMED = 8
#: Lines differ in dashes and marks too, not in colour alone; yellow is too pale on white.
_COLOURS = [colour for colour in COLOURS if colour != "#f0e442"]
_LINES = ("-", "--", "-.", (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5, 1, 1.5)))
_MARKS = "os^Dv<P*"
_OTHERS = "#bbbbbb"
_THRESHOLDS = np.linspace(0, 1, 501)
#: More lines than these would hide each other.
_MAX_LINES = 100
_WIDTH, _PANEL, _ROW = 1200, 520, 24


@dataclass(frozen=True)
class _Curves:
    """Of one class, or of their mean."""

    #: Over the recalls 0, 0.01, … 1, and over `_THRESHOLDS`.
    precision: NDArray[np.float64]
    f1: NDArray[np.float64]


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
    named = sorted(sorted(known, key=average.__getitem__)[:MAX_NAMED])
    others = sorted(set(known) - set(named))
    curves = {index: _Curves(precision[:, index], scores[index].f1_at(_THRESHOLDS)) for index in known}

    # Two columns of the legend: the named, their mean if there are several, the others if there are any.
    rows = math.ceil((len(named) + (len(known) > 1) + bool(others)) / 2)
    height = _PANEL + 60 + rows * _ROW
    figure, _ = new_figure(_WIDTH, height)
    bottom, top = (rows * _ROW + 90) / height, 1 - 50 / height
    left = figure.add_axes((0.06, bottom, 0.41, top - bottom))
    right = figure.add_axes((0.56, bottom, 0.41, top - bottom))
    _label(left, "recall: share of the objects that are found", "precision: share of the detections that are right")
    _label(right, "score from which on detections count", "F1")
    left.set_title(f"Precision over recall, at IoU {MATCH_IOU:g}", fontsize=12)
    right.set_title("F1 = 2 · precision · recall / (precision + recall)", fontsize=12)

    entries: list[tuple[Any, str]] = []
    for number, index in enumerate(named):
        text = f"{class_name(class_names, index + 1)}: AP@.5 {average[index]:.2f}"
        entries.append(_draw_named(left, right, curves[index], scores[index].best(), number, text))
    if len(known) > 1:
        mean = _Curves(
            np.mean([one.precision for one in curves.values()], axis=0),
            np.mean([one.f1 for one in curves.values()], axis=0),
        )
        style: dict[str, Any] = {"color": "black", "linewidth": 2.8, "alpha": 0.85}
        _draw(left, right, mean, zorder=4, **style)
        text = f"mean of {len(known)} classes: mAP@.5 {mean.precision.mean():.2f}"
        entries.append((Line2D([], [], **style), text))
    if others:
        entries.append(_draw_others(left, right, [curves[index] for index in others]))
    best = float(np.mean([scores[index].f1_at(np.array([threshold]))[0] for index in known]))
    _draw_threshold(right, threshold, f"best {'mean ' if len(known) > 1 else ''}F1: {best:.2f}")
    add_legend(figure, entries, loc="lower center", ncols=2, frameon=False, fontsize=10.5, handlelength=3.4)
    note = "Marks: the score of the best F1. Precision is interpolated: the highest at this recall or above."
    figure.text(0.5, (rows * _ROW + 28) / height, note, fontsize=9.5, color="#444444", ha="center", va="center")
    save(figure, path)


def _draw(left: Axes, right: Axes, curves: _Curves, **style: Any) -> None:
    left.plot(np.linspace(0, 1, len(curves.precision)), curves.precision, **style)
    right.plot(_THRESHOLDS, curves.f1, **style)


def _draw_named(left: Axes, right: Axes, curves: _Curves, best: Best, number: int, text: str) -> tuple[Any, str]:
    """Draw the `number`-th class that has a name, and return its entry in the legend, which begins with `text`."""
    colour = _COLOURS[number % len(_COLOURS)]
    style: dict[str, Any] = {"color": colour, "linestyle": _LINES[number % len(_LINES)], "linewidth": 1.7}
    mark: dict[str, Any] = {"marker": _MARKS[number], "markersize": 8}
    mark |= {"markeredgecolor": "black", "markeredgewidth": 0.6}
    _draw(left, right, curves, zorder=3, **style)
    if best.threshold is None:
        return Line2D([], [], **style, **mark), f"{text}, nothing right found"
    left.plot([best.recall], [best.precision], color=colour, zorder=5, **mark)
    right.plot([best.threshold], [best.f1], color=colour, zorder=5, **mark)
    return Line2D([], [], **style, **mark), f"{text}, best F1 {best.f1:.2f} at score {best.threshold:.2f}"


def _draw_others(left: Axes, right: Axes, others: Sequence[_Curves]) -> tuple[Any, str]:
    """Draw the classes without a name: as lines, or, where these would only be a grey field, where most of them lie."""
    if len(others) <= _MAX_LINES:
        for curves in others:
            _draw(left, right, curves, color=_OTHERS, linewidth=0.7, zorder=1)
        return Line2D([], [], color=_OTHERS, linewidth=1), f"the other {len(others)} classes (named: the lowest AP@.5)"
    precision = np.percentile([one.precision for one in others], (25, 75), axis=0)
    f1 = np.percentile([one.f1 for one in others], (25, 75), axis=0)
    style: dict[str, Any] = {"color": _OTHERS, "alpha": 0.5, "linewidth": 0}
    left.fill_between(np.linspace(0, 1, len(precision[0])), *precision, zorder=1, **style)
    right.fill_between(_THRESHOLDS, *f1, zorder=1, **style)
    return Patch(**style), f"the middle half of the other {len(others)} classes (named: the lowest AP@.5)"


def _draw_threshold(axes: Axes, threshold: float, what: str) -> None:
    axes.axvline(threshold, color="black", linewidth=1, linestyle=(0, (2, 2)), zorder=2)
    # On the side that has more room.
    side, shift = ("left", 0.015) if threshold < 0.5 else ("right", -0.015)
    style: dict[str, Any] = {"fontsize": 10, "ha": side, "va": "bottom", "zorder": 6}
    axes.text(threshold + shift, 0.04, f"{what}\nat score {threshold:.2f}", **style)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.set_xlabel(x, fontsize=10.5)
    axes.set_ylabel(y, fontsize=10.5)
    axes.set_xticks(np.linspace(0, 1, 11))
    axes.set_yticks(np.linspace(0, 1, 11))
    axes.grid(alpha=0.3)
