"""Which class was taken for which: small cases by hand, and sums that hold whatever the data."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import detections, matches, random_data

from handlers.detection.boxes import make_boxes
from handlers.detection.coco import CocoEvaluation, collect
from handlers.detection.confusion import confusion
from handlers.detection.evaluate import evaluate
from schemas.result import MAX_CLASSES_IN_CONFUSION

A, B = (0, 0, 10, 10), (50, 0, 10, 10)
Rows = Sequence[tuple[tuple[float, float, float, float], int, float]]


def table(truths: Sequence[tuple[tuple[float, float, float, float], int, bool]], found: Rows) -> list[list[int]]:
    """Rows and columns: class 1, class 2, background; at a score of 0.5."""
    boxes, one = {1: make_boxes(list(truths))}, {1: detections(found)}
    measured = collect([1], boxes, one, 2)
    taken = CocoEvaluation(measured).match(same_class=False)
    rows: list[list[int]] = confusion(measured, taken, 0.5).table([1, 2]).tolist()
    return rows


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param([(A, 1, 0.9), (B, 2, 0.8)], [[1, 0, 0], [0, 1, 0], [0, 0, 0]], id="perfect"),
        pytest.param([], [[0, 0, 1], [0, 0, 1], [0, 0, 0]], id="all missed"),
        pytest.param([(A, 1, 0.49)], [[0, 0, 1], [0, 0, 1], [0, 0, 0]], id="below the threshold"),
        pytest.param([(A, 1, 0.5)], [[1, 0, 0], [0, 0, 1], [0, 0, 0]], id="at the threshold"),
        pytest.param([(A, 1, 0.9), (A, 1, 0.8)], [[1, 0, 0], [0, 0, 1], [1, 0, 0]], id="a duplicate"),
        pytest.param([(A, 2, 0.9)], [[0, 1, 0], [0, 0, 1], [0, 0, 0]], id="the wrong class"),
        pytest.param([(A, 2, 0.9), (A, 1, 0.8)], [[0, 1, 0], [0, 0, 1], [1, 0, 0]], id="the better score takes it"),
        pytest.param([((90, 90, 9, 9), 2, 0.9)], [[0, 0, 1], [0, 0, 1], [0, 1, 0]], id="nothing there"),
        pytest.param([((0, 0, 10, 4.9), 1, 0.9)], [[0, 0, 1], [0, 0, 1], [1, 0, 0]], id="too little overlap"),
    ],
)
def test_by_hand(found: Rows, expected: list[list[int]]) -> None:
    assert table([(A, 1, False), (B, 2, False)], found) == expected


def test_a_crowd_is_no_object_and_what_finds_it_counts_nowhere() -> None:
    """Neither does a detection of another class in it: regardless of classes is regardless of the crowd's too."""
    inside: Rows = [((100, 10, 15, 15), 1, 0.9), ((120, 10, 15, 15), 1, 0.8), ((140, 10, 15, 15), 2, 0.7)]
    assert table([((100, 0, 100, 100), 1, True)], inside) == [[0] * 3] * 3
    # An object in the crowd is taken before the crowd.
    in_it = [((100, 0, 100, 100), 1, True), ((100, 10, 15, 15), 2, False)]
    assert table(in_it, inside) == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 8), most=st.integers(1, 15), threshold=st.integers(0, 100))
def test_rows_are_the_objects_and_columns_the_detections(seed: int, images: int, most: int, threshold: int) -> None:
    truths, found = random_data(seed, images, most, difficult=0.15)
    score = np.float32(threshold / 100)
    measured = collect(list(truths), truths, found, 3)
    counts = confusion(measured, CocoEvaluation(measured).match(same_class=False), float(score)).table([1, 2, 3])
    rows = matches(truths, found, same_class=False, threshold=float(score))
    kept = [
        (image_id, index, truth) for image_id, index, truth in rows if truth is None or truths[image_id].counted[truth]
    ]
    for class_id in (1, 2, 3):
        objects = sum(int(((boxes.class_ids == class_id) & boxes.counted).sum()) for boxes in truths.values())
        detected = sum(int(found[image_id].class_ids[index]) == class_id for image_id, index, _ in kept)
        assert counts[class_id - 1].sum() == objects
        assert counts[:, class_id - 1].sum() == detected
    assert counts[3, 3] == 0
    pairs = Counter(
        (0 if truth is None else int(truths[image_id].class_ids[truth]), int(found[image_id].class_ids[index]))
        for image_id, index, truth in kept
    )
    assert {pair: counts[pair[0] - 1, pair[1] - 1] for pair in pairs} == pairs


def test_the_result_names_rows_and_columns() -> None:
    truths = {1: make_boxes([(A, 1, False), (B, 2, False)])}
    found = {1: detections([(A, 1, 0.75), (B, 1, 0.5)])}
    metrics = evaluate([1], truths, found, ("scratch", "pit"), "test", {1: "a"}).metrics
    assert metrics.confusion is not None
    assert metrics.model_dump(mode="json")["confusion"] == {
        "iou": 0.5,
        "threshold": 0.625,
        "labels": ["scratch", "pit", "background"],
        "counts": [[1, 0, 0], [0, 0, 1], [0, 0, 0]],
    }


@pytest.mark.parametrize("classes", [MAX_CLASSES_IN_CONFUSION, MAX_CLASSES_IN_CONFUSION + 1])
def test_with_too_many_classes_the_result_has_none(classes: int) -> None:
    truths, found = {1: make_boxes([(A, 1, False)])}, {1: detections([(A, classes, 0.75)])}
    metrics = evaluate([1], truths, found, [f"c{c}" for c in range(classes)], "test", {1: "a"}).metrics
    document = metrics.model_dump(mode="json")
    assert ("confusion" in document) == (classes == MAX_CLASSES_IN_CONFUSION)
