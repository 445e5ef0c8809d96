"""What all pictures have in common: their resolution, colours, the names of classes, and how they are saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from handlers.detection.pictures.fonts import drawable

#: Dots an inch: sizes below are pixels.
DPI = 100
DASHES = (0, (4, 3))
#: Okabe and Ito's colours without black, which tell apart for the colour-blind too; beyond them, a rainbow.
COLOURS = ("#e69f00", "#56b4e9", "#cc79a7", "#f0e442", "#0072b2", "#d55e00", "#009e73")


def new_figure(width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure of `width` x `height` pixels on white, and its canvas."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white", **options)
    return figure, FigureCanvasAgg(figure)


def text_width(text: str, fontsize: float) -> float:
    """Pixels that `text` takes in a line."""
    figure, canvas = new_figure(10, 10)
    extent = figure.text(0, 0, text, fontsize=fontsize, parse_math=False).get_window_extent(canvas.get_renderer())
    return float(extent.width)


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG."""
    # Without the version of matplotlib in it, the same picture is the same file.
    figure.savefig(path, format="png", metadata={"Software": None})


def class_name(class_names: Sequence[str], class_id: int) -> str:
    """The name of the class, as far as it can be drawn. Draw it with `parse_math=False`: it may have dollar signs."""
    return drawable(class_names[class_id - 1], f"class {class_id}")


def colour(class_id: int) -> str:
    """The colour of a class in every picture, as `#rrggbb`."""
    if class_id <= len(COLOURS):
        return COLOURS[class_id - 1]
    # Steps of the golden ratio keep neighbours apart.
    red, green, blue, _ = colormaps["hsv"](class_id * 0.618034 % 1)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def ink(ground: str) -> str:
    """Black or white, whichever can be read on the colour `ground` (`#rrggbb`)."""
    red, green, blue = (int(ground[at : at + 2], 16) for at in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "white"


def add_legend(figure: Any, entries: Sequence[tuple[Any, str]], **options: Any) -> None:
    """A legend of `entries` (a handle and its text) on a figure or axes."""
    legend = figure.legend([handle for handle, _ in entries], [""] * len(entries), **options)
    for label, (_, text) in zip(legend.get_texts(), entries, strict=True):
        # Not as labels above, where a name in dollar signs would be a formula, and one with "_" in front be left out.
        label.set(text=text, parse_math=False)
