"""Batch normalisation where batches are too small to have statistics, and where it is done with."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval


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


def fold_batch_norm(network: nn.Module) -> None:
    """Make every batch normalisation part of the convolution before it, in a `network` that is not trained any more.

    It then says the same, up to rounding, and is exported sooner. A module's children are taken to run in their order,
    as those of torchvision do; `export_check.check_export` would find one that does not.
    """
    for (name, convolution), (next_name, norm) in pairwise(list(network.named_children())):
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(network, name, fuse_conv_bn_eval(convolution, norm))
            setattr(network, next_name, nn.Identity())
    for child in network.children():
        fold_batch_norm(child)
