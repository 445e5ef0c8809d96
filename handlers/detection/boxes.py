"""Boxes of one image: labelled ones and detected ones. Corners are in pixels of the image as its labels are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
#: uint8, [height, width, 3], RGB.
Image = NDArray[np.uint8]

#: A box that has less than this left inside its image, in pixels a side, is dropped: nothing of it can be seen.
MIN_SIDE = 1.0

#: Farther than any image reaches, in pixels.
_FAR = 1e9


@dataclass(frozen=True)
class Boxes:
    """Labelled boxes."""

    #: float32 [N, 4]: left, top, right, bottom.
    xyxy: Floats
    #: int64 [N], from 1.
    class_ids: Ints
    #: bool [N]: the box covers a crowd of objects; not trained on, and no miss in a measurement.
    crowd: NDArray[np.bool_]
    #: bool [N]: an object that nobody is expected to find (PASCAL VOC); trained on, and no miss in a measurement.
    difficult: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.class_ids)

    @property
    def counted(self) -> NDArray[np.bool_]:
        """bool [N]: the objects that count in a measurement."""
        return ~(self.crowd | self.difficult)

    def select(self, rows: NDArray[Any]) -> "Boxes":
        """The boxes that `rows` (a mask or indices) picks."""
        return Boxes(self.xyxy[rows], self.class_ids[rows], self.crowd[rows], self.difficult[rows])

    def moved(self, xyxy: Floats) -> "Boxes":
        """The same objects with other corners."""
        return Boxes(xyxy.astype(np.float32, copy=False), self.class_ids, self.crowd, self.difficult)

    def clipped(self, width: float, height: float) -> "Boxes":
        """What lies inside a `width` x `height` image; boxes with less than `MIN_SIDE` left of a side are dropped."""
        limits = np.array([width, height, width, height], np.float32)
        xyxy = np.clip(self.xyxy, 0, limits)
        return self.moved(xyxy).select((xyxy[:, 2:] - xyxy[:, :2]).min(axis=1) >= MIN_SIDE)


@dataclass(frozen=True)
class Detections:
    """Detected boxes, best first."""

    #: float32 [N, 4]: left, top, right, bottom.
    xyxy: Floats
    #: int64 [N], from 1.
    class_ids: Ints
    #: float32 [N], 0 … 1, descending.
    scores: Floats

    def __len__(self) -> int:
        return len(self.class_ids)


def areas(corners: Floats) -> Floats:
    """float32 [N]: the areas of boxes [N, 4] (corners)."""
    return (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])


def overlaps(one: Floats, other: Floats, covered: NDArray[np.bool_] | None = None) -> Floats:
    """IoU float32 [N, M], 0 … 1, of boxes [N, 4] with boxes [M, 4] (corners).

    Where `covered` [M] is true, the share of the box of `one` that lies in it, as COCO has it for crowds.
    """
    left, top, right, bottom = np.ascontiguousarray(one.T)[:, :, None]
    left_, top_, right_, bottom_ = np.ascontiguousarray(other.T)[:, None, :]
    # Side by side and in place: training holds each image's objects against ten thousand default boxes.
    common = np.minimum(right, right_)
    common -= np.maximum(left, left_)
    np.maximum(common, 0, out=common)
    height = np.minimum(bottom, bottom_)
    height -= np.maximum(top, top_)
    common *= np.maximum(height, 0, out=height)
    ours, theirs = areas(one)[:, None], areas(other)[None]
    whole = ours + theirs
    whole -= common
    if covered is not None:
        whole = np.where(covered[None], ours, whole)
    common /= np.maximum(whole, np.float32(1e-9), out=whole)
    return np.asarray(common, np.float32)


def make_boxes(
    rows: list[tuple[tuple[float, float, float, float], int, bool]], difficult: Sequence[bool] | None = None
) -> Boxes:
    """Boxes from `((x, y, width, height), class id, crowd)`, one each; `difficult` says which are (None: none)."""
    # What lies outside the image is cut off later; it only must not overflow before.
    xywh = np.array([row[0] for row in rows], np.float64).reshape(-1, 4).clip(-_FAR, _FAR)
    xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32)
    return Boxes(
        xyxy,
        np.array([row[1] for row in rows], np.int64),
        np.array([row[2] for row in rows], np.bool_),
        np.array([False] * len(rows) if difficult is None else difficult, np.bool_),
    )
