"""Seconds to evaluate detections, ours beside pycocotools, on the same made-up data.

    python benchmarks/evaluation.py [--images 5000] [--detections 50000] [--classes 20] [--runs 3]

Prints both, the ratio in each run, and the largest difference between their six figures: mAP, mAP@.5, mAP@.75, and mAP
of small, medium and large objects. Ours is computed by faster-coco-eval, on the same ranges of areas as pycocotools.
"""

import argparse
import contextlib
import io
import statistics
import time

import numpy as np
from figures import figure
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from handlers.detection.boxes import Boxes, Detections
from handlers.detection.coco import ALL_SIZES, LARGE, MEDIUM, SMALL, CocoEvaluation, collect, xywh
from handlers.detection.evaluate import evaluate


def made_up(images: int, detections: int, classes: int, seed: int) -> tuple[dict[int, Boxes], dict[int, Detections]]:
    """About four in five objects are found, at a few pixels' distance; the other detections are false."""
    rng = np.random.default_rng(seed)
    per_image = detections // images
    truths, found = {}, {}
    for image_id in range(1, images + 1):
        count = int(rng.integers(0, 2 * max(per_image // 2, 1) + 1))
        corner = rng.uniform(0, 500, (count, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(10, 140, (count, 2))], axis=1)
        ids = rng.integers(1, classes + 1, count)
        truths[image_id] = Boxes(boxes.astype(np.float32), ids, rng.random(count) < 0.02, np.zeros(count, np.bool_))
        found_again = rng.random(count) < 0.8
        right, right_ids = boxes[found_again][:per_image], ids[found_again][:per_image]
        wrong = rng.uniform(0, 500, (per_image - len(right), 2))
        wrong = np.concatenate([wrong, wrong + rng.uniform(10, 140, wrong.shape)], axis=1)
        near = right + rng.normal(0, 4, right.shape)
        scores = np.sort(rng.random(per_image).astype(np.float32))[::-1]
        order = rng.permutation(per_image)
        found[image_id] = Detections(
            np.concatenate([near, wrong]).astype(np.float32)[order],
            np.concatenate([right_ids, rng.integers(1, classes + 1, len(wrong))])[order],
            scores.copy(),
        )
    return truths, found


def by_ours(truths: dict[int, Boxes], found: dict[int, Detections], classes: int) -> list[float]:
    """The six figures, as `evaluate` asks for them."""
    measured = collect(list(truths), truths, found, classes)
    precision = CocoEvaluation(measured).precision([ALL_SIZES, SMALL, MEDIUM, LARGE])
    parts = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0], *(precision[..., n] for n in (1, 2, 3))]
    return [float(part[part >= 0].mean()) for part in parts]


def by_pycocotools(truths: dict[int, Boxes], found: dict[int, Detections], classes: int) -> list[float]:
    """The six figures; from the same arrays, so that both pay for their own preparation."""
    annotations = [
        {"id": 0, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": int(crowd)}
        for i, boxes in truths.items()
        for b, c, crowd in zip(xywh(boxes.xyxy), boxes.class_ids.tolist(), boxes.crowd.tolist(), strict=True)
    ]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    results = [
        {"image_id": i, "category_id": c, "bbox": b, "score": s}
        for i, boxes in found.items()
        for b, c, s in zip(xywh(boxes.xyxy), boxes.class_ids.tolist(), boxes.scores.tolist(), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        true = COCO()
        true.dataset = {
            "images": [{"id": i} for i in truths],
            "categories": [{"id": c} for c in range(1, classes + 1)],
            "annotations": annotations,
        }
        true.createIndex()
        evaluation = COCOeval(true, true.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats[:6]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    seconds: list[tuple[float, float]] = []
    differences = []
    print(f"{args.images} images, {args.detections} detections, {args.classes} classes; seconds")
    for run in range(args.runs):
        truths, found = made_up(args.images, args.detections, args.classes, run)
        names = [f"class {index}" for index in range(args.classes)]
        begin = time.perf_counter()
        figures = by_ours(truths, found, args.classes)
        ours = time.perf_counter() - begin
        begin = time.perf_counter()
        evaluate(list(truths), truths, found, names, "test", {image_id: str(image_id) for image_id in truths})
        whole = time.perf_counter() - begin
        begin = time.perf_counter()
        theirs_found = by_pycocotools(truths, found, args.classes)
        theirs = time.perf_counter() - begin
        seconds.append((ours, theirs))
        difference = max(abs(a - b) for a, b in zip(figures, theirs_found, strict=True))
        differences.append(difference)
        print(
            f"run {run}: ours {ours:.2f}  pycocotools {theirs:.2f}  ratio {theirs / ours:.2f}  "
            f"mAP {figures[0]:.4f}  largest difference {difference:.1e}  "
            f"whole report {whole:.2f}"
        )
    ratios = [theirs / ours for ours, theirs in seconds]
    print(f"ratio: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    figure(
        f"COCO evaluation, {args.images:,} images and {args.detections:,} detections",
        "s",
        [ours for ours, _ in seconds],
        peer=[theirs for _, theirs in seconds],
        peer_is=f"pycocotools; figures differ by {max(differences):.0e} at most",
        reach=">= 5 x faster, equal to 1e-6",
    )


if __name__ == "__main__":
    main()
