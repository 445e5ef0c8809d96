"""Pictures for people: how a training went, and what a model finds in a few images."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from handlers.detection.boxes import Boxes, Detections, Image
from handlers.detection.fonts import drawable
from handlers.detection.job import Measured
from handlers.detection.label_layout import Area, place

#: Most images on a sheet.
SHEET_SAMPLES = 12
#: Detections with a lower score are not drawn; the legend says so.
SHOWN_SCORE = 0.3

_DPI = 100
_COLUMNS = 3
#: Pixels: width of an image on the sheet, the gap around it, the line of text below it.
_CELL, _GAP, _CAPTION = 520, 14, 24
#: With more boxes than this in an image its labels are small and say the score only; the colour tells the class.
_DENSE = 8
#: Labelled boxes of one image that are drawn, and that are named as missed: each label is placed around all others.
_MAX_DRAWN = 500
_CLASSES_IN_LEGEND = 15
#: A detection finds a labelled object of its class that it overlaps by this IoU.
_FOUND_IOU = 0.5
_TRUTH = "white"
_DASHES = (0, (4, 3))
#: Okabe and Ito's colours without black, which tell apart for the colour-blind too; beyond them, a rainbow.
_COLOURS = ("#e69f00", "#56b4e9", "#cc79a7", "#f0e442", "#0072b2", "#d55e00", "#009e73")


def training_curve(measurements: Sequence[Measured], path: Path) -> None:
    """Write a PNG: loss, average precision on the validation images (if any) and learning rate over the iterations.

    Drawn are the values `loss`, `learning_rate`, `map` and `map_50` of `measurements`, as far as they are there and
    finite; the loss as it is, and smoothed.
    """
    series = {name: _series(measurements, name) for name in ("loss", "learning_rate", "map", "map_50")}
    measured = [name for name in ("map", "map_50") if len(series[name][0])]
    heights = [3, 2, 1] if measured else [3, 1]
    figure = Figure(figsize=(9, 2 + 1.1 * sum(heights)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[Axes] = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])

    loss_panel, rate_panel = panels[0], panels[-1]
    iterations, loss = series["loss"]
    marker = "o" if len(loss) == 1 else ""
    loss_panel.plot(iterations, loss, marker=marker, color="#9ecae1", linewidth=0.8, label="loss")
    if len(loss) > 1:
        loss_panel.plot(iterations, _smoothed(loss), color="#08519c", linewidth=1.8, label="loss, smoothed")
    if len(loss):
        # The first iterations are often ten times as high as the rest.
        if 0 < 3 * loss.min() < loss.max():
            loss_panel.set_yscale("log")
            loss_panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            loss_panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            loss_panel.yaxis.set_minor_formatter(NullFormatter())
        loss_panel.legend(loc="upper right")
    loss_panel.set_ylabel("training loss")

    if measured:
        names = {"map": ("mAP", "#006d2c", "o"), "map_50": ("mAP@.5", "#74c476", "s")}
        for name in measured:
            label, colour, marker = names[name]
            iterations, values = series[name]
            last = f"{label}, last {values[-1]:.3f}"
            panels[1].plot(iterations, values, marker=marker, markersize=5, color=colour, linewidth=1.4, label=last)
        panels[1].set_ylim(0, 1.02)
        panels[1].set_ylabel("validation")
        panels[1].legend(loc="lower right")

    iterations, rate = series["learning_rate"]
    rate_panel.plot(iterations, rate, marker="o" if len(rate) == 1 else "", color="#a63603", linewidth=1.4)
    rate_panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    rate_panel.set_ylim(bottom=0)
    rate_panel.set_ylabel("learning rate")
    rate_panel.set_xlabel("iteration")
    rate_panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len({m.iteration for m in measurements}) < 2:
        middle = measurements[0].iteration if measurements else 0
        rate_panel.set_xlim(middle - 1, middle + 1)
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.align_ylabels()
    _save(figure, path)


def _series(measurements: Sequence[Measured], name: str) -> tuple[Any, Any]:
    points = sorted((m.iteration, m.values[name]) for m in measurements if name in m.values)
    return np.array([point[0] for point in points]), np.array([point[1] for point in points], np.float64)


def _smoothed(values: Any) -> Any:
    """Mean over a window of a twentieth of the values around each, of what there is of it at the ends."""
    window = np.ones(max(len(values) // 20, 3) // 2 * 2 + 1)[: len(values)]
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def sample_sheet(samples: Sequence[tuple[Image, Boxes, Detections]], class_names: Sequence[str], path: Path) -> None:
    """Write a PNG of the first `SHEET_SAMPLES` of `samples` with their labelled and detected boxes, and a legend.

    An image is uint8 [height, width, 3] RGB with its boxes in pixels; `class_names[i]` is class i + 1. Detections with
    a score below `SHOWN_SCORE` are left out, and a labelled object that none of the others finds is marked as missed.
    """
    samples = samples[:SHEET_SAMPLES]
    scaled = [_scaled(image) for image, _, _ in samples]
    columns = min(_COLUMNS, max(len(samples), 1))
    rows = [scaled[start : start + columns] for start in range(0, len(scaled), columns)]
    row_heights = [max(image.shape[0] for image in row) + _CAPTION + _GAP for row in rows]
    width = max(columns, 2) * (_CELL + _GAP) + _GAP
    entries = _legend_entries(samples, class_names)
    legend_columns = _legend_columns([text for _, text in entries])
    legend_height = 20 + 24 * math.ceil(len(entries) / legend_columns)
    height = legend_height + sum(row_heights) + _GAP

    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    canvas: Any = FigureCanvasAgg(figure)
    legend = figure.legend(
        [handle for handle, _ in entries], [""] * len(entries), loc="upper center", ncols=legend_columns, frameon=False
    )
    for label, (_, text) in zip(legend.get_texts(), entries, strict=True):
        # Not as labels above, where a name in dollar signs would be a formula, and one with "_" in front be left out.
        label.set(text=text, parse_math=False, fontsize=11)
    labelled = any(len(truths) for _, truths, _ in samples)
    for index, (_, truths, detections) in enumerate(samples):
        row, column = divmod(index, columns)
        picture = scaled[index]
        top = legend_height + sum(row_heights[:row])
        left = _GAP + column * (_CELL + _GAP) + (_CELL - picture.shape[1]) / 2
        axes = figure.add_axes(
            (left / width, 1 - (top + picture.shape[0]) / height, picture.shape[1] / width, picture.shape[0] / height)
        )
        zoom = picture.shape[1] / samples[index][0].shape[1]
        truths, shown = truths.moved(truths.xyxy * zoom), _shown(detections, zoom)
        missed = _missed(truths, shown)
        _draw_boxes(axes, canvas.get_renderer(), picture, truths, shown, missed, class_names)
        counts = f"{len(shown)} detected"
        if labelled:
            counts = f"{len(truths)} labelled, {counts}, {len(missed)} missed"
        axes.text(
            picture.shape[1] / 2, picture.shape[0] + 4, counts, fontsize=9.5, color="#444444", va="top", ha="center"
        )
    _save(figure, path)


def _scaled(image: Image) -> Image:
    """`image` as large as fits a square cell."""
    zoom = _CELL / max(image.shape[:2])
    size = (max(round(image.shape[1] * zoom), 1), max(round(image.shape[0] * zoom), 1))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC), np.uint8)


def _shown(detections: Detections, zoom: float) -> Detections:
    rows = detections.scores >= SHOWN_SCORE
    return Detections(detections.xyxy[rows] * np.float32(zoom), detections.class_ids[rows], detections.scores[rows])


def _draw_boxes(
    axes: Axes,
    renderer: Any,
    picture: Image,
    truths: Boxes,
    shown: Detections,
    missed: list[int],
    class_names: Sequence[str],
) -> None:
    height, width = picture.shape[:2]
    axes.imshow(picture, extent=(0, width, height, 0), interpolation="none")
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    dense = len(shown) + len(missed) > _DENSE
    labels: list[tuple[Any, str, str]] = []
    for box, class_id, score in zip(shown.xyxy, shown.class_ids.tolist(), shown.scores.tolist(), strict=True):
        colour = _colour(class_id)
        _outline(axes, box, edgecolor=colour, linewidth=1.4 if dense else 2)
        text = f"{score:.2f}"
        text = text.removeprefix("0") if dense else f"{_name(class_names, class_id)} {text}"
        labels.append((box, text, colour))
    for box in truths.xyxy[:_MAX_DRAWN]:
        # A dark line below, so that the dashes show on bright ground.
        _outline(axes, box, edgecolor="black", linewidth=2, alpha=0.5)
        _outline(axes, box, edgecolor=_TRUTH, linewidth=1.2, linestyle=_DASHES)
    for index in missed[:_MAX_DRAWN]:
        labels.append((truths.xyxy[index], f"missed {_name(class_names, int(truths.class_ids[index]))}", _TRUTH))
    taken: list[Area] = []
    for box, text, colour in labels:
        style: dict[str, Any] = {"fontsize": 6.5 if dense else 9, "parse_math": False, "va": "top", "ha": "left"}
        ink = "black" if _bright(colour) else "white"
        label = axes.text(0, 0, text, color=ink, **style)
        extent = label.get_window_extent(renderer)
        area = place(extent.width + 4, extent.height + 3, tuple(box.tolist()), taken, (width, height))
        taken.append(area)
        axes.add_patch(Rectangle((area[0], area[1]), area[2] - area[0], area[3] - area[1], color=colour, linewidth=0))
        label.set_position((area[0] + 2, area[1] + 1.5))
        label.set_zorder(5)


def _outline(axes: Axes, box: Any, **style: Any) -> None:
    left, top, right, bottom = box.tolist()
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, clip_on=True, **style))


def _missed(truths: Boxes, shown: Detections) -> list[int]:
    """The rows of `truths`, crowds apart, that no detection of their class overlaps enough."""
    missed = []
    for index in np.flatnonzero(~truths.crowd):
        truth = truths.xyxy[index]
        same = shown.xyxy[shown.class_ids == truths.class_ids[index]]
        sides = np.minimum(same[:, 2:], truth[2:]) - np.maximum(same[:, :2], truth[:2])
        common = sides.clip(min=0).prod(axis=1)
        union = (same[:, 2:] - same[:, :2]).prod(axis=1) + (truth[2:] - truth[:2]).prod() - common
        if not (common >= _FOUND_IOU * union).any():
            missed.append(int(index))
    return missed


def _legend_entries(
    samples: Sequence[tuple[Image, Boxes, Detections]], class_names: Sequence[str]
) -> list[tuple[Any, str]]:
    """The classes on the sheet, and what the lines mean."""
    on_sheet = sorted(
        {
            int(class_id)
            for _, truths, detections in samples
            for class_id in (*truths.class_ids, *detections.class_ids[detections.scores >= SHOWN_SCORE])
        }
    )
    entries: list[tuple[Any, str]] = [
        (Patch(color=_colour(class_id)), _name(class_names, class_id)) for class_id in on_sheet[:_CLASSES_IN_LEGEND]
    ]
    if len(on_sheet) > _CLASSES_IN_LEGEND:
        entries.append((Patch(alpha=0), f"and {len(on_sheet) - _CLASSES_IN_LEGEND} more classes"))
    entries.append((Line2D([], [], color="#666666", linewidth=2), f"detected, score ≥ {SHOWN_SCORE:g}"))
    if any(len(truths) for _, truths, _ in samples):
        entries.append((Line2D([], [], color="black", linewidth=1.2, linestyle=_DASHES), "labelled (white)"))
    return entries


def _legend_columns(texts: Sequence[str]) -> int:
    widths = [60 + 8 * len(text) for text in texts]
    room = 2 * _CELL
    return len(texts) if sum(widths) <= room else max(1, room // max(widths))


def _name(class_names: Sequence[str], class_id: int) -> str:
    return drawable(class_names[class_id - 1], f"class {class_id}")


def _colour(class_id: int) -> str:
    if class_id <= len(_COLOURS):
        return _COLOURS[class_id - 1]
    # Steps of the golden ratio keep neighbours apart.
    red, green, blue, _ = colormaps["hsv"](class_id * 0.618034 % 1)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def _bright(colour: str) -> bool:
    if colour == _TRUTH:
        return True
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue > 130


def _save(figure: Figure, path: Path) -> None:
    # Without the version of matplotlib in it, the same picture is the same file.
    figure.savefig(path, format="png", metadata={"Software": None})
