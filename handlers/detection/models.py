"""The networks, by the name a task gives in `net_model`.

A network takes images as they lie in memory (uint8, [N, S, S, 3], RGB, stretched to its square input) and gives, for
each of its A default boxes, an offset and a score for each class: normalisation is its own business, so that training,
export and measurement cannot disagree about it.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssdlite import SSDLiteHead, _extra_block, _normal_init
from torchvision.models.mobilenetv2 import mobilenet_v2
from torchvision.ops import box_convert

from handlers.detection.boxes import Floats
from handlers.detection.weights import mobilenet_v2_weights
from schemas.enums import ModelScopeClass

#: Side of the input in pixels. The scale changes nothing else: the ImageNet weights fit one width only.
INPUT_SIZES = {ModelScopeClass.SMALL: 224, ModelScopeClass.NORMAL: 320, ModelScopeClass.LARGE: 448}

#: Boxes of a class that may enter non-maximum suppression (SSD: 400).
CANDIDATES = 400

#: Side of the default boxes of each feature level, as fractions of the input; one more, for the last level's larger
#: square. The first level is at stride 8: from stride 16 on, objects of a few pixels fall between the cells.
_SCALES = [0.06, 0.12, 0.24, 0.4, 0.58, 0.76, 0.9, 1.0]
_ASPECT_RATIOS = [[2, 3]] * 7
#: What offsets are multiplied by, so that they are of like size (1 / variance in the reference code of SSD).
_SHIFT_WEIGHT, _GROWTH_WEIGHT = 10.0, 5.0
#: Largest growth of a default box, as in torchvision's BoxCoder; keeps exp() finite.
_MAX_LOG_GROWTH = math.log(1000 / 16)


class MobileNetSSD(nn.Module):
    """SSD (Liu et al. 2016) with depthwise heads (SSDLite) on MobileNetV2 (Sandler et al. 2018), seven feature levels.

    The levels: the expansions before strides 16 and 32 (so strides 8 and 16), the last feature map (32), and four
    extra blocks that halve it.
    """

    default_boxes: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, class_count: int, input_size: int, backbone: dict[str, Tensor] | None = None) -> None:
        """`backbone`: torchvision's state of MobileNetV2, or None for a random start."""
        super().__init__()
        self.input_size = input_size
        trunk = mobilenet_v2(weights=None)
        if backbone is not None:
            trunk.load_state_dict(backbone)
        features = trunk.features
        self.levels = nn.ModuleList(
            [
                nn.Sequential(*features[:7], features[7].conv[0]),
                nn.Sequential(features[7].conv[1:], *features[8:14], features[14].conv[0]),
                nn.Sequential(features[14].conv[1:], *features[15:]),
            ]
        )
        extra = nn.ModuleList(
            _extra_block(before, after, nn.BatchNorm2d)
            for before, after in ((1280, 512), (512, 256), (256, 256), (256, 128))
        )
        _normal_init(extra)
        self.levels.extend(extra)
        generator = DefaultBoxGenerator(_ASPECT_RATIOS, scales=_SCALES)
        channels = [192, 576, 1280, 512, 256, 256, 128]
        self.head = SSDLiteHead(channels, generator.num_anchors_per_location(), class_count + 1, nn.BatchNorm2d)
        # Constants, not state: snapshots and exports need not carry them.
        self.register_buffer("mean", 255 * torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        with torch.no_grad():
            blank = torch.zeros(1, 3, input_size, input_size)
            maps = self.eval()._feature_maps(blank)
            corners = generator(ImageList(blank, [(input_size, input_size)]), maps)[0] / input_size
        self.train()
        self.register_buffer("default_boxes", box_convert(corners, "xyxy", "cxcywh"), persistent=False)

    def default_corners(self) -> Floats:
        """float32 [A, 4]: the default boxes by their corners, fractions of the image."""
        return np.asarray(box_convert(self.default_boxes.cpu(), "cxcywh", "xyxy").numpy(), np.float32)

    def _feature_maps(self, x: Tensor) -> list[Tensor]:
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(offsets [N, A, 4], logits [N, A, 1 + classes]; 0 is background) of `images` uint8 [N, S, S, 3]."""
        # NHWC in memory is what torch calls channels_last, so this moves nothing.
        x = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
        outputs = self.head(self._feature_maps(x))
        return outputs["bbox_regression"], outputs["cls_logits"]


class Detector(nn.Module):
    """A network with its box decoding: what is exported, and what is measured during training."""

    def __init__(self, network: MobileNetSSD) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(boxes [N, A, 4]: corners, fractions of the image; scores [N, classes, A], 0 … 1) of uint8 [N, S, S, 3].

        All but the `CANDIDATES` best scores of a class are 0: suppression is quadratic, and a network in its first
        iterations finds every class everywhere.
        """
        offsets, logits = self.network(images)
        scores = logits.float().softmax(dim=-1)[..., 1:].transpose(1, 2)
        least = scores.topk(min(CANDIDATES, len(self.network.default_boxes)), dim=2).values[..., -1:]
        scores = torch.where(scores >= least, scores, 0.0)
        return decode(offsets.float(), self.network.default_boxes), scores


def encode(corners: Tensor, default_boxes: Tensor) -> Tensor:
    """The offsets [A, 4] that turn `default_boxes` (centre and size) into `corners` [A, 4] (SSD, eq. 2)."""
    centred = box_convert(corners, "xyxy", "cxcywh")
    shift = (centred[:, :2] - default_boxes[:, :2]) / default_boxes[:, 2:]
    growth = torch.log(centred[:, 2:] / default_boxes[:, 2:])
    return torch.cat([shift * _SHIFT_WEIGHT, growth * _GROWTH_WEIGHT], dim=1)


def decode(offsets: Tensor, default_boxes: Tensor) -> Tensor:
    """The inverse of `encode`, [N, A, 4], with corners clipped to the image."""
    shift = offsets[..., :2] / _SHIFT_WEIGHT
    growth = (offsets[..., 2:] / _GROWTH_WEIGHT).clamp(max=_MAX_LOG_GROWTH)
    centre = default_boxes[:, :2] + shift * default_boxes[:, 2:]
    half = growth.exp() * default_boxes[:, 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1).clamp(0, 1)


def _build_mobilenet(class_count: int, input_size: int) -> tuple[MobileNetSSD, str]:
    state, origin = mobilenet_v2_weights()
    return MobileNetSSD(class_count, input_size, state), origin


#: `schemas.networks.NETWORKS`, with how each is built: (classes, input size) -> (network, where its weights came from).
NETWORKS: dict[str, Callable[[int, int], tuple[MobileNetSSD, str]]] = {"MobileNet": _build_mobilenet}


def freeze_batch_norm(network: nn.Module) -> None:
    """Keep the statistics of batch normalisation as they are. To be repeated after every `train()`."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


@torch.no_grad()
def calibrate_batch_norm(network: nn.Module, images: Tensor) -> None:
    """Set the statistics of layers that have none yet (those that ImageNet did not train) to those of `images`.

    For batches too small to have statistics: these are then frozen, and must not be those of a blank start.
    """
    fresh = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d) and not m.num_batches_tracked]
    network.eval()
    for module in fresh:
        module.train()
        module.momentum = 1.0
    network(images)
    for module in fresh:
        module.momentum = 0.1
    network.train()
