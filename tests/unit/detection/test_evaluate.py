"""Average precision is COCO's: equal to pycocotools on random and on odd data."""

import contextlib
import io
import json
import logging
from collections.abc import Sequence

import bson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import NOTHING, detections, random_data
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from handlers.detection import coco
from handlers.detection.boxes import Boxes, Detections, make_boxes
from handlers.detection.coco import xywh
from handlers.detection.errors import DataError
from handlers.detection.evaluate import average_precision, evaluate
from schemas.result import MAX_CLASSES_LISTED, MAX_CLASSES_WITH_CURVE, Metrics

NAMES = ("scratch", "pit", "stain")


def peer_evaluation(truths: dict[int, Boxes], found: dict[int, Detections], classes: int) -> COCOeval:
    """The evaluation by pycocotools, as it is summed up there."""
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
    return evaluation


def peer(truths: dict[int, Boxes], found: dict[int, Detections], classes: int) -> tuple[list[float], list[list[float]]]:
    """(mAP, mAP@.5, mAP@.75, mAP of small, medium and large; mAP and mAP@.5 of each class); -1 is none."""
    evaluation = peer_evaluation(truths, found, classes)
    # [threshold, recall, class, area, detections at most]
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    per_class = []
    for index in range(classes):
        of_class = precision[:, :, index]
        per_class.append([float(of_class.mean()), float(of_class[0].mean())])
    return [float(value) for value in evaluation.stats[:6]], per_class


def peer_curves(truths: dict[int, Boxes], found: dict[int, Detections]) -> list[list[float]]:
    """Precision at IoU 0.5 at recall 0, 0.01, … 1, of each class."""
    curves: list[list[float]] = peer_evaluation(truths, found, 3).eval["precision"][0, :, :, 0, 2].T.tolist()
    return curves


def assert_equal(metrics: Metrics, truths: dict[int, Boxes], found: dict[int, Detections]) -> None:
    overall, per_class = peer(truths, found, len(metrics.per_class))
    assert [metrics.map, metrics.map_50, metrics.map_75] == pytest.approx(overall[:3], abs=1e-6)
    for row, (ap, ap_50) in zip(metrics.per_class, per_class, strict=True):
        if ap == -1:
            assert row.map is None
            assert row.map_50 is None
        else:
            assert row.map == pytest.approx(ap, abs=1e-6)
            assert row.map_50 == pytest.approx(ap_50, abs=1e-6)


def measured(truths: dict[int, Boxes], found: dict[int, Detections], names: Sequence[str] = NAMES) -> Metrics:
    metrics = evaluate(list(truths), truths, found, names, "test", {i: f"{i:024x}" for i in truths}).metrics
    assert average_precision(list(truths), truths, found, len(names)) == {
        "map": metrics.map,
        "map_50": metrics.map_50,
        "map_75": metrics.map_75,
    }
    return metrics


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
    metrics = evaluate([1], truths, found, NAMES, "val", {1: "a"}).metrics
    assert metrics.map == pytest.approx(1)
    assert metrics.per_class[0].instances == 1
    assert metrics.on == "val"


@pytest.mark.parametrize(
    "truths",
    [
        {},
        {1: make_boxes([])},
        {1: make_boxes([((0, 0, 9, 9), 1, True)])},
        {1: make_boxes([((0, 0, 9, 9), 1, False)], difficult=[True])},
    ],
)
def test_without_any_labelled_object_there_is_nothing_to_measure(truths: dict[int, Boxes]) -> None:
    with pytest.raises(DataError, match="no image has a labelled object"):
        evaluate([1], truths, {1: detections([((0, 0, 9, 9), 1, 0.5)])}, NAMES, "test", {1: "a"})


def test_of_too_many_classes_those_with_most_objects_are_listed() -> None:
    """Every class counts in the mean all the same."""
    classes = MAX_CLASSES_LISTED + 50
    truths = {1: make_boxes([((12 * c, 0, 10, 10), c + 1, False) for c in range(40, classes)])}
    found = {1: detections([((12 * c, 0, 10, 10), c + 1, 0.5) for c in range(40, classes, 2)])}
    metrics = measured(truths, found, [f"c{c}" for c in range(classes)])
    assert len(metrics.per_class) == MAX_CLASSES_LISTED
    assert [row.class_id for row in metrics.per_class][:2] == [41, 42]
    assert metrics.map == pytest.approx(0.5)


def test_by_size_as_pycocotools_has_it() -> None:
    """At areas of 32² and 96² square pixels; null where no object is so large."""
    truths, found = random_data(3, 12, 20)
    overall, _ = peer(truths, found, 3)
    size = measured(truths, found).size
    assert size is not None
    assert [size.small, size.medium, size.large] == pytest.approx(overall[3:6], abs=1e-6)
    only_small = {1: make_boxes([((0, 0, 20, 20), 1, False)])}
    size = measured(only_small, {1: detections([((0, 0, 20, 20), 1, 0.5)])}).size
    assert size is not None
    assert size.model_dump() == {"small": pytest.approx(1), "medium": None, "large": None}


def test_precision_at_recall_is_a_fifth_of_pycocotools() -> None:
    truths, found = random_data(4, 12, 20)
    rows = measured(truths, found).per_class
    for row, expected in zip(rows, peer_curves(truths, found), strict=True):
        assert row.precision_at_recall == pytest.approx(expected[::5], abs=1e-6)


def test_by_hand_precision_at_recall() -> None:
    """Two of four objects: up to recall 0.25 without a mistake, up to 0.5 with one of three, none beyond."""
    truths = {1: make_boxes([((20 * i, 0, 10, 10), 1, False) for i in range(4)])}
    found = {1: detections([((0, 0, 10, 10), 1, 0.9), ((0, 50, 9, 9), 1, 0.8), ((20, 0, 10, 10), 1, 0.7)])}
    assert measured(truths, found).per_class[0].precision_at_recall == pytest.approx([1] * 6 + [2 / 3] * 5 + [0] * 10)


def test_classes_by_parts_are_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many are evaluated at once that memory suffices, be there thousands of classes and of images."""
    truths, found = random_data(6, 12, 20)
    once = measured(truths, found)
    monkeypatch.setattr(coco, "_MAX_PAIRS", 1)
    assert measured(truths, found) == once


def test_a_class_that_is_nowhere_may_be_alone_in_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "_MAX_PAIRS", 1)
    metrics = measured({1: make_boxes([((0, 0, 9, 9), 2, False)])}, {1: NOTHING})
    assert [row.map for row in metrics.per_class] == [None, 0, None]


@pytest.mark.parametrize("classes", [1, 50, 100, 2500])
def test_the_numbers_stay_small(classes: int) -> None:
    """With names of 200 characters of four bytes each, as many as an image list allows: they are part of a document."""
    names = [f"{c:04d}" + "\U0001f52c" * 196 for c in range(classes)]
    truths = {i: make_boxes([((0, 0, 10, 10), c, False)]) for i, c in enumerate(range(1, classes + 1), 1)}
    found = {i: detections([((0, 0, 10, 10), c % classes + 1, 0.1 + c / 10_000)]) for i, c in enumerate(truths, 1)}
    document = measured(truths, found, names).model_dump(mode="json")
    assert len(bson.encode(document)) < 500_000
    assert ("precision_at_recall" in document["per_class"][0]) == (classes <= MAX_CLASSES_WITH_CURVE)
    assert len(document["per_class"]) >= min(classes, 300)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 6), most=st.integers(0, 12))
def test_every_number_is_finite_and_survives_json(seed: int, images: int, most: int) -> None:
    truths, found = random_data(seed, images, most)
    truths[1000] = make_boxes([((10, 10, 50, 50), 1, False)])
    metrics = measured(truths, found)
    assert Metrics.model_validate_json(metrics.model_dump_json()) == metrics
    json.dumps(metrics.model_dump(mode="json"), allow_nan=False)


def test_what_is_unknown_is_absent() -> None:
    """A class without labelled objects has null average precision, as before, and nothing else."""
    truths = {1: make_boxes([((0, 0, 10, 10), 1, False)])}
    document = measured(truths, {1: detections([((50, 50, 10, 10), 1, 0.5)])}).model_dump(mode="json")
    first, second, _ = document["per_class"]
    assert {key: first[key] for key in ("precision", "recall", "f1")} == {"precision": 0, "recall": 0, "f1": 0}
    assert "threshold" not in first
    assert second == {
        "class_id": 2,
        "class_name": "pit",
        "map": None,
        "map_50": None,
        "instances": 0,
        "detections": 0,
    }


def test_metrics_of_an_older_release_are_read() -> None:
    old = {"map": 0.5, "map_50": 0.5, "map_75": 0.5, "on": "val"}
    row = {"class_id": 1, "class_name": "a", "map": 0.5, "map_50": 0.5, "instances": 1, "detections": 1}
    metrics = Metrics.model_validate(old | {"per_class": [row]})
    assert (metrics.confusion, metrics.per_class[0].f1) == (None, None)
    assert metrics.model_dump(mode="json") == old | {
        "per_class": [row],
        "classes_not_in_model": [],
        "classes_not_in_data": [],
    }


def test_nothing_is_printed_or_logged(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    truths, found = random_data(5, 3, 5)
    measured(truths, found)
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""
