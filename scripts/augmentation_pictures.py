"""Draws docs/images/augmentation.png: one labelled image, and what each data-expansion operation makes of it.

    .venv/bin/python scripts/augmentation_pictures.py [--dataset ../shared/datasets/bccd] [--file NAME] [--out PNG]

Of twenty draws the one that changes most is shown, so that what an operation can do is seen.
"""

import argparse
import json
import math
from pathlib import Path

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image as Pillow

from handlers.detection.boxes import Boxes, Image, make_boxes
from handlers.detection.data import read_image, shrink
from handlers.detection.geometric import GEOMETRIC
from handlers.detection.photometric import PHOTOMETRIC

DRAWS = 20
COLUMNS, CELL, GAP, CAPTION, HEADING, MARGIN = 7, 192, 10, 20, 32, 10
#: Okabe and Ito's colours, which tell apart for the colour-blind too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")
CLOSE_BY = ("GAUSSIAN_BLUR", "MOTION_BLUR", "GAUSSIAN_NOISE", "JPEG_COMPRESSION")
#: Of the middle of the image so much of each side is shown of these.
DETAIL = 0.45


def read(dataset: Path, file_name: str) -> tuple[Image, Boxes, list[str]]:
    """An image of a COCO data set, with its boxes and the class names."""
    document = json.loads((dataset / "annotations.json").read_text())
    names = {category["id"]: category["name"] for category in document["categories"]}
    ids = {id_: index for index, id_ in enumerate(names, 1)}
    entry = next(image for image in document["images"] if image["file_name"] == file_name)
    labels = [label for label in document["annotations"] if label["image_id"] == entry["id"]]
    boxes = make_boxes([(tuple(label["bbox"]), ids[label["category_id"]], bool(label["iscrowd"])) for label in labels])
    # About as large as the network sees it: lengths of blur and noise are pixels of its input.
    image, boxes = shrink(read_image(dataset / "images" / file_name), boxes, 240)
    return image, boxes, list(names.values())


def outcomes(image: Image, boxes: Boxes) -> tuple[list[tuple[str, Image, Boxes]], list[tuple[str, Image, Boxes]]]:
    """(name, image, boxes) after each geometric operation, and after each photometric one."""
    states = [np.random.default_rng(seed).bit_generator.state for seed in range(DRAWS)]
    moved, changed = [], []
    for operation, move in GEOMETRIC.items():
        draws = [move(image, boxes, generator(state)) for state in states]
        moved.append((operation.name, *max(draws, key=lambda draw: difference(draw[0], image))))
    for operation, change in PHOTOMETRIC.items():
        pictures = [change(image, generator(state)) for state in states]
        changed.append((operation.name, max(pictures, key=lambda picture: difference(picture, image)), boxes))
    return moved, changed


def generator(state: dict) -> np.random.Generator:
    random = np.random.default_rng()
    random.bit_generator.state = state
    return random


def difference(picture: Image, image: Image) -> float:
    """How different two pictures look; of two sizes, how different the sizes are."""
    if picture.shape != image.shape:
        return abs(math.log(picture.shape[0] * picture.shape[1] / (image.shape[0] * image.shape[1])))
    return float(np.abs(picture.astype(np.int16) - image).mean())


def detail(image: Image, boxes: Boxes) -> tuple[Image, Boxes]:
    """The middle of an image, and the boxes that lie in it."""
    height, width = image.shape[:2]
    top, left = round(height * (1 - DETAIL) / 2), round(width * (1 - DETAIL) / 2)
    shown = image[top : height - top, left : width - left]
    moved = boxes.xyxy - np.array([left, top] * 2, np.float32)
    inside = (moved.min(axis=1) >= 0) & (moved[:, 2] <= shown.shape[1]) & (moved[:, 3] <= shown.shape[0])
    return shown, boxes.moved(moved).select(inside)


def panel(axes: Axes, image: Image, boxes: Boxes, caption: str) -> None:
    zoom = min(CELL / image.shape[1], CELL * 3 / 4 / image.shape[0])
    height, width = (max(round(side * zoom), 1) for side in image.shape[:2])
    axes.set(xlim=(0, CELL), ylim=(CELL * 3 / 4 + CAPTION, 0))
    axes.axis("off")
    left = (CELL - width) / 2
    interpolation = cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC
    shown = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=interpolation)
    axes.imshow(shown, extent=(left, left + width, height, 0), interpolation="none")
    scale = np.array([width / image.shape[1], height / image.shape[0]] * 2)
    for (x, y, right, bottom), class_id in zip((boxes.xyxy * scale).tolist(), boxes.class_ids.tolist(), strict=True):
        colour = COLOURS[(class_id - 1) % len(COLOURS)]
        axes.add_patch(Rectangle((left + x, y), right - x, bottom - y, fill=False, edgecolor=colour, linewidth=1.5))
    axes.text(CELL / 2, CELL * 3 / 4 + 4, caption, ha="center", va="top", fontsize=8.5, family="DejaVu Sans")


def sheet(image: Image, boxes: Boxes, names: list[str], out: Path) -> None:
    moved, changed = outcomes(image, boxes)
    # Light and colour change the whole; what lens, sensor and file do is seen close by.
    whole = [one for one in changed if one[0] not in CLOSE_BY]
    close = [("the image, a detail", image, boxes), *(one for one in changed if one[0] in CLOSE_BY)]
    close_up = [(name, *detail(picture, kept)) for name, picture, kept in close]
    groups = [
        ("moves boxes with the pixels", [("the image and its labels", image, boxes), *moved]),
        ("leaves boxes as they are", [*whole, *close_up]),
    ]
    row_height = CELL * 3 / 4 + CAPTION + GAP
    width = 2 * MARGIN + COLUMNS * (CELL + GAP) - GAP
    height = 2 * MARGIN + sum(HEADING + math.ceil(len(panels) / COLUMNS) * row_height for _, panels in groups)
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    top = MARGIN
    for heading, panels in groups:
        figure.text(MARGIN / width, 1 - (top + 8) / height, heading, fontsize=12, weight="bold", va="top")
        top += HEADING
        for index, one in enumerate(panels):
            row, column = divmod(index, COLUMNS)
            x, y = MARGIN + column * (CELL + GAP), top + row * row_height
            place = (x / width, 1 - (y + row_height - GAP) / height, CELL / width, (row_height - GAP) / height)
            panel(figure.add_axes(place), one[1], one[2], one[0])
        top += math.ceil(len(panels) / COLUMNS) * row_height
    present = sorted(set(boxes.class_ids.tolist()))
    figure.legend(
        [Line2D([], [], color=COLOURS[(class_id - 1) % len(COLOURS)], linewidth=3) for class_id in present],
        [names[class_id - 1] for class_id in present],
        loc="upper right",
        ncols=len(present),
        frameon=False,
        fontsize=9,
    )
    canvas.draw()
    out.parent.mkdir(parents=True, exist_ok=True)
    picture = Pillow.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    # A palette image is a third of the size.
    picture.quantize(256, kmeans=4).save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, default=Path("../shared/datasets/bccd"))
    parser.add_argument("--file", default="BloodImage_00142.jpg")
    parser.add_argument("--out", type=Path, default=Path("docs/images/augmentation.png"))
    chosen = parser.parse_args()
    sheet(*read(chosen.dataset, chosen.file), chosen.out)
    print(f"{chosen.out}: {chosen.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
