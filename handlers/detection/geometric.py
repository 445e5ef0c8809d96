"""The data-expansion operations that move boxes with the pixels.

Each takes an image with its boxes and a random state, and returns both moved. Flips, turns and windows (crop, zoom-out,
shift, scale) work on whole pixels and are exact: a box encloses what it enclosed, as far as that is still in the image.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np
from numpy.random import Generator

from handlers.detection.boxes import Boxes, Image
from schemas.enums import ExpansionDataClass

Geometric = Callable[[Image, Boxes, Generator], tuple[Image, Boxes]]

#: Of a box that an operation moves partly out of the image, less than this share of its area left is too little to tell
#: what it was, and the box is dropped. Each operation looks at what those before it left.
MIN_VISIBLE = 0.3
#: Tries to find a crop that keeps an object.
_TRIES = 10
#: `ROTATE_SMALL`, in degrees. With more, the boxes of objects that are not round grow too wrong to learn from.
_MOST_DEGREES = 10.0
#: Clockwise, by so many quarters.
_TURNS = {1: cv2.ROTATE_90_CLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_COUNTERCLOCKWISE}
#: Before OpenCV 5, cv2.warpAffine refuses images with a side of this length or more.
_WARP_LIMIT = 32767


def _mirror(image: Image, boxes: Boxes, random: Generator) -> tuple[Image, Boxes]:
    left, top, right, bottom = boxes.xyxy.T
    width = image.shape[1]
    return _flipped(image, 1), boxes.moved(np.stack([width - right, top, width - left, bottom], axis=1))


def _upside_down(image: Image, boxes: Boxes, random: Generator) -> tuple[Image, Boxes]:
    left, top, right, bottom = boxes.xyxy.T
    height = image.shape[0]
    return _flipped(image, 0), boxes.moved(np.stack([left, height - bottom, right, height - top], axis=1))


def _flipped(image: Image, axis: int) -> Image:
    """A copy: that of a view of NumPy's, whose strides are negative, takes ten times as long."""
    return np.asarray(cv2.flip(image, axis), np.uint8)


def _turn(quarters: int) -> Geometric:
    """Turn clockwise by `quarters` of 90 degrees."""

    def operation(image: Image, boxes: Boxes, random: Generator) -> tuple[Image, Boxes]:
        xyxy = boxes.xyxy
        for turn in range(quarters):
            left, top, right, bottom = xyxy.T
            height = image.shape[turn % 2]
            xyxy = np.stack([height - bottom, left, height - top, right], axis=1)
        turned = cv2.rotate(image, _TURNS[quarters])
        return np.asarray(turned, np.uint8), boxes.moved(xyxy)

    return operation


def _rotate_small(image: Image, boxes: Boxes, random: Generator) -> tuple[Image, Boxes]:
    """Turned by up to 10 degrees about its middle; the size stays, and the corners are filled with the mean colour.

    The box of an object that is turned depends on its shape, which a box does not tell. It becomes the box of the
    turned ellipse that filled it: exact for what is round, and on average nearer to the truth than the box around the
    turned box, with which turning harms (Kalra et al. 2021, "Towards Rotation Invariance in Object Detection"). Around
    a crowd it is the box around the turned box, since what lies in its corners must not become background.
    """
    height, width = image.shape[:2]
    angle = math.radians(random.uniform(-_MOST_DEGREES, _MOST_DEGREES))
    if max(height, width) >= _WARP_LIMIT:
        return image, boxes
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, -sin], [sin, cos]])
    middle = np.array([width, height]) / 2
    halves = (boxes.xyxy[:, 2:] - boxes.xyxy[:, :2]) / 2
    centres = (boxes.xyxy[:, :2] + halves - middle) @ turn.T + middle
    round_, square = np.sqrt(halves**2 @ turn.T**2), halves @ np.abs(turn.T)
    halves = np.where(boxes.crowd[:, None], square, round_)
    turned = boxes.moved(np.concatenate([centres - halves, centres + halves], axis=1))
    shown = _shown(turned, width, height)
    if shown is None:
        return image, boxes
    # OpenCV counts from the middle of the first pixel, boxes from its corner.
    middle -= 0.5
    warped = cv2.warpAffine(
        image,
        np.column_stack([turn, middle - turn @ middle]),
        (width, height),
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=_mean_colour(image),
    )
    return np.asarray(warped, np.uint8).reshape(image.shape), shown


def _shown(boxes: Boxes, width: int, height: int) -> Boxes | None:
    """What is seen of `boxes` in a `width` x `height` image: clipped, and without those that are mostly hidden.

    A crowd is kept however little of it is seen: it says where nothing is to be learnt, and that holds for any part.
    None where there are objects and none of them is seen.
    """
    seen = np.clip(boxes.xyxy, 0, np.array([width, height, width, height], np.float32))
    area = np.prod(boxes.xyxy[:, 2:] - boxes.xyxy[:, :2], axis=1)
    share = np.prod(seen[:, 2:] - seen[:, :2], axis=1) / np.maximum(area, 1e-9)
    shown = boxes.select((share >= MIN_VISIBLE) | boxes.crowd).clipped(width, height)
    return None if shown.crowd.all() and not boxes.crowd.all() else shown


def _mean_colour(image: Image) -> tuple[float, ...]:
    """Red, green and blue, 0 … 255."""
    # Far faster than NumPy's mean of bytes.
    return tuple(cv2.mean(image)[:3])


def _window(
    image: Image, boxes: Boxes, left: float, top: float, width: float, height: float
) -> tuple[Image, Boxes] | None:
    """What is seen through a window of whole pixels onto the image and, around it, its mean colour.

    None where the window shows nothing of the image, or none of the objects that it has.
    """
    x, y, w, h = (round(value) for value in (left, top, max(width, 1), max(height, 1)))
    shown = _shown(boxes.moved(boxes.xyxy - np.array([x, y, x, y], np.float32)), w, h)
    if shown is None:
        return None
    x_from, x_to = max(x, 0), min(x + w, image.shape[1])
    y_from, y_to = max(y, 0), min(y + h, image.shape[0])
    if x_from >= x_to or y_from >= y_to:
        return None
    seen = image[y_from:y_to, x_from:x_to]
    if seen.shape[:2] == (h, w):
        return seen, shown
    around = (y_from - y, y + h - y_to, x_from - x, x + w - x_to)
    framed = cv2.copyMakeBorder(seen, *around, cv2.BORDER_CONSTANT, value=[int(part) for part in _mean_colour(image)])
    return np.asarray(framed, np.uint8), shown


def _random_crop(image: Image, boxes: Boxes, random: Generator) -> tuple[Image, Boxes]:
    """Half to all of each side, anywhere in the image (SSD, Liu et al. 2016, 2.2).

    The image as it is where ten tries show no object.
    """
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


def reframe(image: Image, boxes: Boxes, random: Generator) -> tuple[Image, Boxes]:
    """As if the camera had stood nearer, farther or aside: a window of 0.6 … 1.4 of each side, its form up to a third
    wider or higher, anywhere in the image (or the image anywhere in it).

    No operation that a task names: every training image goes through it. A detector that has seen its objects in one
    size and place only learns these by heart. Ranges as in YOLOv5 (Jocher 2020: 0.5 … 1.5), less wide, since there is
    no second image to fill what is uncovered.
    """
    height, width = image.shape[:2]
    zoom = math.exp(random.uniform(math.log(0.6), math.log(1.4)))
    form = math.exp(random.uniform(-0.15, 0.15))
    w, h = width * zoom * form, height * zoom / form
    left, top = random.uniform(0, 1) * (width - w), random.uniform(0, 1) * (height - h)
    return _window(image, boxes, left, top, w, h) or (image, boxes)


#: In the order in which they are applied. ROTATE_SMALL is before those that may cut its filled corners off again.
GEOMETRIC: dict[ExpansionDataClass, Geometric] = {
    ExpansionDataClass.HOR_FLIPE: _mirror,
    ExpansionDataClass.VER_FLIPE: _upside_down,
    ExpansionDataClass.ROTATE_90: _turn(1),
    ExpansionDataClass.ROTATE_180: _turn(2),
    ExpansionDataClass.ROTATE_270: _turn(3),
    ExpansionDataClass.ROTATE_SMALL: _rotate_small,
    ExpansionDataClass.RANDOM_CROP: _random_crop,
    ExpansionDataClass.ZOOM_OUT: _zoom_out,
    ExpansionDataClass.TRANSLATE: _translate,
    ExpansionDataClass.SCALE: _scale,
}
