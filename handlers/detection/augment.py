"""The data-expansion operations: each takes an image with its boxes and a random state, and returns both changed.

Geometric operations are exact: a box covers the same pixels' contents before and after. Each operation named in
`dataset_expansion_lst` is applied with probability one half.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from handlers.detection.boxes import Boxes, Image
from handlers.detection.data import fit
from schemas.enums import ExpansionDataClass

#: Of a box that a geometric operation moves partly out of the image, less than this share of its area left is too
#: little to tell what it was, and the box is dropped.
MIN_VISIBLE = 0.3
#: Tries to find a crop that keeps a box.
_TRIES = 10


def expand(
    image: Image, boxes: Boxes, operations: Sequence[ExpansionDataClass], random: Generator, size: int
) -> tuple[Image, Boxes]:
    """The image stretched to `size` x `size`, with its boxes, after each of `operations` with probability one half.

    They are applied in the order of the enumeration: first those that move boxes, at the image's own resolution, then
    those that do not, on the smaller image.
    """
    chosen = [operation for operation in sorted(set(operations)) if random.random() < 0.5]
    for operation in chosen:
        if operation in GEOMETRIC:
            image, boxes = GEOMETRIC[operation](image, boxes, random)
    height, width = image.shape[:2]
    boxes = boxes.moved(boxes.xyxy * np.array([size / width, size / height] * 2, np.float32))
    # The flips are views with negative strides, which neither OpenCV nor torch takes.
    image = fit(np.ascontiguousarray(image), size)
    for operation in chosen:
        if operation in PHOTOMETRIC:
            image = PHOTOMETRIC[operation](image, random)
    return image, boxes


# --- moves boxes with the pixels -------------------------------------------------------------------------------------


def _mirror(image: Image, boxes: Boxes, random: Generator) -> tuple[Image, Boxes]:
    left, top, right, bottom = boxes.xyxy.T
    width = image.shape[1]
    return image[:, ::-1], boxes.moved(np.stack([width - right, top, width - left, bottom], axis=1))


def _upside_down(image: Image, boxes: Boxes, random: Generator) -> tuple[Image, Boxes]:
    left, top, right, bottom = boxes.xyxy.T
    height = image.shape[0]
    return image[::-1], boxes.moved(np.stack([left, height - bottom, right, height - top], axis=1))


def _turn(quarters: int) -> Callable[[Image, Boxes, Generator], tuple[Image, Boxes]]:
    """Turn clockwise by `quarters` of 90 degrees."""

    def operation(image: Image, boxes: Boxes, random: Generator) -> tuple[Image, Boxes]:
        xyxy = boxes.xyxy
        for turn in range(quarters):
            left, top, right, bottom = xyxy.T
            height = image.shape[turn % 2]
            xyxy = np.stack([height - bottom, left, height - top, right], axis=1)
        return np.rot90(image, -quarters), boxes.moved(xyxy)

    return operation


def _window(
    image: Image, boxes: Boxes, left: float, top: float, width: float, height: float
) -> tuple[Image, Boxes] | None:
    """What is seen through a window of whole pixels onto the image and, around it, its mean colour.

    None where the image has boxes and the window shows none of them.
    """
    x, y, w, h = (round(value) for value in (left, top, max(width, 1), max(height, 1)))
    xyxy = boxes.xyxy - np.array([x, y, x, y], np.float32)
    limits = np.array([w, h, w, h], np.float32)
    seen = np.clip(xyxy, 0, limits)
    share = np.prod(seen[:, 2:] - seen[:, :2], axis=1) / np.maximum(np.prod(xyxy[:, 2:] - xyxy[:, :2], axis=1), 1e-9)
    shown = boxes.moved(xyxy).select(share >= MIN_VISIBLE).clipped(w, h)
    if len(boxes) and not len(shown):
        return None
    canvas = np.empty((h, w, 3), np.uint8)
    canvas[:] = image.mean(axis=(0, 1)).astype(np.uint8)
    x_from, x_to = max(x, 0), min(x + w, image.shape[1])
    y_from, y_to = max(y, 0), min(y + h, image.shape[0])
    if x_from < x_to and y_from < y_to:
        canvas[y_from - y : y_to - y, x_from - x : x_to - x] = image[y_from:y_to, x_from:x_to]
    return canvas, shown


def _random_crop(image: Image, boxes: Boxes, random: Generator) -> tuple[Image, Boxes]:
    """Half to all of each side, anywhere; the image as it is where ten tries show no box."""
    height, width = image.shape[:2]
    for _ in range(_TRIES):
        w, h = width * random.uniform(0.5, 1), height * random.uniform(0.5, 1)
        cropped = _window(image, boxes, random.uniform(0, width - w), random.uniform(0, height - h), w, h)
        if cropped:
            return cropped
    return image, boxes


def _zoom_out(image: Image, boxes: Boxes, random: Generator) -> tuple[Image, Boxes]:
    """The image somewhere on a canvas of once to twice its sides (SSD, Liu et al. 2016, 3.6, goes up to four times)."""
    height, width = image.shape[:2]
    factor = random.uniform(1, 2)
    left, top = random.uniform(0, (factor - 1) * width), random.uniform(0, (factor - 1) * height)
    return _window(image, boxes, -left, -top, factor * width, factor * height) or (image, boxes)


def _translate(image: Image, boxes: Boxes, random: Generator) -> tuple[Image, Boxes]:
    """Shifted by up to a fifth of each side."""
    height, width = image.shape[:2]
    left, top = width * random.uniform(-0.2, 0.2), height * random.uniform(-0.2, 0.2)
    return _window(image, boxes, left, top, width, height) or (image, boxes)


def _scale(image: Image, boxes: Boxes, random: Generator) -> tuple[Image, Boxes]:
    """Larger or smaller about the centre, by up to a quarter, each side by itself."""
    height, width = image.shape[:2]
    w, h = width * random.uniform(0.8, 1.25), height * random.uniform(0.8, 1.25)
    return _window(image, boxes, (width - w) / 2, (height - h) / 2, w, h) or (image, boxes)


# --- leaves boxes as they are ----------------------------------------------------------------------------------------


def _looked_up(image: Image, values: NDArray[np.floating]) -> Image:
    """`image` with each value v replaced by values[v], rounded and clipped."""
    return np.asarray(cv2.LUT(image, np.clip(np.rint(values), 0, 255).astype(np.uint8)), np.uint8)


def _brightness(image: Image, random: Generator) -> Image:
    return _looked_up(image, np.arange(256) * random.uniform(0.6, 1.4))


def _contrast(image: Image, random: Generator) -> Image:
    mean = image.mean()
    return _looked_up(image, mean + (np.arange(256) - mean) * random.uniform(0.6, 1.4))


def _greyscale(image: Image, random: Generator) -> Image:
    return np.asarray(cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB), np.uint8)


def _saturation(image: Image, random: Generator) -> Image:
    share = random.uniform(0.5, 1.5)
    return np.asarray(cv2.addWeighted(image, share, _greyscale(image, random), 1 - share, 0), np.uint8)


def _hue(image: Image, random: Generator) -> Image:
    """Turned by up to 18 degrees; OpenCV counts hue in steps of two degrees."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(np.int16) + random.integers(-9, 10)) % 180
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)


def _blur(image: Image, random: Generator) -> Image:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), random.uniform(0.3, 1.5)), np.uint8)


def _noise(image: Image, random: Generator) -> Image:
    noise = random.standard_normal(image.shape, np.float32) * random.uniform(2, 12)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def _jpeg(image: Image, random: Generator) -> Image:
    # Compressed in RGB order: which channel is which does not matter to the artefacts we are after.
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(random.integers(30, 91))])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


GEOMETRIC: dict[ExpansionDataClass, Callable[[Image, Boxes, Generator], tuple[Image, Boxes]]] = {
    ExpansionDataClass.HOR_FLIPE: _mirror,
    ExpansionDataClass.VER_FLIPE: _upside_down,
    ExpansionDataClass.ROTATE_90: _turn(1),
    ExpansionDataClass.ROTATE_180: _turn(2),
    ExpansionDataClass.ROTATE_270: _turn(3),
    ExpansionDataClass.RANDOM_CROP: _random_crop,
    ExpansionDataClass.ZOOM_OUT: _zoom_out,
    ExpansionDataClass.TRANSLATE: _translate,
    ExpansionDataClass.SCALE: _scale,
}
PHOTOMETRIC: dict[ExpansionDataClass, Callable[[Image, Generator], Image]] = {
    ExpansionDataClass.BRIGHTNESS: _brightness,
    ExpansionDataClass.CONTRAST: _contrast,
    ExpansionDataClass.SATURATION: _saturation,
    ExpansionDataClass.HUE: _hue,
    ExpansionDataClass.GRAYSCALE: _greyscale,
    ExpansionDataClass.GAUSSIAN_BLUR: _blur,
    ExpansionDataClass.GAUSSIAN_NOISE: _noise,
    ExpansionDataClass.JPEG_COMPRESSION: _jpeg,
}
