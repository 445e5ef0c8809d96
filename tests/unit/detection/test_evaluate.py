"""Average precision is COCO's: equal to pycocotools on random and on odd data."""

import contextlib
import io
import logging
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from handlers.detection.boxes import Boxes, Detections, make_boxes
from handlers.detection.errors import DataError
from handlers.detection.evaluate import evaluate, xywh
from schemas.result import MAX_CLASSES_LISTED, Metrics

NAMES = ("scratch", "pit", "stain")
NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32))


def detections(rows: Sequence[tuple[tuple[float, float, float, float], int, float]]) -> Detections:
    """From `((x, y, width, height), class id, score)`."""
    rows = sorted(rows, key=lambda row: -row[2])
    boxes = make_boxes([(box, class_id, False) for box, class_id, _ in rows])
    return Detections(boxes.xyxy, boxes.class_ids, np.array([row[2] for row in rows], np.float32))


def peer(truths: dict[int, Boxes], found: dict[int, Detections], classes: int) -> tuple[list[float], list[list[float]]]:
    """(mAP, mAP@.5, mAP@.75; mAP and mAP@.5 of each class) by pycocotools; -1 is none."""
    with contextlib.redirect_stdout(io.StringIO()):
        true = COCO()
        true.dataset = {"images": [{"id": i} for i in truths], "categories": [{"id": c + 1} for c in range(classes)]}
        true.dataset["annotations"] = [
            {"image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": int(crowd)}
            for i, boxes in truths.items()
            for b, c, crowd in zip(xywh(boxes.xyxy), boxes.class_ids.tolist(), boxes.crowd.tolist(), strict=True)
        ]
        for number, row in enumerate(true.dataset["annotations"], 1):
            row["id"] = number
        true.createIndex()
        rows = [
            {"image_id": i, "category_id": c, "bbox": b, "score": s}
            for i, boxes in found.items()
            for b, c, s in zip(xywh(boxes.xyxy), boxes.class_ids.tolist(), boxes.scores.tolist(), strict=True)
        ]
        results = COCO()
        results.dataset = {**true.dataset, "annotations": []}
        results.createIndex()
        evaluation = COCOeval(true, true.loadRes(rows) if rows else results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # [threshold, recall, class, area, detections at most]
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    per_class = []
    for index in range(classes):
        of_class = precision[:, :, index]
        per_class.append([float(of_class.mean()), float(of_class[0].mean())])
    return [float(value) for value in evaluation.stats[:3]], per_class


def assert_equal(metrics: Metrics, truths: dict[int, Boxes], found: dict[int, Detections]) -> None:
    overall, per_class = peer(truths, found, len(metrics.per_class))
    assert [metrics.map, metrics.map_50, metrics.map_75] == pytest.approx(overall, abs=1e-6)
    for row, (ap, ap_50) in zip(metrics.per_class, per_class, strict=True):
        if ap == -1:
            assert row.map is None
            assert row.map_50 is None
        else:
            assert row.map == pytest.approx(ap, abs=1e-6)
            assert row.map_50 == pytest.approx(ap_50, abs=1e-6)


def measured(truths: dict[int, Boxes], found: dict[int, Detections], names: Sequence[str] = NAMES) -> Metrics:
    return evaluate(list(truths), truths, found, names, "test")


def random_data(seed: int, images: int, most: int) -> tuple[dict[int, Boxes], dict[int, Detections]]:
    """Objects, some of them crowds; detections near most of them, with other classes now and then, and false ones."""
    rng = np.random.default_rng(seed)
    truths, found = {}, {}
    for image_id in rng.permutation(images * 3)[:images].tolist():
        rows = [
            ((*rng.uniform(0, 200, 2), *rng.uniform(5, 120, 2)), int(rng.integers(1, 4)), bool(rng.random() < 0.1))
            for _ in range(rng.integers(0, most + 1))
        ]
        truths[image_id] = make_boxes(rows)
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


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 12), most=st.integers(1, 25))
def test_equal_to_pycocotools_on_random_data(seed: int, images: int, most: int) -> None:
    truths, found = random_data(seed, images, most)
    truths[1000] = make_boxes([((10, 10, 50, 50), 1, False)])
    found[1000] = NOTHING
    assert_equal(measured(truths, found), truths, found)


def test_a_class_without_labels_has_none_and_does_not_count() -> None:
    """Not -1, and not 0: the mean is over the classes that could be found."""
    truths = {1: make_boxes([((0, 0, 10, 10), 1, False), ((50, 0, 10, 10), 1, False)])}
    found = {1: detections([((0, 0, 10, 10), 1, 0.9), ((50, 0, 10, 10), 1, 0.8), ((20, 20, 10, 10), 3, 0.7)])}
    metrics = measured(truths, found)
    assert metrics.map == pytest.approx(1)
    assert [(row.map, row.instances, row.detections) for row in metrics.per_class] == [
        (pytest.approx(1), 2, 2),
        (None, 0, 0),
        (None, 0, 1),
    ]
    assert [(row.class_id, row.class_name) for row in metrics.per_class] == list(enumerate(NAMES, 1))
    assert_equal(metrics, truths, found)


@pytest.mark.parametrize("found", [{}, {1: NOTHING}], ids=["no entry", "empty"])
def test_no_detections_are_zero(found: dict[int, Detections]) -> None:
    truths = {1: make_boxes([((0, 0, 10, 10), 2, False)])}
    metrics = measured(truths, found)
    assert (metrics.map, metrics.map_50, metrics.map_75) == (0, 0, 0)
    assert metrics.per_class[1].map == 0
    assert_equal(metrics, truths, found)


def test_a_crowd_is_neither_a_miss_nor_an_instance() -> None:
    """Detections inside it, however many, are not false either."""
    truths = {1: make_boxes([((0, 0, 10, 10), 1, False), ((100, 0, 100, 100), 1, True)])}
    inside = [((100 + 20 * i, 10, 15, 15), 1, 0.95) for i in range(4)]
    found = {1: detections([((0, 0, 10, 10), 1, 0.9), *inside])}
    metrics = measured(truths, found)
    assert metrics.map == pytest.approx(1)
    assert metrics.per_class[0].instances == 1
    assert_equal(metrics, truths, found)


def test_the_hundred_best_of_a_class_in_an_image_count() -> None:
    """A right one in place 101 finds nothing."""
    truths = {1: make_boxes([((0, 0, 10, 10), 1, False)])}
    false = [((50 + i, 50, 20, 20), 1, 0.9) for i in range(100)]
    last = ((0, 0, 10, 10), 1, 0.1)
    assert measured(truths, {1: detections([*false[:99], last])}).map > 0
    found = {1: detections([*false, last])}
    metrics = measured(truths, found)
    assert metrics.map == 0
    assert metrics.per_class[0].detections == 101
    assert_equal(metrics, truths, found)


def test_images_without_labels_cost_precision() -> None:
    truths = {1: make_boxes([((0, 0, 10, 10), 1, False)]), 2: make_boxes([])}
    found = {1: detections([((0, 0, 10, 10), 1, 0.5)]), 2: detections([((0, 0, 10, 10), 1, 0.9)])}
    metrics = measured(truths, found)
    assert metrics.map == pytest.approx(0.5)
    assert_equal(metrics, truths, found)


def test_only_the_named_images_count() -> None:
    truths = {1: make_boxes([((0, 0, 10, 10), 1, False)]), 2: make_boxes([((0, 0, 10, 10), 1, False)])}
    found = {1: detections([((0, 0, 10, 10), 1, 0.5)])}
    metrics = evaluate([1], truths, found, NAMES, "val")
    assert metrics.map == pytest.approx(1)
    assert metrics.per_class[0].instances == 1
    assert metrics.on == "val"


@pytest.mark.parametrize("truths", [{}, {1: make_boxes([])}, {1: make_boxes([((0, 0, 9, 9), 1, True)])}])
def test_without_any_labelled_object_there_is_nothing_to_measure(truths: dict[int, Boxes]) -> None:
    with pytest.raises(DataError, match="no image has a labelled object"):
        evaluate([1], truths, {1: detections([((0, 0, 9, 9), 1, 0.5)])}, NAMES, "test")


def test_of_too_many_classes_those_with_most_objects_are_listed() -> None:
    """Every class counts in the mean all the same."""
    classes = MAX_CLASSES_LISTED + 50
    truths = {1: make_boxes([((12 * c, 0, 10, 10), c + 1, False) for c in range(40, classes)])}
    found = {1: detections([((12 * c, 0, 10, 10), c + 1, 0.5) for c in range(40, classes, 2)])}
    metrics = measured(truths, found, [f"c{c}" for c in range(classes)])
    assert len(metrics.per_class) == MAX_CLASSES_LISTED
    assert [row.class_id for row in metrics.per_class][:2] == [41, 42]
    assert metrics.map == pytest.approx(0.5)


def test_nothing_is_printed_or_logged(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    truths, found = random_data(5, 3, 5)
    measured(truths, found)
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""
