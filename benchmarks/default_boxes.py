"""How well default boxes meet the objects of a test split: with the shapes that a network is built with, and with those
that it takes from the training split.

    python benchmarks/default_boxes.py [--datasets bccd dice] [--networks MobileNet VGG16 ResNet50]

Printed is the share of objects that some default box overlaps (IoU) by at least so much.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DATASETS, help="where the data sets are, each a COCO folder")
    parser.add_argument("--datasets", nargs="+", default=["bccd", "dice"])
    parser.add_argument("--networks", nargs="+", default=["MobileNet"])
    chosen = parser.parse_args()
    print("| data set | network | shapes | " + " | ".join(map(str, LEVELS)) + " |")
    print("|" + "---|" * (3 + len(LEVELS)))
    for name in chosen.datasets:
        folder = Folder(chosen.folder / name)
        train, test = corners(folder, ("train", "val")), corners(folder, ("test",))
        for model in chosen.networks:
            network = NETWORKS[model].make(len(folder.names), NETWORKS[model].input_sizes[ModelScopeClass.NORMAL], None)
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


if __name__ == "__main__":
    main()
