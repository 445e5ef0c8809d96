"""How well default boxes meet the objects of a test split: with the shapes that a network is built with, and with those
that it takes from the training split.

    python benchmarks/default_boxes.py [--datasets bccd dice] [--networks MobileNet VGG16 ResNet50]

Printed is the share of objects that some default box overlaps (IoU) by at least so much. Two sets are made up, of
objects anywhere in the image: scratches (a side of 0.06 … 0.15, the other of 0.4 … 0.98 of the image) and animals that
fill it (both sides 0.3 … 0.98).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accuracy import DATASETS
from accuracy_peers import Folder
from torchvision.ops import box_convert, box_iou

from handlers.detection.networks import NETWORKS
from schemas.enums import ModelScopeClass

LEVELS = (0.5, 0.6, 0.7)
#: Fractions of the image between which each side of an object is.
MADE_UP = {"scratches": ((0.06, 0.15), (0.4, 0.98)), "animals": ((0.3, 0.98), (0.3, 0.98))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DATASETS, help="where the data sets are, each a COCO folder")
    parser.add_argument("--datasets", nargs="+", default=["bccd", "dice"])
    parser.add_argument("--networks", nargs="+", default=["MobileNet"])
    chosen = parser.parse_args()
    sets = {}
    for name in chosen.datasets:
        folder = Folder(chosen.folder / name)
        sets[name] = len(folder.names), corners(folder, ("train", "val")), corners(folder, ("test",))
    for seed, (name, sides) in enumerate(MADE_UP.items()):
        random = np.random.default_rng(seed)
        sets[f"{name} (made up)"] = 1, made_up(sides, random), made_up(sides, random)
    print("| data set | network | shapes | " + " | ".join(map(str, LEVELS)) + " |")
    print("|" + "---|" * (3 + len(LEVELS)))
    for name, (classes, train, test) in sets.items():
        for model in chosen.networks:
            network = NETWORKS[model].make(classes, NETWORKS[model].input_sizes[ModelScopeClass.NORMAL], None)
            for shapes in ("built in", "from the data"):
                if shapes == "from the data":
                    network.fit_boxes((train[:, 2:] - train[:, :2]).numpy())
                boxes = box_convert(network.boxes(), "cxcywh", "xyxy")
                best = torch.cat([box_iou(part, boxes).amax(dim=1) for part in test.split(100)])
                met = " | ".join(f"{(best >= level).float().mean():.3f}" for level in LEVELS)
                print(f"| {name} | {model} | {shapes} | {met} |", flush=True)


def corners(folder: Folder, splits: Sequence[str]) -> torch.Tensor:
    """float32 [N, 4]: the objects of `splits`, fractions of their images."""
    found = []
    for name in (name for split in splits for name in folder.splits.get(split, [])):
        height, width = folder.image(name).shape[:2]
        found.append(folder.boxes[name].xyxy / np.array([width, height] * 2, np.float32))
    return torch.from_numpy(np.concatenate(found))


def made_up(sides: tuple[tuple[float, float], tuple[float, float]], random: np.random.Generator) -> torch.Tensor:
    """float32 [500, 4]: objects with `sides` between these, one way round or the other."""
    sizes = random.permuted(np.stack([random.uniform(*side, 500) for side in sides], axis=1), axis=1)
    place = random.uniform(0, 1 - sizes)
    return torch.from_numpy(np.concatenate([place, place + sizes], axis=1).astype(np.float32))


if __name__ == "__main__":
    main()
