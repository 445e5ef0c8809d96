"""What a model finds in a few images, beside what is labelled."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from handlers.detection.boxes import Boxes, Detections, Floats, Image
from handlers.detection.coco import MATCH_IOU
from handlers.detection.pictures.figure import DASHES, class_name, colour
from handlers.detection.pictures.sheet import DENSE, Cell, Label, draw_sheet, outline, scaled

#: Most images on a sheet.
SHEET_SAMPLES = 12
#: Detections with a lower score are not drawn, where the class has no threshold of its own; the legend says so.
SHOWN_SCORE = 0.3

#: Labelled boxes of one image that are drawn, and that are named as missed: each label is placed around all others.
_MAX_DRAWN = 500
_CLASSES_IN_LEGEND = 15
_TRUTH = "#ffffff"


def sample_sheet(
    samples: Iterable[tuple[Image, Boxes, Detections]],
    class_names: Sequence[str],
    path: Path,
    thresholds: Sequence[float | None] = (),
) -> None:
    """Write a PNG of the first `SHEET_SAMPLES` of `samples` with their labelled and detected boxes, and a legend.

    An image is uint8 [height, width, 3] RGB with its boxes in pixels; each is made small before the next is taken from
    `samples`. `class_names[i]` is class i + 1. Detections with a score below that in `thresholds` for their class
    (below `SHOWN_SCORE` where that is None, or there are no thresholds) are left out, and a labelled object that none
    of the others finds is marked as missed.
    """
    known = [SHOWN_SCORE if one is None else one for one in thresholds] or [SHOWN_SCORE] * len(class_names)
    # Position 0 belongs to no class.
    least = np.array([np.inf, *known], np.float32)
    shown: list[tuple[Image, Boxes, Detections]] = []
    for image, truths, detections in islice(samples, SHEET_SAMPLES):
        picture, zoom = scaled(image)
        shown.append((picture, truths.moved(truths.xyxy * zoom), _shown(detections, least, zoom)))
    labelled = any(len(truths) for _, truths, _ in shown)
    cells = [_cell(*one, class_names, labelled) for one in shown]
    draw_sheet(cells, _legend(shown, class_names, labelled, any(one is not None for one in thresholds)), path)


def _shown(detections: Detections, least: Floats, zoom: np.float32) -> Detections:
    rows = detections.scores >= least[detections.class_ids]
    return Detections(detections.xyxy[rows] * zoom, detections.class_ids[rows], detections.scores[rows])


def _cell(picture: Image, truths: Boxes, shown: Detections, class_names: Sequence[str], labelled: bool) -> Cell:
    missed = _missed(truths, shown)

    def draw(axes: Axes) -> list[Label]:
        # With many boxes the labels say the score only; the colour tells the class.
        dense = len(shown) + len(missed) > DENSE
        labels = []
        for box, class_id, score in zip(shown.xyxy, shown.class_ids.tolist(), shown.scores.tolist(), strict=True):
            outline(axes, box, edgecolor=colour(class_id), linewidth=1.4 if dense else 2)
            text = f"{score:.2f}"
            text = text.removeprefix("0") if dense else f"{class_name(class_names, class_id)} {text}"
            labels.append(Label(box, text, colour(class_id)))
        for box in truths.xyxy[:_MAX_DRAWN]:
            # A dark line below, so that the dashes show on bright ground.
            outline(axes, box, edgecolor="black", linewidth=2, alpha=0.5)
            outline(axes, box, edgecolor=_TRUTH, linewidth=1.2, linestyle=DASHES)
        for index in missed[:_MAX_DRAWN]:
            name = class_name(class_names, int(truths.class_ids[index]))
            labels.append(Label(truths.xyxy[index], f"missed {name}", _TRUTH))
        return labels

    counts = f"{len(shown)} detected"
    return Cell(picture, draw, f"{len(truths)} labelled, {counts}, {len(missed)} missed" if labelled else counts)


def _missed(truths: Boxes, shown: Detections) -> list[int]:
    """The rows of `truths` that count and that no detection of their class overlaps enough."""
    missed = []
    for index in np.flatnonzero(truths.counted):
        truth = truths.xyxy[index]
        same = shown.xyxy[shown.class_ids == truths.class_ids[index]]
        sides = np.minimum(same[:, 2:], truth[2:]) - np.maximum(same[:, :2], truth[:2])
        common = sides.clip(min=0).prod(axis=1)
        union = (same[:, 2:] - same[:, :2]).prod(axis=1) + (truth[2:] - truth[:2]).prod() - common
        if not (common >= MATCH_IOU * union).any():
            missed.append(int(index))
    return missed


def _legend(
    shown: Sequence[tuple[Image, Boxes, Detections]], class_names: Sequence[str], labelled: bool, own: bool
) -> list[tuple[Any, str]]:
    """The classes on the sheet, and what the lines mean."""
    on_sheet = sorted(
        {int(class_id) for _, truths, found in shown for class_id in (*truths.class_ids, *found.class_ids)}
    )
    entries: list[tuple[Any, str]] = [
        (Patch(color=colour(class_id)), class_name(class_names, class_id)) for class_id in on_sheet[:_CLASSES_IN_LEGEND]
    ]
    if len(on_sheet) > _CLASSES_IN_LEGEND:
        entries.append((Patch(alpha=0), f"and {len(on_sheet) - _CLASSES_IN_LEGEND} more classes"))
    from_score = "from the threshold of its class on" if own else f"score ≥ {SHOWN_SCORE:g}"
    entries.append((Line2D([], [], color="#666666", linewidth=2), f"detected, {from_score}"))
    if labelled:
        entries.append((Line2D([], [], color="black", linewidth=1.2, linestyle=DASHES), "labelled (white)"))
    return entries
