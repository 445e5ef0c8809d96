"""The images with most mistakes: what was missed in them, and what was found that is not there."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke

from handlers.detection.boxes import Image
from handlers.detection.mistakes import ImageMistakes
from handlers.detection.pictures.figure import COLOURS, DASHES, class_name
from handlers.detection.pictures.sheet import Cell, Label, draw_sheet, outline, scaled

#: Orange and vermilion, from the same palette as the classes; the line and the word say it too.
_MISSED, _FALSE, _RIGHT = COLOURS[3], COLOURS[5], "#ffffff"
#: Boxes of one kind in one image that are drawn; those with most confidence first.
_MAX_DRAWN = 200


def worst_sheet(
    worst: Iterable[tuple[Image, ImageMistakes, str]], class_names: Sequence[str], threshold: float, path: Path
) -> None:
    """Write a PNG of images with the mistakes in them; `worst` has each image with its mistakes and its name.

    An image is uint8 [height, width, 3] RGB, with the boxes in its pixels; each is made small before the next is taken.
    `class_names[i]` is class i + 1. Missed objects are dashed, false detections crossed out, and both are named; right
    detections are thin lines. `threshold` is the score from which on detections count.
    """
    cells = [_cell(image, mistakes, name, class_names) for image, mistakes, name in worst]
    draw_sheet(cells, _legend(threshold, bool(cells)), path)


def _cell(image: Image, mistakes: ImageMistakes, name: str, class_names: Sequence[str]) -> Cell:
    picture, zoom = scaled(image)
    truths, found = mistakes.truths.xyxy * zoom, mistakes.detections.xyxy * zoom

    def draw(axes: Axes) -> list[Label]:
        labels = []
        for box in found[~mistakes.false][:_MAX_DRAWN]:
            _lined(axes, box, _RIGHT, linewidth=0.9)
        for row in np.flatnonzero(mistakes.missed)[:_MAX_DRAWN]:
            _lined(axes, truths[row], _MISSED, linewidth=2.2, linestyle=DASHES)
            class_id = int(mistakes.truths.class_ids[row])
            labels.append(Label(truths[row], f"missed {class_name(class_names, class_id)}", _MISSED))
        for row in np.flatnonzero(mistakes.false)[:_MAX_DRAWN]:
            _lined(axes, found[row], _FALSE, linewidth=2.2)
            left, top, right, bottom = found[row].tolist()
            for heights in ((top, bottom), (bottom, top)):
                axes.plot((left, right), heights, color=_FALSE, linewidth=1)
            class_id, score = int(mistakes.detections.class_ids[row]), float(mistakes.detections.scores[row])
            labels.append(Label(found[row], f"false {class_name(class_names, class_id)} {score:.2f}", _FALSE))
        return labels

    objects = int(mistakes.truths.counted.sum())
    counts = f"{objects} labelled, {mistakes.missed_count} missed, {mistakes.false_count} false"
    return Cell(picture, draw, f"{counts}: image {name}")


def _lined(axes: Axes, box: Any, colour: str, linewidth: float, **style: Any) -> None:
    # A dark line below, so that it shows on bright ground.
    outline(axes, box, edgecolor="black", linewidth=linewidth + 1, alpha=0.45)
    outline(axes, box, edgecolor=colour, linewidth=linewidth, **style)


def _on_white() -> list[Any]:
    """For lines too bright for the ground of the legend: as `_lined`, a dark line below."""
    return [Stroke(linewidth=3.6, foreground="#555555"), Normal()]


def _legend(threshold: float, any_worst: bool) -> list[tuple[Any, str]]:
    if not any_worst:
        return [(Line2D([], [], linewidth=0), f"no mistakes in any image, at scores ≥ {threshold:.2f}")]
    return [
        (
            Line2D([], [], color=_MISSED, linewidth=2.2, linestyle=DASHES, path_effects=_on_white()),
            "dashed: labelled and missed",
        ),
        (
            Line2D([], [], color=_FALSE, linewidth=2.2, marker="x", markersize=9),
            f"crossed out: false, detected with a score ≥ {threshold:.2f}",
        ),
        (Line2D([], [], color=_RIGHT, linewidth=0.9, path_effects=_on_white()), "thin white line: right"),
    ]
