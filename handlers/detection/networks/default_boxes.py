"""The default boxes of a network (SSD's word; anchors, for others), and how their shapes are taken from the data."""

from collections.abc import Sequence
from itertools import accumulate

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from handlers.detection.boxes import Floats, overlaps
from handlers.detection.targets import Overlap

#: Objects of a level, for each of its shapes, below which it keeps the shapes that it was built with.
_ENOUGH = 4
#: Objects that are looked at: k-means takes time in proportion.
_MOST_OBJECTS = 10_000
#: An object this many times as long as wide is a long one, whose length alone would choose too coarse a level for it.
_LONG = 2.0
#: By this factor, an object may come larger or smaller than those that are labelled.
_SPREAD = 1.25


class DefaultBoxes(nn.Module):
    """Boxes of several shapes in every cell of every level: levels in order, cells row by row, shapes in order.

    The shapes are part of the network's state: what a network has learnt to say are offsets from them.
    """

    #: float32 [M, 2]: width and height of the shapes of all levels, fractions of the image.
    shapes: Tensor
    centres: Tensor
    shape_of: Tensor

    def __init__(self, grids: Sequence[tuple[int, int]], shapes: Sequence[Tensor]) -> None:
        """`grids`: (rows, columns) of each level; `shapes`: width and height [K, 2] of each."""
        super().__init__()
        self._counts = [len(one) for one in shapes]
        #: float32 [M]: the side of a cell of each shape's level, fraction of the image.
        self._cells = np.repeat([1 / min(grid) for grid in grids], self._counts).astype(np.float32)
        self.register_buffer("shapes", torch.cat(list(shapes)).clamp(max=1.0))
        centres, shape_of, first = [], [], 0
        for (rows, columns), count in zip(grids, self._counts, strict=True):
            y, x = torch.meshgrid(_middles(rows), _middles(columns), indexing="ij")
            centres.append(torch.stack([x, y], dim=-1).reshape(-1, 2).repeat_interleave(count, dim=0))
            shape_of.append(torch.arange(first, first + count).repeat(rows * columns))
            first += count
        self.register_buffer("centres", torch.cat(centres), persistent=False)
        self.register_buffer("shape_of", torch.cat(shape_of), persistent=False)

    def __len__(self) -> int:
        return len(self.centres)

    def forward(self) -> Tensor:
        """float32 [A, 4]: centre and size, fractions of the image."""
        return torch.cat([self.centres, self.shapes[self.shape_of]], dim=1)

    def overlap(self, match: float, unclear: float) -> Overlap:
        """What tells which of them answer for which objects; see there."""
        corners: Floats = box_convert(self().cpu(), "cxcywh", "xyxy").numpy()
        return Overlap(corners, match, unclear)

    def fit(self, sizes: Floats) -> None:
        """Take the shapes from `sizes` [N, 2]: width and height of the objects to be learnt, fractions of the image.

        An object belongs to the level that has the shape most like its own; a long one to one whose cells are no larger
        than it is wide, since it would fall between those of others. The shapes of a level become centres of its
        objects (k-means, after YOLO9000, Redmon & Farhadi 2017, but of the logarithms). A level with few objects keeps
        its shapes, so that nothing is lost where the data say little. The same sizes give the same shapes.
        """
        sizes = sizes[:: -(-len(sizes) // _MOST_OBJECTS) or 1]
        shapes = self.shapes.cpu().numpy().copy()
        # As if all had one corner in common.
        corners, own = (np.pad(one, ((0, 0), (2, 0))) for one in (sizes, shapes))
        likeness = overlaps(corners, own)
        shorter, longer = sizes.min(axis=1)[:, None], sizes.max(axis=1)[:, None]
        too_coarse = (longer >= _LONG * shorter) & (shorter < self._cells)
        likeness[too_coarse & (self._cells > self._cells.min())] = -1
        nearest = likeness.argmax(axis=1)
        for end, count in zip(accumulate(self._counts), self._counts, strict=True):
            of_level = sizes[(nearest >= end - count) & (nearest < end)]
            if len(of_level) >= _ENOUGH * count:
                shapes[end - count : end] = _centres(of_level, count)
        self.shapes.copy_(torch.from_numpy(shapes).clamp(max=1.0))


def _middles(cells: int) -> Tensor:
    return (torch.arange(cells) + 0.5) / cells


def _centres(sizes: Floats, count: int) -> Floats:
    """`count` sizes that stand for `sizes` [N, 2], the smallest first."""
    logarithms = np.log(sizes)
    spread = np.concatenate([logarithms - np.log(_SPREAD), logarithms, logarithms + np.log(_SPREAD)])
    cv2.setRNGSeed(0)  # this thread's, so that the same sizes give the same centres
    until = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 100, 1e-4)
    start = np.empty(0, np.int32)
    _, _, centres = cv2.kmeans(spread.astype(np.float32), count, start, until, 3, cv2.KMEANS_PP_CENTERS)
    return np.asarray(np.exp(centres[np.argsort(centres.sum(axis=1), kind="stable")]), np.float32)
