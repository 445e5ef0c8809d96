"""Made-up labels and detections, and a plain matcher that shares no code with the one under test."""

from collections.abc import Mapping, Sequence

import numpy as np

from handlers.detection.boxes import Boxes, Detections, make_boxes

NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32))


def detections(rows: Sequence[tuple[tuple[float, float, float, float], int, float]]) -> Detections:
    """From `((x, y, width, height), class id, score)`."""
    rows = sorted(rows, key=lambda row: -row[2])
    boxes = make_boxes([(box, class_id, False) for box, class_id, _ in rows])
    return Detections(boxes.xyxy, boxes.class_ids, np.array([row[2] for row in rows], np.float32))


def random_data(
    seed: int, images: int, most: int, difficult: float = 0.0
) -> tuple[dict[int, Boxes], dict[int, Detections]]:
    """Objects, some of them crowds; detections near most of them, with other classes now and then, and false ones.

    `difficult` is the share of the objects that are.
    """
    rng = np.random.default_rng(seed)
    truths, found = {}, {}
    for image_id in rng.permutation(images * 3)[:images].tolist():
        rows = [
            ((*rng.uniform(0, 200, 2), *rng.uniform(5, 120, 2)), int(rng.integers(1, 4)), bool(rng.random() < 0.1))
            for _ in range(rng.integers(0, most + 1))
        ]
        truths[image_id] = make_boxes(rows, [bool(rng.random() < difficult) for _ in rows if difficult] or None)
        near = [
            (
                tuple(np.abs(np.array(box) + rng.normal(0, 5, 4)) + 0.1),
                class_id if rng.random() < 0.85 else int(rng.integers(1, 4)),
                # Two decimals, so that equal scores happen.
                round(float(rng.random()), 2),
            )
            for box, class_id, _ in rows * 2
            if rng.random() < 0.7
        ]
        false = [
            ((*rng.uniform(0, 200, 2), *rng.uniform(5, 120, 2)), int(rng.integers(1, 4)), round(float(rng.random()), 2))
            for _ in range(rng.integers(0, most + 1))
        ]
        found[image_id] = detections(near + false)
    return truths, found


def overlap(one: Sequence[float], other: Sequence[float], crowd: bool) -> float:
    """IoU of two boxes (left, top, right, bottom); for a crowd, the share of `one` that lies in it."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (areas[0] if crowd else sum(areas) - width * height)


def matches(
    truths: Mapping[int, Boxes], found: Mapping[int, Detections], *, same_class: bool, threshold: float = 0.0
) -> list[tuple[int, int, int | None]]:
    """(image, row in its detections, row in its truths or None) for each detection of at least `threshold`.

    In the order of the scores, each takes the object it overlaps most, of those that are left and by 0.5 at least; else
    one that does not count, as many as like.
    """
    rows: list[tuple[int, int, int | None]] = []
    for image_id, boxes in truths.items():
        taken: set[int] = set()
        one = found.get(image_id, NOTHING)
        for index in sorted(range(len(one)), key=lambda index: -one.scores[index]):
            if one.scores[index] < threshold:
                continue
            best: tuple[bool, float, int] | None = None
            for row in range(len(boxes)):
                crowd, counts = bool(boxes.crowd[row]), bool(boxes.counted[row])
                if row in taken or (same_class and boxes.class_ids[row] != one.class_ids[index]):
                    continue
                much = overlap(one.xyxy[index].astype(float).tolist(), boxes.xyxy[row].astype(float).tolist(), crowd)
                if much >= 0.5 and (best is None or (counts, much) > best[:2]):
                    best = (counts, much, row)
            if best and best[0]:
                taken.add(best[2])
            rows.append((image_id, index, best[2] if best else None))
    return rows
