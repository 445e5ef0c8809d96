"""What a network is to answer: which of its predictions answers for which object.

Every network here makes A predictions for an image, in a fixed order: one for each default box, anchor or point. Which
of them answers for which object follows from the boxes alone, so the threads that read images work it out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handlers.detection.boxes import Boxes, Floats, Ints, areas, overlaps

#: Objects that are held against all predictions at once: an image with 10,000 would take gigabytes.
_BLOCK = 64


@dataclass(frozen=True)
class Assignment:
    """Which of the A predictions answer for an object of one image."""

    #: int64 [P]: the predictions that answer for an object, each once.
    rows: Ints
    #: int64 [P], from 1: the object's class.
    classes: Ints
    #: float32 [P, 4]: the object's corners, fractions of the image.
    corners: Floats
    #: int64 [Q]: predictions that are neither object nor background: inside a crowd, or too near to an object.
    ignored: Ints


#: From the boxes of an image, in fractions of it.
Assign = Callable[[Boxes], Assignment]


class Targets(NamedTuple):
    """The assignments of a batch: prediction a of image n is row n * A + a."""

    rows: Tensor
    classes: Tensor
    corners: Tensor
    ignored: Tensor


def collate(assignments: Sequence[Assignment], count: int) -> Targets:
    """The `assignments` of the images of a batch, of `count` predictions each."""

    def joined(parts: list[NDArray[np.generic]]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts))

    return Targets(
        joined([n * count + one.rows for n, one in enumerate(assignments)]),
        joined([one.classes for one in assignments]),
        joined([one.corners for one in assignments]),
        joined([n * count + one.ignored for n, one in enumerate(assignments)]),
    )


@dataclass(frozen=True)
class Overlap:
    """Assigns by overlap (IoU), as SSD (Liu et al. 2016) and RetinaNet (Lin et al. 2017) do: call it with boxes.

    A default box goes to the object that it overlaps most, if by at least `match`; and every object gets the default
    box that overlaps it most, however little. What overlaps an object by at least `unclear`, but by less than `match`,
    is ignored.
    """

    #: float32 [A, 4]: corners of the default boxes, fractions of the image.
    corners: Floats
    match: float
    unclear: float

    def __call__(self, boxes: Boxes) -> Assignment:
        """`boxes` are in fractions of the image."""
        objects = boxes.select(~boxes.crowd)
        # The object that each default box overlaps most, and by how much; the default box that each object overlaps
        # most.
        most, owner = np.zeros(len(self.corners), np.float32), np.full(len(self.corners), -1)
        own = np.empty(len(objects), np.int64)
        for start in range(0, len(objects), _BLOCK):
            corners = objects.xyxy[start : start + _BLOCK]
            iou = overlaps(corners, self.corners)
            own[start : start + _BLOCK] = iou.argmax(axis=1)
            highest = iou.max(axis=0)
            # Whose it is only matters where it is a match: to find it along this axis is slow.
            more = np.flatnonzero((highest > most) & (highest >= self.match))
            owner[more] = start + iou[:, more].argmax(axis=0)
            np.maximum(most, highest, out=most)
        matched = np.where(most >= self.match, owner, -1)
        matched[own] = np.arange(len(objects))
        neither = (most >= self.unclear) | _crowded(boxes, self.corners, self.match)
        return _assignment(objects, matched, neither)


@dataclass(frozen=True)
class CentreSampling:
    """Assigns points to the objects around them, as FCOS (Tian et al. 2019, 2020) does: call it with boxes.

    A point answers for an object if it lies in the object's box and within 1.5 cells of its centre, and if the farthest
    side is as far off as suits the point's level: up to 8 cells, and on the coarser levels at least 4. Of several, the
    smallest object. Beyond FCOS: an object without any such point gets the point nearest to its centre on the finest
    level; an object smaller than a cell would otherwise never be learnt.
    """

    #: float32 [A, 2]: x, y of the points, fractions of the image, the finest level first.
    points: Floats
    #: float32 [A]: side of a point's cell, fraction of the image.
    cells: Floats

    _RADIUS = 1.5
    _NEAREST, _FARTHEST = 4, 8

    def __call__(self, boxes: Boxes) -> Assignment:
        """`boxes` are in fractions of the image."""
        objects = boxes.select(~boxes.crowd)
        sizes = areas(objects.xyxy)
        finest, coarsest = self.cells == self.cells.min(), self.cells == self.cells.max()
        nearest = np.where(finest, 0, self._NEAREST * self.cells)
        farthest = np.where(coarsest, np.inf, self._FARTHEST * self.cells)
        smallest, owner = np.full(len(self.points), np.inf), np.full(len(self.points), -1)
        # The smallest last, so that what they take stays theirs.
        for index in np.argsort(-sizes, kind="stable"):
            left, top, right, bottom = objects.xyxy[index]
            x, y = self.points[:, 0], self.points[:, 1]
            sides = np.stack([x - left, y - top, right - x, bottom - y])
            off_centre = np.maximum(np.abs(x - (left + right) / 2), np.abs(y - (top + bottom) / 2))
            reach = sides.max(axis=0)
            fits = (sides.min(axis=0) > 0) & (off_centre < self._RADIUS * self.cells)
            fits &= (reach > nearest) & (reach < farthest)
            if not fits.any():
                fits = np.arange(len(x)) == np.where(finest, off_centre, np.inf).argmin()
            taken = fits & (sizes[index] <= smallest)
            owner[taken], smallest[taken] = index, sizes[index]
        half = self.cells[:, None] / 2
        squares = np.concatenate([self.points - half, self.points + half], axis=1)
        return _assignment(objects, owner, _crowded(boxes, squares, 0.5))


def _assignment(objects: Boxes, matched: NDArray[np.int64], neither: NDArray[np.bool_]) -> Assignment:
    """`matched` [A]: the index of the object that each prediction answers for, or -1."""
    rows = np.flatnonzero(matched >= 0)
    ignored = np.flatnonzero(neither & (matched < 0))
    return Assignment(rows, objects.class_ids[matched[rows]], objects.xyxy[matched[rows]], ignored)


def _crowded(boxes: Boxes, corners: Floats, share: float) -> NDArray[np.bool_]:
    """Which of `corners` [A, 4] lie in a crowd by at least `share` of their area."""
    crowded = np.zeros(len(corners), np.bool_)
    crowds = boxes.xyxy[boxes.crowd]
    for start in range(0, len(crowds), _BLOCK):
        block = crowds[start : start + _BLOCK]
        crowded |= (overlaps(corners, block, np.ones(len(block), np.bool_)) >= share).any(axis=1)
    return crowded
