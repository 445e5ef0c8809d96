"""SSD (Liu et al. 2016): default boxes on feature maps of several sizes, each classified and moved."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead, _extra_block, _normal_init
from torchvision.models.mobilenetv2 import mobilenet_v2
from torchvision.models.mobilenetv3 import mobilenet_v3_large
from torchvision.models.vgg import vgg16_bn
from torchvision.ops import Conv2dNormActivation, box_convert

from handlers.detection.boxes import Floats
from handlers.detection.coding import decode
from handlers.detection.loss import multibox_loss
from handlers.detection.networks.base import Network, Outputs
from handlers.detection.networks.default_boxes import DefaultBoxes
from handlers.detection.targets import Assign, Targets

#: torchvision's state of the backbone; None for a random start.
Backbone = dict[str, Tensor] | None

#: A default box that overlaps an object by this much (IoU) answers for it.
MATCH_IOU = 0.5

#: Side of the default boxes of each of seven levels, as fractions of the input; one more, for the last level's larger
#: square. Levels with few objects in the data keep these. The first level is at stride 8: from stride 16 on, objects of
#: a few pixels fall between the cells.
_SCALES = [0.06, 0.12, 0.24, 0.4, 0.58, 0.76, 0.9, 1.0]


class TopDown(nn.Module):
    """A feature pyramid (FPN, Lin et al. 2017) of the first levels: each also learns what the coarser ones see.

    Without it the finest level, on which small objects are found, knows only what a few early layers make of the image,
    which tells objects from background but not one kind from another. Its convolutions are depthwise, as the heads.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        """`channels` of the levels that take part, the finest first. They come out with `WIDTH` each."""
        super().__init__()
        self.inward = nn.ModuleList(
            Conv2dNormActivation(before, self.WIDTH, kernel_size=1, activation_layer=None) for before in channels
        )
        self.outward = nn.ModuleList(
            nn.Sequential(
                Conv2dNormActivation(self.WIDTH, self.WIDTH, groups=self.WIDTH, activation_layer=nn.ReLU6),
                Conv2dNormActivation(self.WIDTH, self.WIDTH, kernel_size=1, activation_layer=nn.ReLU6),
            )
            for _ in channels
        )

    WIDTH = 128

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """All `maps`, the finest first; those beyond the pyramid as they are."""
        count = len(self.inward)
        own = [inward(one) for inward, one in zip(self.inward, maps, strict=False)]
        for finer in reversed(range(count - 1)):
            own[finer] = own[finer] + nn.functional.interpolate(own[finer + 1], size=own[finer].shape[-2:])
        return [outward(one) for outward, one in zip(self.outward, own, strict=True)] + maps[count:]


class SSD(Network):
    """Levels, each from the one before it, and a head on all of them."""

    def __init__(
        self,
        levels: Sequence[nn.Module],
        head: nn.Module,
        boxes: DefaultBoxGenerator,
        size: int,
        neck: TopDown | None = None,
    ) -> None:
        """`head`: as torchvision's SSDHead, with 1 + classes outputs, the first for background.

        `boxes`: the shapes of the default boxes, until `fit_boxes` is told of better ones. `neck`: between levels and
        head.
        """
        super().__init__(size)
        self.levels = nn.ModuleList(levels)
        self.neck = neck
        self.head = head
        with torch.no_grad():
            blank = torch.zeros(1, 3, size, size)
            maps = self.eval()._feature_maps(blank)
            corners = boxes(ImageList(blank, [(size, size)]), maps)[0] / size
        self.train()
        grids = [(one.shape[-2], one.shape[-1]) for one in maps]
        counts = boxes.num_anchors_per_location()
        of_level = box_convert(corners, "xyxy", "cxcywh")[:, 2:].split(
            [rows * columns * count for (rows, columns), count in zip(grids, counts, strict=True)]
        )
        # The shapes are alike in every cell.
        self.boxes = DefaultBoxes(grids, [sizes[:count] for sizes, count in zip(of_level, counts, strict=True)])

    @property
    def predictions(self) -> int:
        """One for each default box."""
        return len(self.boxes)

    def assigner(self) -> Assign:
        """As torchvision's SSDMatcher."""
        return self.boxes.overlap(match=MATCH_IOU, unclear=MATCH_IOU)

    def fit_boxes(self, sizes: Floats) -> None:
        """The shapes of the default boxes."""
        self.boxes.fit(sizes)

    def _feature_maps(self, x: Tensor) -> list[Tensor]:
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return self.neck(maps) if self.neck else maps

    def forward(self, images: Tensor) -> Outputs:
        """(offsets [N, A, 4], logits [N, A, 1 + classes]; 0 is background) of `images` uint8 [N, S, S, 3]."""
        outputs = self.head(self._feature_maps(self.normalised(images)))
        return outputs["bbox_regression"], outputs["cls_logits"]

    def loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        """The multibox loss."""
        offsets, logits = outputs
        return multibox_loss(offsets, logits, self.boxes(), targets)

    def detections(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """The default boxes as they are moved; scores are a softmax with background."""
        offsets, logits = outputs
        scores = logits.float().softmax(dim=-1)[..., 1:].transpose(1, 2)
        return decode(offsets.float(), self.boxes()), scores


def mobilenet_v2_ssd(classes: int, size: int, backbone: Backbone = None) -> SSD:
    """SSD with depthwise heads (SSDLite) on MobileNetV2 (Sandler et al. 2018), seven feature levels.

    The levels: the expansions before strides 16 and 32 (so strides 8 and 16), the last feature map (32), and four
    extra blocks that halve it.
    """
    trunk = mobilenet_v2(weights=None)
    if backbone is not None:
        trunk.load_state_dict(backbone)
    features = trunk.features
    levels = [
        nn.Sequential(*features[:7], features[7].conv[0]),
        nn.Sequential(features[7].conv[1:], *features[8:14], features[14].conv[0]),
        nn.Sequential(features[14].conv[1:], *features[15:]),
    ]
    return _lite(levels, [192, 576, 1280], classes, size)


def mobilenet_v3_ssd(classes: int, size: int, backbone: Backbone = None) -> SSD:
    """As torchvision's SSDLite on MobileNetV3-Large (Howard et al. 2019), but with levels as `mobilenet_v2_ssd`.

    torchvision's six levels begin at stride 16.
    """
    # Its usual momentum of 0.01 takes hundreds of steps to leave the blank start; the constant is as ImageNet's has it.
    trunk = mobilenet_v3_large(weights=None, norm_layer=_batch_norm_of_v3)
    if backbone is not None:
        trunk.load_state_dict(backbone)
    features = trunk.features
    levels = [
        nn.Sequential(*features[:7], features[7].block[0]),
        nn.Sequential(features[7].block[1:], *features[8:13], features[13].block[0]),
        nn.Sequential(features[13].block[1:], *features[14:]),
    ]
    return _lite(levels, [240, 672, 960], classes, size)


def _batch_norm_of_v3(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=0.001)


def _lite(levels: list[nn.Sequential], channels: list[int], classes: int, size: int) -> SSD:
    """`levels` with their output `channels`, four more that halve the last, and a depthwise head."""
    more = [512, 256, 256, 128]
    extra = [
        _extra_block(before, after, nn.BatchNorm2d) for before, after in zip([channels[-1], *more], more, strict=False)
    ]
    for block in extra:
        _normal_init(block)
    boxes = DefaultBoxGenerator([[2, 3]] * 7, scales=_SCALES)
    neck = TopDown(channels)
    head = SSDLiteHead(
        [neck.WIDTH] * len(channels) + more, boxes.num_anchors_per_location(), classes + 1, nn.BatchNorm2d
    )
    return SSD([*levels, *extra], head, boxes, size, neck)


def vgg16_ssd(classes: int, size: int, backbone: Backbone = None) -> SSD:
    """SSD300 (Liu et al. 2016) on VGG16 (Simonyan & Zisserman 2015), with batch normalisation throughout.

    Without it, as published, it cannot be trained from a random start, and needs the first feature map scaled.
    """
    trunk = vgg16_bn(weights=None)
    if backbone is not None:
        trunk.load_state_dict(backbone)
    features = trunk.features
    features[23].ceil_mode = True  # 75 becomes 38, as in the reference code.
    levels = [
        nn.Sequential(*features[:33]),  # to conv4_3
        nn.Sequential(
            *features[33:43],  # to conv5_3
            nn.MaxPool2d(3, stride=1, padding=1),
            _convolution(512, 1024, padding=6, dilation=6),  # fc6, a convolution
            _convolution(1024, 1024, kernel_size=1),  # fc7
        ),
        *[
            nn.Sequential(_convolution(before, middle, kernel_size=1), _convolution(middle, after, stride=2, padding=1))
            for before, middle, after in ((1024, 256, 512), (512, 128, 256), (256, 128, 256), (256, 128, 256))
        ],
    ]
    # As torchvision's SSD300.
    boxes = DefaultBoxGenerator(
        [[2], [2, 3], [2, 3], [2, 3], [2], [2]], scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
    )
    head = SSDHead([512, 1024, 512, 256, 256, 256], boxes.num_anchors_per_location(), classes + 1)
    return SSD(levels, head, boxes, size)


def _convolution(before: int, after: int, *, kernel_size: int = 3, padding: int = 0, **more: int) -> nn.Sequential:
    """A convolution, batch normalisation, and a rectifier."""
    block: nn.Sequential = Conv2dNormActivation(before, after, kernel_size=kernel_size, padding=padding, **more)
    return block
