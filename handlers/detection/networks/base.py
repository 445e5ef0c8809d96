"""What every network is to the rest of the detector.

A network takes images as they lie in memory (uint8, [N, S, S, 3], RGB, stretched to its square input) and makes A
predictions for each: normalisation is its own business, so that training, export and measurement cannot disagree about
it. Which prediction answers for which object, the loss, and what the predictions say are the network's as well.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from handlers.detection.boxes import Floats
from handlers.detection.suppression import CANDIDATES
from handlers.detection.targets import Assign, Targets

#: What `forward` gives: its tensors are the network's own affair.
Outputs = tuple[Tensor, ...]


class Network(nn.Module, ABC):
    """A detector that can be trained, snapshot, measured and exported."""

    mean: Tensor
    std: Tensor

    def __init__(self, input_size: int) -> None:
        """`input_size`: side S of the input, pixels."""
        super().__init__()
        self.input_size = input_size
        # ImageNet's, as torchvision's weights want them. Constants, not state: snapshots need not carry them.
        self.register_buffer("mean", 255 * torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    @property
    @abstractmethod
    def predictions(self) -> int:
        """A: how many predictions are made for an image."""

    @abstractmethod
    def assigner(self) -> Assign:
        """What tells which predictions answer for which objects. Needs no device, and any thread may call it."""

    def fit_boxes(self, sizes: Floats) -> None:
        """Take what is assumed about the size of objects from those to be learnt, before the first iteration.

        `sizes` float32 [N, 2]: width and height, fractions of the image.
        """

    @abstractmethod
    def forward(self, images: Tensor) -> Outputs:
        """What the network says about `images` uint8 [N, S, S, 3]."""

    @abstractmethod
    def loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        """How wrong `outputs` are: a number, float32, summed over the images. To be divided, see `Learner.step`."""

    @abstractmethod
    def detections(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """(boxes [N, A, 4]: corners, fractions of the image; scores [N, classes, A], 0 … 1), both float32."""

    def normalised(self, images: Tensor) -> Tensor:
        """`images` uint8 [N, S, S, 3] as float [N, 3, S, S] with ImageNet's mean and deviation."""
        # NHWC in memory is what torch calls channels_last, so this moves nothing.
        return (images.permute(0, 3, 1, 2).float() - self.mean) / self.std

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device


class Detector(nn.Module):
    """A network with what its predictions say: what is exported, and what is measured during training."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(boxes [N, A, 4]: corners, fractions of the image; scores [N, classes, A], 0 … 1) of uint8 [N, S, S, 3].

        Boxes are clipped to the image.
        """
        boxes, scores = self.network.detections(self.network(images))
        return boxes.clamp(0, 1), only_candidates(scores)


def only_candidates(scores: Tensor) -> Tensor:
    """`scores` [N, classes, A] with all but the `CANDIDATES` best of each class and image 0.

    Suppression is quadratic, and a network in its first iterations finds every class everywhere.
    """
    least = scores.topk(min(CANDIDATES, scores.shape[-1]), dim=2).values[..., -1:]
    return torch.where(scores >= least, scores, 0.0)
