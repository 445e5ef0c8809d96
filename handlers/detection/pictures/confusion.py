"""Which class was taken for which, as a table with colours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from handlers.detection.boxes import Ints
from handlers.detection.coco import MATCH_IOU
from handlers.detection.confusion import BACKGROUND_ID, ConfusionCounts
from handlers.detection.pictures.figure import class_name, new_figure, save, text_width

#: Of more classes, those with most mistakes have a row of their own, and the others one together.
MAX_ROWS = 30
#: With up to so many rows a number has its share below it, and is larger.
_ROWS_WITH_SHARES = 10
#: Pixels of a side of a cell, by the number of rows up to which it is so large.
_CELLS = ((5, 96), (10, 66), (20, 46), (MAX_ROWS + 2, 38))
#: Pixels: the title, the words "labelled" and "detected as", a margin, the least width: that of the title.
_TITLE, _WORDS, _MARGIN, _LEAST = 80, 34, 16, 720
_NOT_THERE, _NOT_FOUND = "nothing or duplicate (false)", "nothing found (missed)"
_GREY = "#444444"
_SHARES = "blue: right, orange: wrong; darker: more of the row, in the last row of the column"


def confusion_picture(counts: ConfusionCounts, class_names: Sequence[str], threshold: float, path: Path) -> None:
    """Write a PNG of the matrix: a row for each labelled class, a column for each detected one, and the background."""
    table, names, note = confusion_rows(counts, class_names)
    size = len(table)
    side = next(side for rows, side in _CELLS if size <= rows)
    font = 11.0 if size <= _ROWS_WITH_SHARES else 9.0
    row_names, column_names = [*names, _NOT_THERE], [*names, _NOT_FOUND]
    below = max(text_width(name, font) for name in column_names)
    beside = max(text_width(name, font) for name in row_names)
    left = _MARGIN + _WORDS + beside + 8
    width = max(left + size * side + _MARGIN, _LEAST)
    height = _TITLE + size * side + 8 + below + _WORDS + _MARGIN
    figure, _ = new_figure(width, height)
    left += (width - left - size * side - _MARGIN) / 2
    # Its coordinates are pixels from the upper left corner of the table.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-left, width - left), ylim=(height - _TITLE, -_TITLE))
    axes.axis("off")
    for row, column in np.ndindex(size, size):
        _draw_cell(axes, row, column, table, side, font)
    for index in range(size):
        middle, style = (index + 0.5) * side, "italic" if index == size - 1 else "normal"
        common: dict[str, Any] = {"fontsize": font, "style": style, "parse_math": False}
        axes.text(-8, middle, row_names[index], ha="right", va="center", **common)
        axes.text(middle, size * side + 8, column_names[index], ha="center", va="top", rotation=90, **common)
    middle = size * side / 2
    axes.text(-8 - beside - _WORDS / 2, middle, "labelled", fontsize=12, ha="center", va="center", rotation=90)
    axes.text(middle, size * side + 8 + below + _WORDS / 2, "detected as", fontsize=12, ha="center", va="center")
    middle = width / 2 - left
    axes.text(middle, 20 - _TITLE, "What each labelled object was detected as", fontsize=13, ha="center", va="center")
    explained = f"detections with a score ≥ {threshold:.2f} that overlap the object by IoU ≥ {MATCH_IOU:g}"
    for line, text in ((42, explained), (60, note)):
        axes.text(middle, line - _TITLE, text, fontsize=9.5, color=_GREY, ha="center", va="center")
    save(figure, path)


def _draw_cell(axes: Axes, row: int, column: int, table: Ints, side: int, font: float) -> None:
    last = len(table) - 1
    count, right = int(table[row, column]), row == column
    # Of what is labelled, where it went; of what is detected, how much of it is not there.
    whole = table[:, column].sum() if row == last else table[row].sum()
    share = count / max(int(whole), 1)
    style: dict[str, Any] = {"facecolor": "white", "edgecolor": "#cccccc"}
    if row == column == last:
        # There is no number for it: what is neither labelled nor detected has no end.
        style |= {"facecolor": "#eeeeee", "edgecolor": "#bbbbbb", "hatch": "///"}
    elif right:
        style |= {"edgecolor": _GREY, "zorder": 2}
    if count:
        style["facecolor"] = colormaps["Blues" if right else "Oranges"](0.08 + 0.67 * share)
    axes.add_patch(Rectangle((column * side, row * side), side, side, **style))
    if count:
        text = f"{short(count)}\n{share:.0%}" if font > 10 else short(count)
        ink = "white" if share > 0.75 else "black"
        size = font if side > 40 else 7.5
        style = {"color": ink, "fontsize": size, "ha": "center", "va": "center", "zorder": 3}
        axes.text((column + 0.5) * side, (row + 0.5) * side, text, **style)


def confusion_rows(counts: ConfusionCounts, class_names: Sequence[str]) -> tuple[Ints, list[str], str]:
    """The matrix to draw, the names of its rows without the last, the background's, and what to say of it."""
    classes = len(class_names)
    if classes <= MAX_ROWS:
        table = counts.table(range(1, classes + 1))
        return table, [class_name(class_names, index + 1) for index in range(classes)], _SHARES
    wrong = counts.truth != counts.prediction
    mistakes = np.zeros(classes + 1, np.int64)
    for ids in (counts.truth, counts.prediction):
        np.add.at(mistakes, ids[wrong], counts.counts[wrong])
    mistakes[BACKGROUND_ID] = -1
    chosen = np.sort(np.argsort(-mistakes, kind="stable")[:MAX_ROWS])
    place = np.full(classes + 1, MAX_ROWS)
    place[chosen] = np.arange(MAX_ROWS)
    place[BACKGROUND_ID] = MAX_ROWS + 1
    table = np.zeros((MAX_ROWS + 2, MAX_ROWS + 2), np.int64)
    np.add.at(table, (place[counts.truth], place[counts.prediction]), counts.counts)
    names = [class_name(class_names, int(class_id)) for class_id in chosen]
    others = f"{classes - MAX_ROWS} others"
    note = f"the {MAX_ROWS} classes with most mistakes of {classes}, the rest together; {_SHARES}"
    return table, [*names, others], note


def short(count: int) -> str:
    """`count` in at most four characters or five: whole thousands, or millions, are enough beside a share."""
    if count < 10_000:
        return str(count)
    return f"{count // 1000}k" if count < 1_000_000 else f"{count / 1_000_000:.1f}M"
