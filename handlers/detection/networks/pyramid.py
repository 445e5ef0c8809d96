"""Detectors on a feature pyramid (FPN, Lin et al. 2017) of ResNet50: RetinaNet and FCOS, with torchvision's parts."""

from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _resnet_fpn_extractor
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.resnet import resnet50
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from handlers.detection.boxes import Floats
from handlers.detection.coding import decode
from handlers.detection.loss import box_loss, focal_loss
from handlers.detection.networks.base import Network, Outputs
from handlers.detection.networks.default_boxes import DefaultBoxes
from handlers.detection.targets import Assign, CentreSampling, Targets

#: torchvision's state of ResNet50; None for a random start.
Backbone = dict[str, Tensor] | None

#: Every level of the pyramid has so many channels.
_CHANNELS = 256
#: FCOS: how far off an object's sides are before anything is learnt, in cells.
_FIRST_WAY = 2.0


class _Pyramid(Network):
    """Five levels, of strides 8, 16 … 128."""

    def __init__(self, size: int, backbone: Backbone, head: nn.Module) -> None:
        super().__init__(size)
        trunk = resnet50(weights=None)
        if backbone is not None:
            trunk.load_state_dict(backbone)
        self.body: BackboneWithFPN = _resnet_fpn_extractor(
            trunk, 5, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(_CHANNELS, _CHANNELS)
        )
        self.head = head
        with torch.no_grad():
            maps = self.eval().body(torch.zeros(1, 3, size, size)).values()
        self.train()
        #: (rows, columns) of each level.
        self.grids = [(one.shape[-2], one.shape[-1]) for one in maps]

    def forward(self, images: Tensor) -> Outputs:
        """What torchvision's head gives, [N, A, …] each, classes first."""
        outputs: dict[str, Tensor] = self.head(list(self.body(self.normalised(images)).values()))
        return tuple(outputs.values())


class RetinaNet(_Pyramid):
    """RetinaNet (Lin et al. 2017), as torchvision's version 2: group normalisation in the heads, generalised IoU loss.

    Unlike there, default boxes are centred in their cells, and half as large (from 2 cells a side, not 4): inputs here
    are half as large too.
    """

    _SIZES = (2.0, 2 * 2 ** (1 / 3), 2 * 2 ** (2 / 3))
    _ASPECT_RATIOS = (0.5, 1.0, 2.0)
    _WEIGHTS = (1.0, 1.0)
    #: As published: from 0.5 on an object, below 0.4 background, between them neither.
    _MATCH_IOU, _UNCLEAR_IOU = 0.5, 0.4

    def __init__(self, classes: int, size: int, backbone: Backbone = None) -> None:
        forms = torch.tensor([[s * r**-0.5, s * r**0.5] for r in self._ASPECT_RATIOS for s in self._SIZES])
        super().__init__(
            size, backbone, RetinaNetHead(_CHANNELS, len(forms), classes, norm_layer=partial(nn.GroupNorm, 32))
        )
        self.boxes = DefaultBoxes(self.grids, [forms / torch.tensor([columns, rows]) for rows, columns in self.grids])

    @property
    def predictions(self) -> int:
        """One for each default box."""
        return len(self.boxes)

    def assigner(self) -> Assign:
        """By overlap."""
        return self.boxes.overlap(match=self._MATCH_IOU, unclear=self._UNCLEAR_IOU)

    def fit_boxes(self, sizes: Floats) -> None:
        """The shapes of the default boxes."""
        self.boxes.fit(sizes)

    def loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        """Focal and box loss, for each default box that answers for an object."""
        logits, offsets = outputs
        chosen = self.boxes()[targets.rows % self.predictions]
        found = decode(offsets.flatten(0, 1)[targets.rows].float(), chosen, self._WEIGHTS)
        return focal_loss(logits, targets) + box_loss(found, targets)

    def detections(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """The default boxes as they are moved; each class's score is for itself."""
        logits, offsets = outputs
        scores = logits.float().sigmoid().transpose(1, 2)
        return decode(offsets.float(), self.boxes(), self._WEIGHTS), scores


class FCOS(_Pyramid):
    """FCOS (Tian et al. 2019, 2020), as torchvision has it: points, with the way to the object's four sides.

    Unlike there, points are in the middle of their cells.
    """

    cells: Tensor

    def __init__(self, classes: int, size: int, backbone: Backbone = None) -> None:
        head = FCOSHead(_CHANNELS, 1, classes)
        # A rectifier follows. From 0, as torchvision has it, half of the sides begin below it and never learn.
        nn.init.constant_(head.regression_head.bbox_reg.bias, _FIRST_WAY)
        super().__init__(size, backbone, head)
        #: [A, 4]: centre and size of the cells of all levels, fractions of the image, in the order of the head.
        cells = DefaultBoxes(self.grids, [torch.tensor([[1 / columns, 1 / rows]]) for rows, columns in self.grids])
        self.register_buffer("cells", cells(), persistent=False)

    @property
    def predictions(self) -> int:
        """One for each cell."""
        return len(self.cells)

    def assigner(self) -> Assign:
        """By the middle of the object."""
        cells: Floats = self.cells.cpu().numpy()
        return CentreSampling(points=cells[:, :2], cells=cells[:, 2])

    def loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        """Focal, box and centredness loss, for each point that answers for an object."""
        logits, ways, centredness = outputs
        rows = targets.rows
        cells = self.cells[rows % self.predictions]
        found = _corners(ways.flatten(0, 1)[rows].float(), cells)
        # A point outside its object, taken for want of a better one, is as far off centre as can be.
        sides = (targets.corners - cells[:, :2].repeat(1, 2)).abs()
        inside = ((targets.corners[:, :2] < cells[:, :2]) & (targets.corners[:, 2:] > cells[:, :2])).all(dim=1)
        x, y = sides[:, 0::2], sides[:, 1::2]
        near = (x.amin(1) / x.amax(1)) * (y.amin(1) / y.amax(1))
        wanted = torch.where(inside, near.sqrt(), 0.0)
        centred = nn.functional.binary_cross_entropy_with_logits(
            centredness.flatten(0, 1)[rows, 0].float(), wanted, reduction="sum"
        )
        return focal_loss(logits, targets) + box_loss(found, targets) + centred

    def detections(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """A score is the geometric mean of class and centredness, as torchvision has it."""
        logits, ways, centredness = outputs
        scores = (logits.float().sigmoid() * centredness.float().sigmoid()).sqrt()
        return _corners(ways.float(), self.cells), scores.transpose(1, 2)


def _corners(ways: Tensor, cells: Tensor) -> Tensor:
    """The boxes whose left, top, right and bottom sides are `ways` [..., 4] from the centre of `cells`, in cells."""
    away = ways * cells[:, 2:].repeat(1, 2)
    centre = cells[:, :2]
    return torch.cat([centre - away[..., :2], centre + away[..., 2:]], dim=-1)
