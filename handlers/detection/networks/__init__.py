"""The networks, by the name a task gives in `net_model`."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from handlers.detection.networks.base import Detector, Network
from handlers.detection.networks.pyramid import FCOS, RetinaNet
from handlers.detection.networks.ssd import mobilenet_v2_ssd, mobilenet_v3_ssd, vgg16_ssd
from handlers.detection.weights import ImageNet, imagenet_weights
from schemas.enums import ModelScopeClass

__all__ = ["NETWORKS", "Detector", "Network", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """How a network is built, and what it is trained with."""

    #: (classes, input size, state of the backbone or None).
    make: Callable[[int, int, dict[str, Tensor] | None], Network]
    backbone: ImageNet
    #: Side of the input in pixels. The scale changes nothing else: the ImageNet weights fit one width only.
    input_sizes: dict[ModelScopeClass, int]
    #: The highest learning rate, as a multiple of the initial rate.
    peak: float

    def build(self, classes: int, input_size: int) -> tuple[Network, str]:
        """(the network, where the weights of its backbone came from); its heads begin at random."""
        state, origin = imagenet_weights(self.backbone)
        return self.make(classes, input_size, state), origin


def _sizes(small: int, normal: int, large: int) -> dict[ModelScopeClass, int]:
    return {ModelScopeClass.SMALL: small, ModelScopeClass.NORMAL: normal, ModelScopeClass.LARGE: large}


#: `schemas.networks.NETWORKS`, with how each is built. The peaks: SSD on MobileNet stands torch's own default of 25.
#: The others' published rates (RetinaNet and FCOS 0.01 for 16 images a step) are, for 10 images, about 6 times the
#: default initial rate; one cycle stands somewhat more (Smith & Topin 2018).
NETWORKS: dict[str, Recipe] = {
    "MobileNet": Recipe(mobilenet_v2_ssd, ImageNet.MOBILENET_V2, _sizes(224, 320, 448), peak=25),
    "MobileNetV3": Recipe(mobilenet_v3_ssd, ImageNet.MOBILENET_V3_LARGE, _sizes(224, 320, 448), peak=25),
    "VGG16": Recipe(vgg16_ssd, ImageNet.VGG16_BN, _sizes(224, 300, 512), peak=10),
    "ResNet50": Recipe(RetinaNet, ImageNet.RESNET50, _sizes(320, 448, 640), peak=10),
    "FCOS": Recipe(FCOS, ImageNet.RESNET50, _sizes(320, 448, 640), peak=10),
}
