"""The worst images are those with most objects missed and most detections false."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import detections, matches, random_data

from handlers.detection.boxes import make_boxes
from handlers.detection.coco import CocoEvaluation, collect
from handlers.detection.evaluate import evaluate
from handlers.detection.mistakes import worst_images
from schemas.result import MAX_WORST

A, B, C = (0, 0, 10, 10), (50, 0, 10, 10), (90, 90, 9, 9)


def test_by_hand() -> None:
    """Most mistakes first, of equals the first image; images without any are not named.

    The best threshold is 0.5: of class 1 then 2 of 3 detections are right and 2 of 4 objects found.
    """
    truths = {
        1: make_boxes([(A, 1, False)]),  # Found.
        2: make_boxes([(A, 1, False), ((100, 0, 100, 100), 1, True)]),  # Missed; the crowd is not.
        3: make_boxes([(A, 1, False)]),  # Found, and another that is not there.
        4: make_boxes([(A, 1, False)]),  # Taken for class 2: missed and false.
        5: make_boxes([]),  # What is there is below the threshold.
    }
    found = {
        1: detections([(A, 1, 0.9)]),
        2: detections([((110, 10, 20, 20), 1, 0.9)]),
        3: detections([(A, 1, 0.5), (C, 1, 0.6)]),
        4: detections([(A, 2, 0.9)]),
        5: detections([(A, 1, 0.1), (B, 1, 0.2)]),
    }
    metrics = evaluate(list(truths), truths, found, ("a", "b"), "test", {i: f"image {i}" for i in truths}).metrics
    assert metrics.threshold == pytest.approx(0.35)
    assert metrics.worst is not None
    assert [(one.img_id, one.missed, one.false) for one in metrics.worst] == [
        ("image 4", 1, 1),
        ("image 2", 1, 0),
        ("image 3", 0, 1),
    ]
    assert [one["false"] for one in metrics.model_dump(mode="json")["worst"]] == [1, 0, 1]


def test_without_mistakes_there_are_none() -> None:
    truths, found = {1: make_boxes([(A, 1, False)])}, {1: detections([(A, 1, 0.9), (B, 1, 0.1)])}
    assert evaluate([1], truths, found, ("a",), "test", {1: "a"}).metrics.worst == ()


def test_they_are_bounded() -> None:
    truths = {i: make_boxes([(A, 1, False)]) for i in range(1, 50)}
    worst = evaluate(list(truths), truths, {}, ("a",), "test", {i: str(i) for i in truths}).metrics.worst
    assert worst is not None
    assert [one.img_id for one in worst] == [str(i) for i in range(1, MAX_WORST + 1)]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 8), most=st.integers(1, 15))
def test_as_counted_in_each_image(seed: int, images: int, most: int) -> None:
    truths, found = random_data(seed, images, most, difficult=0.15)
    measured = collect(list(truths), truths, found, 3)
    worst = worst_images(measured, CocoEvaluation(measured).match(same_class=True), 0.5, 1000)
    rows = matches(truths, found, same_class=True, threshold=0.5)
    false = Counter(image_id for image_id, _, truth in rows if truth is None)
    taken = Counter(i for i, _, truth in rows if truth is not None and truths[i].counted[truth])
    missed = {i: int(boxes.counted.sum()) - taken[i] for i, boxes in truths.items()}
    assert {one.image_id: (one.missed_count, one.false_count) for one in worst} == {
        i: (missed[i], false[i]) for i in truths if missed[i] + false[i]
    }
    for one in worst:
        assert len(one.truths) == len(truths[one.image_id])
        assert (one.detections.scores >= 0.5).all()
    counts = [one.missed_count + one.false_count for one in worst]
    assert counts == sorted(counts, reverse=True)
