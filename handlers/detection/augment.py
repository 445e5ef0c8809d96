"""An image with its boxes, changed at random: a little always, and by the operations that a task names.

The operations are in `geometric.py` and `photometric.py`. All of it follows from the image, the operations and the
random state; nothing is written into the image that comes in, which other threads read too.
"""

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from handlers.detection.boxes import Boxes, Image
from handlers.detection.data import fit
from handlers.detection.geometric import GEOMETRIC, reframe
from handlers.detection.photometric import PHOTOMETRIC, relight
from schemas.enums import ExpansionDataClass

#: Of each operation that is named, by itself, for each image.
PROBABILITY = 0.5
#: What every image goes through, for the card of the model.
ALWAYS = "Every training image is framed and lit anew each time it is seen."
#: What one goes through whose task does not say otherwise, by the same operation as if it were named.
MIRRORED = "Half of them are mirrored, left to right."


def vary(
    image: Image, boxes: Boxes, operations: Sequence[ExpansionDataClass], random: Generator, size: int
) -> tuple[Image, Boxes]:
    """A training image as the network sees it this time, `size` x `size`: framed and lit anew, and expanded."""
    image, boxes = expand(*reframe(image, boxes, random), operations, random, size)
    return relight(image, random), boxes


def expand(
    image: Image, boxes: Boxes, operations: Sequence[ExpansionDataClass], random: Generator, size: int
) -> tuple[Image, Boxes]:
    """The image stretched to `size` x `size`, with its boxes, after each of `operations` with probability one half.

    They are applied in the order of `GEOMETRIC` and `PHOTOMETRIC`, in whatever order they are named: first those that
    move boxes, at the image's own resolution, then those that do not, on the smaller image. The boxes that come out lie
    in the image and have an area.
    """
    # Drawn in the order of the enumeration, and for the named ones only: a new operation changes no older training.
    chosen = {operation for operation in sorted(set(operations)) if random.random() < PROBABILITY}
    for operation, move in GEOMETRIC.items():
        if operation in chosen:
            image, boxes = move(image, boxes, random)
    height, width = image.shape[:2]
    # Scaling rounds: a box at the border can end outside, and a sliver can vanish.
    xyxy = (boxes.xyxy * np.array([size / width, size / height] * 2, np.float32)).clip(0, size)
    boxes = boxes.moved(xyxy).select((xyxy[:, 2:] - xyxy[:, :2]).min(axis=1) > 0)
    image = fit(image, size)
    for operation, change in PHOTOMETRIC.items():
        if operation in chosen:
            image = change(image, random)
    return image, boxes
