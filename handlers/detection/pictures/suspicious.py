"""The labels that are most suspicious, in their images."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from handlers.detection.boxes import Image
from handlers.detection.pictures.figure import COLOURS, DASHES, class_name
from handlers.detection.pictures.sheet import Cell, Label, draw_sheet, outline, scaled
from handlers.detection.suspicious import Suspect
from schemas.result import SuspicionKind

#: Images on the sheet, at most.
MAX_IMAGES = 9
_DOTS = (0, (1, 2))
#: Colour and line of each kind, what is asked of it in the picture, and what it is in the legend.
_KINDS: dict[SuspicionKind, tuple[str, Any, str, str]] = {
    "unlabelled": (COLOURS[1], "-", "no label: {found}", "detected, not labelled"),
    "wrong_class": (COLOURS[2], DASHES, "{labelled} or {found}", "labelled as another class than detected"),
    "poor_box": (COLOURS[0], DASHES, "box of {labelled}", "labelled and detected elsewhere"),
    "no_object": (COLOURS[5], _DOTS, "{labelled}, not found", "labelled, nothing detected"),
    "duplicate": (COLOURS[3], _DOTS, "{labelled} twice", "labelled twice"),
}


def suspicious_sheet(
    images: Iterable[tuple[Image, Sequence[Suspect], str]], class_names: Sequence[str], path: Path
) -> None:
    """Write a PNG of images with the suspicious labels in them; each image comes with its suspects and its name.

    An image is uint8 [height, width, 3] RGB, with the boxes in its pixels; each is made small before the next is taken.
    `class_names[i]` is class i + 1. Colour, line and words tell the kinds apart.
    """
    kinds: set[SuspicionKind] = set()
    cells = []
    for image, suspects, name in images:
        kinds.update(suspect.kind for suspect in suspects)
        cells.append(_cell(image, suspects, name, class_names))
    legend: list[tuple[Any, str]] = [
        (Line2D([], [], color=colour, linewidth=2.4, linestyle=line), text)
        for kind, (colour, line, _, text) in _KINDS.items()
        if kind in kinds
    ]
    draw_sheet(cells, legend or [(Line2D([], [], linewidth=0), "no suspicious labels in any image")], path)


def _cell(image: Image, suspects: Sequence[Suspect], name: str, class_names: Sequence[str]) -> Cell:
    picture, zoom = scaled(image)

    def draw(axes: Axes) -> list[Label]:
        labels = []
        for suspect in suspects:
            colour, line, text, _ = _KINDS[suspect.kind]
            box = suspect.xyxy * zoom
            # A dark line below, so that it shows on bright ground.
            outline(axes, box, edgecolor="black", linewidth=3.2, alpha=0.45)
            outline(axes, box, edgecolor=colour, linewidth=2.2, linestyle=line)
            labelled = class_name(class_names, suspect.class_id)
            found = class_name(class_names, suspect.detected_as or suspect.class_id)
            words = text.format(labelled=labelled, found=found)
            labels.append(Label(box, words if suspect.score is None else f"{words} {suspect.score:.2f}", colour))
        return labels

    return Cell(picture, draw, f"{len(suspects)} suspicious: image {name}")
