"""Errors that are put into good labels are found, and good labels are left alone."""

import time

import numpy as np
import pytest
from made_up import detections, random_data

from handlers.detection.boxes import Boxes, Detections, make_boxes
from handlers.detection.coco import CocoEvaluation, collect
from handlers.detection.evaluate import evaluate
from handlers.detection.scores import class_scores
from handlers.detection.suspicious import Suspects, suspicious_labels
from schemas.result import MAX_SUSPICIOUS

A, B, C, D = (0, 0, 100, 100), (200, 0, 100, 100), (0, 200, 100, 100), (200, 200, 100, 100)
#: What a good detector sees in each of twenty images, in which all four are labelled.
SEEN = [(A, 1, 0.9), (B, 1, 0.9), (C, 2, 0.9), (D, 2, 0.9)]
LABELS = [(box, class_id, False) for box, class_id, _ in SEEN]


def found(truths: dict[int, Boxes], seen: dict[int, Detections], most: int = MAX_SUSPICIOUS) -> Suspects:
    measured = collect(list(truths), truths, seen, 2)
    scores = class_scores(measured, CocoEvaluation(measured).match(same_class=True))
    return suspicious_labels(measured, scores, most)


def with_one(
    labels: list[tuple[tuple[float, ...], int, bool]], seen: list[tuple[tuple[float, ...], int, float]]
) -> Suspects:
    """Of twenty good images, and one (number 99) with these."""
    truths = dict.fromkeys(range(1, 21), make_boxes(LABELS)) | {99: make_boxes(labels)}  # type: ignore[arg-type]
    return found(truths, dict.fromkeys(range(1, 21), detections(SEEN)) | {99: detections(seen)})  # type: ignore[arg-type]


def told(suspects: Suspects) -> list[tuple[int, str, int, int | None]]:
    return [(one.image_id, one.kind, one.class_id, one.detected_as) for one in suspects.worst]


def test_good_labels_are_left_alone() -> None:
    assert with_one(LABELS, SEEN) == Suspects(with_one(LABELS, SEEN).counts, [])
    assert not with_one(LABELS, SEEN).counts


def test_an_object_without_a_label() -> None:
    """The box is the detection's; of several detections in its place the best is told, once."""
    suspects = with_one(LABELS[:3], [*SEEN, ((205, 200, 100, 100), 1, 0.95)])
    assert told(suspects) == [(99, "unlabelled", 1, None)]
    assert suspects.worst[0].xyxy.tolist() == [205, 200, 305, 300]
    assert (suspects.worst[0].score, suspects.worst[0].iou) == (pytest.approx(0.95), None)


def test_a_wrong_class() -> None:
    """The box is the label's."""
    suspects = with_one([*LABELS[:3], ((210, 200, 100, 100), 1, False)], SEEN)
    assert told(suspects) == [(99, "wrong_class", 1, 2)]
    assert suspects.worst[0].xyxy.tolist() == [210, 200, 310, 300]
    assert suspects.worst[0].iou == pytest.approx(9 / 11)


def test_a_poor_box() -> None:
    suspects = with_one([*LABELS[:3], ((240, 200, 100, 100), 2, False)], SEEN)
    assert told(suspects) == [(99, "poor_box", 2, None)]
    assert suspects.worst[0].iou == pytest.approx(6 / 14)


def test_a_label_without_an_object() -> None:
    """Not even at the lowest score is anything found there."""
    label = ((500, 500, 50, 50), 1, False)
    assert told(with_one([*LABELS, label], SEEN)) == [(99, "no_object", 1, None)]
    assert told(with_one([*LABELS, label], [*SEEN, ((500, 500, 50, 50), 2, 0.01)])) == []


def test_a_label_twice() -> None:
    """The later one is told; two objects that overlap less are two."""
    assert told(with_one([*LABELS, ((1, 0, 100, 100), 1, False)], SEEN)) == [(99, "duplicate", 1, None)]
    assert told(with_one([*LABELS, ((20, 0, 100, 100), 1, False)], SEEN)) == []
    # Another class in the same place is no duplicate.
    assert "duplicate" not in with_one([*LABELS, ((1, 0, 100, 100), 2, False)], SEEN).counts


def test_a_detector_that_is_not_sure_is_not_heard() -> None:
    """A detection below the mean score of the right ones says nothing, however far it is above the threshold."""
    assert told(with_one(LABELS[:3], [*SEEN[:3], (D, 2, 0.85)])) == []


def test_a_detector_that_does_not_know_a_class_is_not_heard() -> None:
    """Where more is wrong than right, its doubts are worth nothing."""
    wrong = detections([((500, 500, 9, 9), 1, 0.9), ((600, 600, 9, 9), 1, 0.9), ((700, 0, 9, 9), 1, 0.9), (A, 1, 0.9)])
    truths = {number: make_boxes(LABELS) for number in range(1, 21)}
    assert not found(truths, dict.fromkeys(truths, wrong)).counts


def test_crowds_and_difficult_objects_are_no_suspects() -> None:
    """Neither they, nor what is detected in them."""
    labels = make_boxes([*LABELS[:3], ((150, 150, 300, 300), 2, True)])
    truths = dict.fromkeys(range(1, 21), make_boxes(LABELS)) | {99: labels}
    seen = dict.fromkeys(truths, detections(SEEN))
    assert not found(truths, seen).counts
    truths[99] = make_boxes([*LABELS, ((500, 500, 50, 50), 1, False)], [False] * 4 + [True])
    assert not found(truths, seen).counts


def test_counts_are_whole_and_the_list_is_not() -> None:
    """The most suspicious first, over all images."""
    truths = {number: make_boxes(LABELS[:3]) for number in range(1, 101)}
    good = {number: make_boxes(LABELS) for number in range(101, 1001)}
    seen = {number: detections([*SEEN[:3], (D, 2, 0.9 + number / 10_000)]) for number in truths}
    suspects = found(truths | good, seen | dict.fromkeys(good, detections(SEEN)), most=5)
    assert suspects.counts["unlabelled"] > 50
    assert [one.image_id for one in suspects.worst] == [100, 99, 98, 97, 96]


def test_they_are_in_the_metrics() -> None:
    """With the ids and names that a reader knows, and without the fields that say nothing."""
    truths = dict.fromkeys(range(1, 21), make_boxes(LABELS)) | {99: make_boxes(LABELS[:3])}
    names, ids = ("scratch", "pit"), {number: f"{number:024x}" for number in truths}
    metrics = evaluate(list(truths), truths, dict.fromkeys(truths, detections(SEEN)), names, "test", ids).metrics
    assert metrics.model_dump(mode="json")["suspicious"] == {
        "counts": {"unlabelled": 1, "wrong_class": 0, "poor_box": 0, "no_object": 0, "duplicate": 0},
        "examples": [
            {
                "img_id": f"{99:024x}",
                "kind": "unlabelled",
                "class_name": "pit",
                "score": pytest.approx(0.9),
                "bbox": [200, 200, 100, 100],
            }
        ],
    }


@pytest.mark.parametrize("seed", range(5))
def test_any_data_can_be_looked_at(seed: int) -> None:
    """Crowds, difficult and overlapping objects, images without anything: each suspect has a box of its own."""
    truths, seen = random_data(seed, 30, 12, difficult=0.1)
    measured = collect(list(truths), truths, seen, 3)
    scores = class_scores(measured, CocoEvaluation(measured).match(same_class=True))
    suspects = suspicious_labels(measured, scores, 10_000)
    assert sum(suspects.counts.values()) == len(suspects.worst)
    assert all(0 <= one.suspicion <= 1 + 1e-6 for one in suspects.worst)
    places = [(one.image_id, one.kind == "unlabelled", one.class_id, *one.xyxy.tolist()) for one in suspects.worst]
    assert len(set(places)) == len(places)


def test_ten_thousand_labels_in_one_image() -> None:
    """They are compared with each other in parts."""
    rows = [((float(n % 60), float(n // 60 % 60), 3.0, 3.0), 1, False) for n in range(10_000)]
    begin = time.monotonic()
    suspects = found({1: make_boxes(rows)}, {1: detections([((0, 0, 3, 3), 1, 0.9)])})
    assert suspects.counts == {"duplicate": 6400}
    assert time.monotonic() - begin < 60
    assert np.isfinite([one.suspicion for one in suspects.worst]).all()
