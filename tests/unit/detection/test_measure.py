"""What is found in validation images is in pixels of the image as labelled, however small its copy in memory."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from handlers.detection.batches import ImageStore
from handlers.detection.boxes import Boxes, Detections, Image, make_boxes
from handlers.detection.data import Sample
from handlers.detection.measure import find
from handlers.detection.report import draw_samples, measure_and_draw

INPUT = 32


def half(images: Sequence[Image]) -> list[Detections]:
    """Finds the left half of every image."""
    found = []
    for image in images:
        box = np.array([[0, 0, image.shape[1] / 2, image.shape[0]]], np.float32)
        found.append(Detections(box, np.array([1]), np.array([0.9], np.float32)))
    return found


def sample(folder: Path, number: int, width: int, height: int, *, recorded: bool = True) -> Sample:
    """An image of which the left half is labelled."""
    path = folder / f"{number}.png"
    cv2.imwrite(str(path), np.full((height, width, 3), 90, np.uint8))
    boxes = make_boxes([((0, 0, width / 2, height), 1, False)])
    size = (width, height) if recorded else (0, 0)
    return Sample(number, f"{number:024x}", "val", path, *size, boxes)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(("width", "height"), [(20, 10), (64, 64), (400, 300), (77, 1001)])
def test_boxes_are_as_large_as_labelled(tmp_path: Path, width: int, height: int, recorded: bool) -> None:
    """The store keeps no more than twice the network's input; the recorded size may be unknown."""
    one = sample(tmp_path, 1, width, height, recorded=recorded)
    with ThreadPoolExecutor(1) as pool:
        found = find([one], ImageStore(INPUT, 1 << 20), pool, half)
    assert found.truths[1].xyxy.tolist() == [[0, 0, width / 2, height]]
    assert found.detections[1].xyxy == pytest.approx(np.array([[0, 0, width / 2, height]]), rel=1e-6)


def test_sizes_are_those_of_the_labels(tmp_path: Path) -> None:
    """A large object in an image that is shrunk to 64 pixels for the network is large."""
    one = sample(tmp_path, 1, 400, 300)
    with ThreadPoolExecutor(1) as pool:
        found = find([one], ImageStore(INPUT, 1 << 20), pool, half)
    metrics = measure_and_draw([one], found.truths, found.detections, ["left"], "val", tmp_path).metrics
    assert metrics.size is not None
    assert metrics.size.model_dump() == {"small": None, "medium": None, "large": pytest.approx(1)}


def test_an_image_that_is_gone_is_in_the_numbers_and_not_in_the_pictures(tmp_path: Path) -> None:
    """Its file was there when it was measured."""
    samples = [sample(tmp_path, number, 60, 60) for number in (1, 2)]
    truths: dict[int, Boxes] = {one.id: one.boxes for one in samples}
    nothing = dict.fromkeys(truths, Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, "f4")))
    pictures = []
    for _ in range(2):
        measurement = measure_and_draw(samples, truths, nothing, ["left"], "val", tmp_path)
        assert measurement.metrics.worst is not None
        assert [one.missed for one in measurement.metrics.worst] == [1, 1]
        assert measurement.thresholds == (None,)
        reports = measurement.pictures | draw_samples(samples, truths, nothing, ["left"], tmp_path)
        of_measurement = {"confusion.png", "precision_recall.png", "worst.png", "suspicious.png", "calibration.png"}
        assert set(reports) == of_measurement | {"samples.png"}
        drawn = [cv2.imread(str(reports[name])) for name in ("worst.png", "samples.png")]
        pictures.append([int((picture == 90).all(axis=2).sum()) for picture in drawn])
        (tmp_path / "1.png").unlink(missing_ok=True)
    # Half as much of the grey of the images is on the sheets.
    assert np.array(pictures[1]) == pytest.approx(np.array(pictures[0]) / 2, rel=0.05)
