"""Boxes as offsets from default boxes, and back (SSD, Liu et al. 2016, eq. 2; Faster R-CNN before it)."""

import math

import torch
from torch import Tensor
from torchvision.ops import box_convert

#: What the offsets of centre and size are multiplied by, so that they are of like size (1 / variance in the reference
#: code of SSD).
Weights = tuple[float, float]
SSD_WEIGHTS: Weights = (10.0, 5.0)
#: Largest growth of a default box, as in torchvision's BoxCoder; keeps exp() finite.
_MAX_LOG_GROWTH = math.log(1000 / 16)


def encode(corners: Tensor, default_boxes: Tensor) -> Tensor:
    """The offsets [A, 4] that turn `default_boxes` [A, 4] (centre and size) into `corners` [A, 4]."""
    centred = box_convert(corners, "xyxy", "cxcywh")
    shift = (centred[:, :2] - default_boxes[:, :2]) / default_boxes[:, 2:]
    growth = torch.log(centred[:, 2:] / default_boxes[:, 2:])
    return torch.cat([shift * SSD_WEIGHTS[0], growth * SSD_WEIGHTS[1]], dim=1)


def decode(offsets: Tensor, default_boxes: Tensor, weights: Weights = SSD_WEIGHTS) -> Tensor:
    """The inverse of `encode`: the corners of `offsets` [..., A, 4]."""
    shift = offsets[..., :2] / weights[0]
    growth = (offsets[..., 2:] / weights[1]).clamp(max=_MAX_LOG_GROWTH)
    centre = default_boxes[:, :2] + shift * default_boxes[:, 2:]
    half = growth.exp() * default_boxes[:, 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)
