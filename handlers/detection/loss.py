"""SSD's multibox loss (Liu et al. 2016, 2.2): which default box answers for which object, and how wrong it is."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from handlers.detection.boxes import Boxes, Floats, Ints
from handlers.detection.models import encode

#: A default box that overlaps an object by this much (IoU) answers for it.
MATCH_IOU = 0.5
#: Background boxes that count, the worst first, for each that answers for an object (SSD: 3) …
NEGATIVES = 3
#: … and at least so many for each image, so that images without objects teach something too.
MIN_NEGATIVES = 10
#: Objects that are held against all default boxes at once: an image with 10,000 would take gigabytes.
_BLOCK = 64


@dataclass(frozen=True)
class Assignment:
    """Which of the A default boxes answer for an object of one image, or of a batch (then counted through)."""

    #: int64 [P]: the default boxes that answer for an object, each once.
    rows: Ints
    #: int64 [P], from 1: the object's class.
    classes: Ints
    #: float32 [P, 4]: the object's corners, fractions of the image.
    corners: Floats
    #: int64 [Q]: default boxes inside a crowd; neither object nor background.
    ignored: Ints


def assign(boxes: Boxes, default_corners: Floats) -> Assignment:
    """`boxes` and `default_corners` [A, 4] both in fractions of the image.

    As SSD and torchvision's SSDMatcher: a default box goes to the object that it overlaps most if by `MATCH_IOU`, and
    every object gets the default box that overlaps it most, however little.
    """
    objects = boxes.select(~boxes.crowd)
    default_sizes = _areas(default_corners)
    # The object that each default box overlaps most, and by how much; the default box that each object overlaps most.
    most, owner = np.zeros(len(default_corners), np.float32), np.full(len(default_corners), -1)
    own = np.empty(len(objects), np.int64)
    for start in range(0, len(objects), _BLOCK):
        corners = objects.xyxy[start : start + _BLOCK]
        overlap = _intersections(corners, default_corners)
        iou = overlap / (_areas(corners)[:, None] + default_sizes[None] - overlap)
        own[start : start + _BLOCK] = iou.argmax(axis=1)
        highest = iou.max(axis=0)
        more = highest > most
        owner[more] = start + iou.argmax(axis=0)[more]
        most[more] = highest[more]
    matched = np.where(most >= MATCH_IOU, owner, -1)
    matched[own] = np.arange(len(objects))
    rows = np.flatnonzero(matched >= 0)
    crowded = np.zeros(len(default_corners), np.bool_)
    crowds = boxes.xyxy[boxes.crowd]
    for start in range(0, len(crowds), _BLOCK):
        overlap = _intersections(crowds[start : start + _BLOCK], default_corners)
        crowded |= (overlap >= MATCH_IOU * default_sizes).any(axis=0)
    ignored = np.flatnonzero(crowded & (matched < 0))
    return Assignment(rows, objects.class_ids[matched[rows]], objects.xyxy[matched[rows]], ignored)


def _areas(corners: Floats) -> Floats:
    return (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])


def _intersections(ours: Floats, theirs: Floats) -> NDArray[np.float32]:
    """Areas [len(ours), len(theirs)]."""
    low = np.maximum(ours[:, None, :2], theirs[None, :, :2])
    high = np.minimum(ours[:, None, 2:], theirs[None, :, 2:])
    sides = np.clip(high - low, 0, None)
    return np.asarray(sides[..., 0] * sides[..., 1], np.float32)


def multibox_loss(
    offsets: Tensor,
    logits: Tensor,
    default_boxes: Tensor,
    *,
    rows: Tensor,
    classes: Tensor,
    corners: Tensor,
    ignored: Tensor,
) -> Tensor:
    """The loss of one batch, a number, from a network's `offsets` [N, A, 4] and `logits` [N, A, 1 + classes].

    `rows` … `ignored` are the `Assignment` of the whole batch, default box a of image n being row n * A + a. The
    worst background boxes are picked over the batch, not in each image, so that those of images without objects count.
    """
    images, count = offsets.shape[:2]
    offsets, logits = offsets.reshape(-1, 4).float(), logits.reshape(images * count, -1).float()
    target = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    target[rows] = classes
    wrong = F.cross_entropy(logits, target, reduction="none")
    # A cross entropy is never negative, so that what is set to 0 adds nothing even if it is picked.
    background = wrong.index_fill(0, rows, 0.0).index_fill(0, ignored, 0.0)
    negatives = min(max(NEGATIVES * len(rows), MIN_NEGATIVES * images), len(logits))
    classification = wrong[rows].sum() + background.topk(negatives, sorted=False).values.sum()
    localisation = F.smooth_l1_loss(offsets[rows], encode(corners, default_boxes[rows % count]), reduction="sum")
    return (classification + localisation) / max(len(rows), images)
