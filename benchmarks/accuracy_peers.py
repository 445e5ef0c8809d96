"""What others make of the same images: their detectors, their own recipes, as many views of images as ours.

    python benchmarks/accuracy_peers.py torchvision [--datasets bccd dice] [--seeds 1] [--iterations N]
    python benchmarks/accuracy_peers.py ultralytics …

`torchvision`: its SSDLite on MobileNetV2 with the ImageNet weights that ours begins with, trained as its reference
script trains SSDLite (random crops of SSD, flips, SGD with momentum 0.9 and weight decay 4e-5, 0.15 for 192 images a
step, which is 0.0078 for 10, cosine). `ultralytics`: YOLOv8n from a random start, since its weights cannot be had
everywhere, with all its defaults (mosaic, flips, colours); it needs `pip install ultralytics` (AGPL-3.0) in an
environment of its own. 10 images a step, and an input as large as ours has on these data. Test images are measured by
our COCO evaluation. A row for each peer, data set and seed goes to `--out` (benchmarks/accuracy_peers.json).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import DATASETS, ITERATIONS, keep

from handlers.detection.boxes import Boxes, Detections, make_boxes
from handlers.detection.data import read_image
from handlers.detection.evaluate import average_precision

_BATCH = 10
#: Pixels of the input: what ours chooses for each data set (`handlers.detection.input_size`).
_SIZE, _SIZES = 320, {"dice": 544}

Document = dict[str, Any]
#: What finds objects in an RGB image.
Detect = Callable[[np.ndarray], Detections]


class Folder:
    """A data set on disk: a COCO folder with its splits."""

    def __init__(self, path: Path) -> None:
        coco = json.loads((path / "annotations.json").read_text())
        self.path = path
        self.names = [row["name"] for row in coco["categories"]]
        number = {row["id"]: index + 1 for index, row in enumerate(coco["categories"])}
        rows: dict[int, list[tuple[tuple[float, float, float, float], int, bool]]] = {
            i["id"]: [] for i in coco["images"]
        }
        for row in coco["annotations"]:
            rows[row["image_id"]].append((tuple(row["bbox"]), number[row["category_id"]], bool(row.get("iscrowd"))))
        self.boxes = {image["file_name"]: make_boxes(rows[image["id"]]) for image in coco["images"]}
        self.splits: dict[str, list[str]] = json.loads((path / "split.json").read_text())

    def image(self, name: str) -> np.ndarray:
        """uint8 [H, W, 3], RGB."""
        return read_image(self.path / "images" / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--folder", type=Path, default=DATASETS, help="where the data sets are, each a COCO folder")
    parser.add_argument("--datasets", nargs="+", default=["bccd", "dice"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--iterations", type=int, help="as many as ours has")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    chosen = parser.parse_args()
    for name in chosen.datasets:
        folder, iterations = Folder(chosen.folder / name), chosen.iterations or ITERATIONS[name]
        for seed in chosen.seeds:
            begun = time.monotonic()
            detect = PEERS[chosen.peer](folder, seed, iterations, _SIZES.get(name, _SIZE))
            seconds = time.monotonic() - begun
            row = {"peer": chosen.peer, "dataset": name, "seed": seed, **measured(folder, detect)}
            keep(row | {"seconds": round(seconds), "iterations": iterations}, chosen.out)


def measured(folder: Folder, detect: Detect) -> Document:
    """On the split `test`."""
    truths: dict[int, Boxes] = {}
    found: dict[int, Detections] = {}
    for number, name in enumerate(folder.splits["test"]):
        truths[number], found[number] = folder.boxes[name], detect(folder.image(name))
    metrics = average_precision(list(truths), truths, found, len(folder.names))
    return {key: round(metrics[key], 4) for key in ("map", "map_50")}


def torchvision_ssdlite(classes: int, size: int = _SIZE) -> torch.nn.Module:
    """Its SSDLite for so many classes, on MobileNetV2 with the weights that ours begins with."""
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD
    from torchvision.models.detection.ssdlite import SSDLiteHead, _mobilenet_extractor
    from torchvision.models.mobilenetv2 import mobilenet_v2

    from handlers.detection.weights import ImageNet, imagenet_weights

    trunk = mobilenet_v2()
    weights, _ = imagenet_weights(ImageNet.MOBILENET_V2)
    trunk.load_state_dict(weights)
    for block in trunk.features[1:-1]:
        block.block = block.conv  # as MobileNetV3's blocks call theirs
    extractor = _mobilenet_extractor(trunk, 6, torch.nn.BatchNorm2d)
    channels = [one.shape[1] for one in extractor(torch.zeros(2, 3, size, size)).values()]
    anchors = DefaultBoxGenerator([[2, 3]] * 6, min_ratio=0.2, max_ratio=0.95)
    head = SSDLiteHead(channels, anchors.num_anchors_per_location(), classes + 1, torch.nn.BatchNorm2d)
    return SSD(
        extractor,
        anchors,
        (size, size),
        classes + 1,
        head=head,
        # As its SSDLite, but for the normalisation, which is that of the weights, and for the least score and how many
        # detections there are, which are ours (0.001 and 300).
        score_thresh=0.01,
        nms_thresh=0.55,
        detections_per_img=100,
        topk_candidates=300,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def train_torchvision(folder: Folder, seed: int, iterations: int, size: int) -> Detect:
    """SSDLite as torchvision's reference script trains it."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    torch.manual_seed(seed)
    network = torchvision_ssdlite(len(folder.names), size)
    change = v2.Compose(
        [
            v2.RandomIoUCrop(),
            v2.RandomHorizontalFlip(),
            v2.SanitizeBoundingBoxes(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    names = folder.splits["train"] + folder.splits.get("val", [])
    images = {name: folder.image(name) for name in names}
    optimizer = torch.optim.SGD(network.parameters(), 0.15 * _BATCH / 192, momentum=0.9, weight_decay=4e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    network.train()
    for batch in views(names, iterations, seed):
        pairs = []
        for name in batch:
            boxes = folder.boxes[name]
            image = tv_tensors.Image(torch.from_numpy(images[name]).permute(2, 0, 1))
            corners = tv_tensors.BoundingBoxes(boxes.xyxy, format="XYXY", canvas_size=image.shape[-2:])
            pairs.append(change(image, {"boxes": corners, "labels": torch.from_numpy(boxes.class_ids)}))
        loss = sum(network([image for image, _ in pairs], [target for _, target in pairs]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()

    @torch.inference_mode()
    def detect(image: np.ndarray) -> Detections:
        (found,) = network([torch.from_numpy(image).permute(2, 0, 1) / 255])
        return Detections(found["boxes"].numpy(), found["labels"].numpy(), found["scores"].numpy())

    return detect


def views(names: list[str], iterations: int, seed: int) -> list[list[str]]:
    """Batches over shuffled epochs."""
    random, row = np.random.default_rng(seed), []
    while len(row) < iterations * _BATCH:
        row += random.permutation(names).tolist()
    return [row[start : start + _BATCH] for start in range(0, iterations * _BATCH, _BATCH)]


def train_ultralytics(folder: Folder, seed: int, iterations: int, size: int) -> Detect:
    """YOLOv8n with all its defaults."""
    import ultralytics

    with tempfile.TemporaryDirectory() as work:
        counts = {split: write_yolo(folder, split, Path(work)) for split in ("train", "val", "test")}
        lines = [f"path: {work}", "train: images/train", "val: images/val", f"names: {json.dumps(folder.names)}"]
        (Path(work) / "data.yaml").write_text("\n".join(lines))
        yolo = ultralytics.YOLO("yolov8n.yaml")
        yolo.train(
            data=f"{work}/data.yaml",
            epochs=max(1, round(iterations * _BATCH / counts["train"])),
            imgsz=size,
            batch=_BATCH,
            seed=seed,
            device="cpu",
            workers=2,
            plots=False,
            project=work,
            verbose=False,
        )

    def detect(image: np.ndarray) -> Detections:
        (result,) = yolo.predict(image[..., ::-1], imgsz=size, conf=0.001, max_det=100, verbose=False)
        boxes = result.boxes
        return Detections(boxes.xyxy.numpy(), boxes.cls.numpy().astype(np.int64) + 1, boxes.conf.numpy())

    return detect


def write_yolo(folder: Folder, split: str, work: Path) -> int:
    """The images and labels of a split as ultralytics wants them; how many images."""
    images, labels = work / "images" / split, work / "labels" / split
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    names = folder.splits.get(split, [])
    for name in names:
        (images / name).symlink_to(folder.path / "images" / name)
        height, width = folder.image(name).shape[:2]
        boxes = folder.boxes[name]
        centred = np.concatenate(
            [boxes.xyxy[:, :2] + boxes.xyxy[:, 2:], 2 * (boxes.xyxy[:, 2:] - boxes.xyxy[:, :2])], axis=1
        )
        rows = centred / 2 / np.array([width, height] * 2)
        lines = [f"{c - 1} {x} {y} {w} {h}" for c, (x, y, w, h) in zip(boxes.class_ids, rows.tolist(), strict=True)]
        (labels / name).with_suffix(".txt").write_text("\n".join(lines))
    return len(names)


PEERS: dict[str, Callable[[Folder, int, int, int], Detect]] = {
    "torchvision": train_torchvision,
    "ultralytics": train_ultralytics,
}

if __name__ == "__main__":
    main()
