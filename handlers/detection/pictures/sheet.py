"""A sheet of images side by side, with boxes and labels drawn into them and a legend above."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from handlers.detection.boxes import Image
from handlers.detection.pictures.figure import add_legend, ink, new_figure, save
from handlers.detection.pictures.label_layout import Area, place

#: Pixels: width of an image on the sheet, the gap around it, the line of text below it.
CELL, _GAP, _CAPTION = 520, 14, 24
_COLUMNS = 3
#: With more labels than this in an image they are small.
DENSE = 8


@dataclass(frozen=True)
class Label:
    """A text beside a box (left, top, right, bottom), on a ground of its own colour (`#rrggbb`)."""

    box: Any
    text: str
    ground: str


@dataclass(frozen=True)
class Cell:
    """One image on the sheet."""

    #: As large as fits a square of `CELL`.
    picture: Image
    #: Draws the boxes, in pixels of `picture`, and returns what is to be written beside them.
    draw: Callable[[Axes], list[Label]]
    #: Below the image.
    caption: str


def scaled(image: Image) -> tuple[Image, np.float32]:
    """`image` as large as fits a square cell, and by how much it was made larger."""
    zoom = CELL / max(image.shape[:2])
    size = (max(round(image.shape[1] * zoom), 1), max(round(image.shape[0] * zoom), 1))
    picture = cv2.resize(image, size, interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC)
    return np.asarray(picture, np.uint8), np.float32(picture.shape[1] / image.shape[1])


def outline(axes: Axes, box: Any, **style: Any) -> None:
    """Draw the four sides of `box` (left, top, right, bottom)."""
    left, top, right, bottom = box.tolist()
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, clip_on=True, **style))


def draw_sheet(cells: Sequence[Cell], legend: Sequence[tuple[Any, str]], path: Path) -> None:
    """Write a PNG of `cells` in rows of three below a legend (a handle and its text for each entry)."""
    columns = min(_COLUMNS, max(len(cells), 1))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    row_heights = [max(cell.picture.shape[0] for cell in row) + _CAPTION + _GAP for row in rows]
    width = max(columns, 2) * (CELL + _GAP) + _GAP
    legend_columns = _legend_columns([text for _, text in legend])
    legend_height = 20 + 24 * math.ceil(len(legend) / legend_columns)
    height = legend_height + sum(row_heights) + _GAP

    figure, canvas = new_figure(width, height)
    add_legend(figure, legend, loc="upper center", ncols=legend_columns, frameon=False, fontsize=11)
    for index, cell in enumerate(cells):
        row, column = divmod(index, columns)
        picture = cell.picture
        top = legend_height + sum(row_heights[:row])
        left = _GAP + column * (CELL + _GAP) + (CELL - picture.shape[1]) / 2
        axes = figure.add_axes(
            (left / width, 1 - (top + picture.shape[0]) / height, picture.shape[1] / width, picture.shape[0] / height)
        )
        axes.imshow(picture, extent=(0, picture.shape[1], picture.shape[0], 0), interpolation="none")
        axes.set(xlim=(0, picture.shape[1]), ylim=(picture.shape[0], 0))
        axes.axis("off")
        _write(axes, canvas.get_renderer(), cell.draw(axes), (picture.shape[1], picture.shape[0]))
        style: dict[str, Any] = {"fontsize": 9.5, "color": "#444444", "va": "top", "ha": "center"}
        axes.text(picture.shape[1] / 2, picture.shape[0] + 4, cell.caption, **style)
    save(figure, path)


def _write(axes: Axes, renderer: Any, labels: Sequence[Label], size: tuple[int, int]) -> None:
    taken: list[Area] = []
    for label in labels:
        style: dict[str, Any] = {"fontsize": 6.5 if len(labels) > DENSE else 9, "va": "top", "ha": "left"}
        text = axes.text(0, 0, label.text, color=ink(label.ground), parse_math=False, **style)
        extent = text.get_window_extent(renderer)
        area = place(extent.width + 4, extent.height + 3, tuple(label.box.tolist()), taken, size)
        taken.append(area)
        ground = Rectangle((area[0], area[1]), area[2] - area[0], area[3] - area[1], color=label.ground, linewidth=0)
        axes.add_patch(ground)
        text.set_position((area[0] + 2, area[1] + 1.5))
        text.set_zorder(5)


def _legend_columns(texts: Sequence[str]) -> int:
    widths = [60 + 8 * len(text) for text in texts]
    room = 2 * CELL
    return len(texts) if sum(widths) <= room else max(1, room // max(widths))
