"""Batch normalisation where batches are too small to have statistics."""

import torch
from torch import Tensor, nn


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
    momenta = [module.momentum for module in fresh]
    network.eval()
    for module in fresh:
        module.train()
        module.momentum = 1.0
    network(images)
    for module, momentum in zip(fresh, momenta, strict=True):
        module.momentum = momentum
    network.train()
