"""Precision, recall and F1 at the best score: small cases by hand, random ones against a plain count."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import NOTHING, detections, matches, random_data

from handlers.detection.boxes import Boxes, Detections, make_boxes
from handlers.detection.coco import ALL_SIZES, CocoEvaluation, collect
from handlers.detection.evaluate import evaluate
from handlers.detection.scores import DEFAULT_THRESHOLD, Best, best_for_all, class_scores

A, B = (0, 0, 10, 10), (50, 0, 10, 10)
NAMES = ("scratch", "pit", "stain")


def best(truths: dict[int, Boxes], found: dict[int, Detections]) -> Best:
    """Of class 1."""
    measured = collect(list(truths), truths, found, 3)
    return class_scores(measured, CocoEvaluation(measured).match(same_class=True))[0].best()


ONE = {1: make_boxes([(A, 1, False)])}
TWO = {1: make_boxes([(A, 1, False), (B, 1, False)])}


@pytest.mark.parametrize(
    ("truths", "found", "expected"),
    [
        pytest.param(TWO, [(A, 1, 0.75), (B, 1, 0.5)], Best(0.25, 1, 1, 1), id="perfect"),
        pytest.param(TWO, [(A, 1, 0.75)], Best(0.375, 1, 0.5, pytest.approx(2 / 3)), id="one missed"),
        pytest.param(TWO, [], Best(None, 0, 0, 0), id="all missed"),
        pytest.param(ONE, [(B, 1, 0.75)], Best(None, 0, 0, 0), id="all false"),
        pytest.param(ONE, [(A, 1, 0.5), (A, 1, 0.75)], Best(0.625, 1, 1, 1), id="a duplicate is false"),
        pytest.param(ONE, [(A, 2, 0.75)], Best(None, 0, 0, 0), id="the wrong class finds nothing"),
        pytest.param(ONE, [(A, 2, 0.75), (A, 1, 0.5)], Best(0.25, 1, 1, 1), id="nor does it take the object"),
        # Cut after the first: 1, 1/2, F1 2/3. After the third: 2/3, 1, F1 4/5.
        pytest.param(
            TWO,
            [(A, 1, 0.75), ((90, 90, 9, 9), 1, 0.5), (B, 1, 0.25)],
            Best(0.125, pytest.approx(2 / 3), 1, pytest.approx(0.8)),
            id="a false one in between",
        ),
        pytest.param(ONE, [(B, 1, 0.5), (A, 1, 0.5)], Best(0.25, 0.5, 1, pytest.approx(2 / 3)), id="equal scores"),
        # Both cuts have F1 2/3: 1 of 1 with 1 of 2 found; 2 of 4 with 2 of 2.
        pytest.param(
            TWO,
            [(A, 1, 0.75), ((90, 90, 9, 9), 1, 0.5), ((90, 0, 9, 9), 1, 0.4), (B, 1, 0.25)],
            Best(0.625, 1, 0.5, pytest.approx(2 / 3)),
            id="of equals the highest",
        ),
    ],
)
def test_by_hand(truths: dict[int, Boxes], found: list[tuple[tuple[float, ...], int, float]], expected: Best) -> None:
    assert best(truths, {1: detections(found)}) == expected  # type: ignore[arg-type]


def test_what_is_found_in_a_crowd_is_neither_right_nor_false() -> None:
    truths = {1: make_boxes([(A, 1, False), ((100, 0, 100, 100), 1, True)])}
    inside = [((100 + 20 * i, 10, 15, 15), 1, 0.75) for i in range(4)]
    assert best(truths, {1: detections([(A, 1, 0.5), *inside])}) == Best(0.25, 1, 1, 1)
    only_crowd = {1: make_boxes([((100, 0, 100, 100), 1, True)])}
    assert best(only_crowd, {1: detections(inside)}) == Best(None, 0, 0, 0)


def test_a_difficult_object_is_neither_missed_nor_are_its_detections_false() -> None:
    """However many they are; but it is as large as it is: what lies in it without covering half of it is false."""
    truths = {1: make_boxes([(A, 1, False), (B, 1, False)], difficult=[False, True])}
    right = (A, 1, 0.5)
    assert best(truths, {1: detections([right])}) == Best(0.25, 1, 1, 1)
    assert best(truths, {1: detections([(B, 1, 0.9), (B, 1, 0.8), right])}) == Best(0.25, 1, 1, 1)
    inside = ((50, 0, 10, 4.9), 1, 0.9)
    assert best(truths, {1: detections([inside, right])}) == Best(0.25, 0.5, 1, pytest.approx(2 / 3))
    metrics = evaluate([1], truths, {1: detections([(B, 1, 0.9), right])}, NAMES, "test", {1: "a"}).metrics
    assert (metrics.map, metrics.per_class[0].instances, metrics.worst) == (pytest.approx(1), 1, ())
    assert metrics.confusion is not None
    assert metrics.confusion.counts[0] == (1, 0, 0, 0)
    assert sum(map(sum, metrics.confusion.counts)) == 1


def test_one_threshold_for_all_by_hand() -> None:
    """Class 1 is best above 0.6 (F1 1, then 2/3), class 2 up to 0.5; there the mean is (2/3 + 1) / 2.

    Class 3 has no labelled object and does not count, whatever is detected of it.
    """
    truths = {1: make_boxes([(A, 1, False), (B, 2, False)])}
    found = {1: detections([(A, 1, 0.75), ((90, 90, 9, 9), 1, 0.6), (B, 2, 0.5), (A, 3, 0.9)])}
    metrics = evaluate([1], truths, found, NAMES, "test", {1: "a"}).metrics
    assert (metrics.threshold, metrics.f1) == (0.25, pytest.approx(5 / 6))
    assert [row.threshold for row in metrics.per_class] == [pytest.approx(0.675), 0.25, None]
    assert [row.f1 for row in metrics.per_class] == [1, 1, None]


@pytest.mark.parametrize("found", [NOTHING, detections([(B, 1, 0.9)])])
def test_without_anything_right_the_threshold_is_a_default(found: Detections) -> None:
    metrics = evaluate([1], ONE, {1: found}, NAMES, "test", {1: "a"}).metrics
    assert (metrics.threshold, metrics.f1) == (DEFAULT_THRESHOLD, 0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 6), most=st.integers(1, 12))
def test_as_counted_at_every_score(seed: int, images: int, most: int) -> None:
    truths, found = random_data(seed, images, most, difficult=0.15)
    measured = collect(list(truths), truths, found, 3)
    classes = class_scores(measured, CocoEvaluation(measured).match(same_class=True))
    instances = [sum(int(((b.class_ids == c) & b.counted).sum()) for b in truths.values()) for c in (1, 2, 3)]
    assert [one.instances for one in classes] == instances
    scores = np.unique(np.concatenate([one.scores for one in found.values()]))[::-1].tolist()
    f1 = np.zeros((3, len(scores)))

    def counted(threshold: float) -> int:
        """The place of the last score that counts."""
        return sum(score >= threshold for score in scores) - 1

    for at, score in enumerate(scores):
        rows = matches(truths, found, same_class=True, threshold=score)
        for class_id in (1, 2, 3):
            of_class = [
                truth
                for image_id, index, truth in rows
                if found[image_id].class_ids[index] == class_id and (truth is None or truths[image_id].counted[truth])
            ]
            right = sum(truth is not None for truth in of_class)
            f1[class_id - 1, at] = 2 * right / max(len(of_class) + instances[class_id - 1], 1)
    for class_id, one in enumerate(classes, 1):
        expected = f1[class_id - 1] if instances[class_id - 1] else np.zeros(1)
        found_best = one.best()
        assert found_best.f1 == pytest.approx(expected.max(initial=0))
        if found_best.threshold is not None:
            assert expected[counted(found_best.threshold)] == pytest.approx(expected.max())
            assert one.f1_at(np.array(scores)) == pytest.approx(f1[class_id - 1])
    known = [row for row, count in zip(f1, instances, strict=True) if count]
    threshold, mean = best_for_all(classes)
    if known and np.max(known, initial=0) > 0:
        means = np.mean(known, axis=0)
        assert mean == pytest.approx(means.max())
        assert means[counted(threshold)] == pytest.approx(means.max())
    else:
        assert (threshold, mean) == (DEFAULT_THRESHOLD, 0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 8), most=st.integers(1, 15))
def test_the_library_has_the_same_precision_from_them(seed: int, images: int, most: int) -> None:
    """What is right and what is false by the scores gives the average precision at IoU 0.5, to the last recall."""
    truths, found = random_data(seed, images, most, difficult=0.15)
    measured = collect(list(truths), truths, found, 3)
    coco = CocoEvaluation(measured)
    expected = coco.precision([ALL_SIZES])[0, :, :, 0]
    for index, one in enumerate(class_scores(measured, coco.match(same_class=True))):
        if not one.instances:
            assert (expected[:, index] == -1).all()
            continue
        right = np.cumsum(one.right)
        precision, recall = right / np.arange(1, len(right) + 1), right / one.instances
        interpolated = [max(precision[recall >= wanted], default=0.0) for wanted in np.linspace(0, 1, 101)]
        assert interpolated == pytest.approx(expected[:, index])
