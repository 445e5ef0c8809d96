"""How wrong predictions are: SSD's multibox loss, and the focal loss of RetinaNet and FCOS."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from handlers.detection.coding import decode, encode
from handlers.detection.targets import Targets

#: Background boxes that count, the worst first, for each that answers for an object (SSD: 3) …
NEGATIVES = 3
#: … and at least so many for each image, so that images without objects teach something too.
MIN_NEGATIVES = 10
#: The share of the generalised IoU loss beside SSD's own loss of boxes, which is larger for large errors and nearly
#: nothing for those that tell a good box from a very good one.
GIOU_WEIGHT = 2.0


def multibox_loss(offsets: Tensor, logits: Tensor, default_boxes: Tensor, targets: Targets) -> Tensor:
    """SSD's loss (Liu et al. 2016, 2.2) of one batch, with the generalised IoU loss of its boxes, summed.

    `offsets` [N, A, 4] and `logits` [N, A, 1 + classes] are the network's; `default_boxes` [A, 4]: centre and size. The
    worst background boxes are picked over the batch, not in each image, so that those of images without objects count.
    """
    images, count = offsets.shape[:2]
    rows = targets.rows
    offsets, logits = offsets.reshape(-1, 4).float(), logits.reshape(images * count, -1).float()
    target = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    target[rows] = targets.classes
    wrong = F.cross_entropy(logits, target, reduction="none")
    # A cross entropy is never negative, so that what is set to 0 adds nothing even if it is picked.
    background = wrong.index_fill(0, rows, 0.0).index_fill(0, targets.ignored, 0.0)
    negatives = min(max(NEGATIVES * len(rows), MIN_NEGATIVES * images), len(logits))
    classification = wrong[rows].sum() + background.topk(negatives, sorted=False).values.sum()
    expected = encode(targets.corners, default_boxes[rows % count])
    localisation = F.smooth_l1_loss(offsets[rows], expected, reduction="sum")
    localisation += GIOU_WEIGHT * box_loss(decode(offsets[rows], default_boxes[rows % count]), targets)
    return classification + localisation


def focal_loss(logits: Tensor, targets: Targets) -> Tensor:
    """The focal loss (Lin et al. 2017, alpha 0.25, gamma 2) of `logits` [N, A, classes], summed."""
    logits = logits.flatten(0, 1).float()
    wanted = torch.zeros_like(logits)
    wanted[targets.rows, targets.classes - 1] = 1.0
    loss: Tensor = sigmoid_focal_loss(logits, wanted, alpha=0.25, gamma=2.0).sum(dim=1)
    return loss.index_fill(0, targets.ignored, 0.0).sum()


def box_loss(corners: Tensor, targets: Targets) -> Tensor:
    """The generalised IoU loss (Rezatofighi et al. 2019) of `corners` [P, 4], those of `targets.rows`, summed."""
    # Its small constant against division by zero is made for pixels, not for fractions of an image.
    loss: Tensor = generalized_box_iou_loss(corners, targets.corners, reduction="sum", eps=1e-12)
    return loss
