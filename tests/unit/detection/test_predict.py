"""A registered ONNX model finds things in images of any size, and a test of it says what it found and how well."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import pytest
from toy_model import NAMES, SIDE, write_model

from handlers.detection import predict
from handlers.detection.boxes import Boxes, make_boxes
from handlers.detection.data import Sample
from handlers.detection.errors import DataError, StoppedEarly
from handlers.detection.export import add_facts
from handlers.detection.fingerprints import collected, fingerprint
from handlers.detection.job import Event, Job, Note, Progress, Started

# Under names that pytest does not take for test classes.
from handlers.detection.job import Tested as Outcome
from handlers.detection.job import TestedModel as RegisteredModel
from handlers.detection.onnx_detector import OnnxDetector
from handlers.detection.predict import run_test


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.onnx")


def picture(brightness: int, width: int, height: int) -> np.ndarray:
    return np.full((height, width, 3), brightness, np.uint8)


# --- the detector ----------------------------------------------------------------------------------------------------


def test_boxes_are_in_pixels_of_each_image(model: Path) -> None:
    """Images of different sizes in one batch; rows that fill up are dropped."""
    detector = OnnxDetector(model, NAMES, SIDE, "cpu")
    first, second = detector.detect([picture(255, 200, 100), picture(51, 64, 640)])
    assert first.xyxy.tolist() == [[0, 0, 100, 100], [100, 25, 200, 75]]
    assert second.xyxy.tolist() == [[0, 0, 32, 640], [32, 160, 64, 480]]
    assert first.class_ids.tolist() == [1, 2]
    assert first.scores == pytest.approx([1, 0.5])
    assert second.scores == pytest.approx([0.2, 0.1])
    assert (first.xyxy.dtype, first.class_ids.dtype, first.scores.dtype) == (np.float32, np.int64, np.float32)
    assert detector.device == "cpu"


def test_no_images_are_no_detections(model: Path) -> None:
    assert OnnxDetector(model, NAMES, SIDE, "cpu").detect([]) == []


def test_it_says_nothing(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """onnxruntime's own messages are about this machine, not about the task."""
    OnnxDetector(model, NAMES, SIDE, "cpu").detect([picture(9, 10, 10)])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not a model", bytes(range(256)) * 20])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(DataError, match=r"model\.onnx is not a model"):
        OnnxDetector(tmp_path / "model.onnx", NAMES, SIDE, "cpu")


def test_a_truncated_file_is_refused(model: Path) -> None:
    model.write_bytes(model.read_bytes()[:-200])
    with pytest.raises(DataError):
        OnnxDetector(model, NAMES, SIDE, "cpu")


def test_a_foreign_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gives .*'regions'.*expected .*'boxes'"):
        OnnxDetector(write_model(tmp_path / "model.onnx", output="regions"), NAMES, SIDE, "cpu")


def test_another_input_size_than_registered_is_refused(model: Path) -> None:
    with pytest.raises(DataError, match="takes images of 32 pixels; registered are 320"):
        OnnxDetector(model, NAMES, 320, "cpu")


def test_more_classes_than_registered_are_refused(tmp_path: Path) -> None:
    detector = OnnxDetector(write_model(tmp_path / "model.onnx", class_ids=(1, 3, 0)), NAMES, SIDE, "cpu")
    with pytest.raises(DataError, match="found class 3; registered are 2"):
        detector.detect([picture(100, 10, 10)])


def test_a_missing_gpu_is_an_error_and_not_the_cpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on machines that have GPUs: none has a 99th."""
    with pytest.raises(RuntimeError, match="cuda:99"):
        OnnxDetector(model, NAMES, SIDE, "cuda:99")


# --- a whole test ----------------------------------------------------------------------------------------------------

#: file name -> (brightness, width, height, [(class of the data from 1, x, y, w, h)])
IMAGES: dict[str, tuple[int, int, int, list[tuple[int, float, float, float, float]]]] = {
    "a.png": (250, 80, 40, [(1, 40, 10, 40, 20), (2, 0, 0, 40, 40)]),
    "b.png": (200, 60, 90, [(2, 0, 0, 30, 90)]),
    "c.png": (150, 50, 50, []),
    "d.png": (100, 40, 40, [(1, 20, 10, 20, 20), (3, 1, 1, 5, 5)]),
}
#: In another order than the model's, and with one that it does not know.
DATA_CLASSES = ("right", "left", "other")


def write_job(folder: Path, onnx_file: Path, **changes: Any) -> Job:
    """The files of a testing job over `IMAGES`, of which e.png cannot be read and f.png is not there."""
    classes = changes.pop("classes", DATA_CLASSES)
    labels = changes.pop("labels", True)
    usable = changes.pop("usable", True)
    images, instances, lines = [], [], []
    for number, name in enumerate([*IMAGES, "e.png", "f.png"], 1):
        brightness, width, height, boxes = IMAGES.get(name, (0, 10, 10, []))
        mongodb_id = f"{number:024x}"
        images.append(
            {
                "id": number,
                "file_name": name,
                "width": width,
                "height": height,
                "split": "test",
                "mongodb_id": mongodb_id,
            }
        )
        if name in IMAGES and usable:
            cv2.imwrite(str(folder / name), picture(brightness, width, height))
        else:
            (folder / name).write_bytes(b"no image")
        if name == "f.png":
            lines.append({"id": number, "reason": "gone from GridFS"})
        else:
            lines.append({"id": number, "path": str(folder / name)})
        for class_id, *bbox in boxes if labels else ():
            instances.append(
                {
                    "id": len(instances) + 1,
                    "image_id": number,
                    "class_id": class_id,
                    "bbox": bbox,
                    "area": bbox[2] * bbox[3],
                    "mongodb_id": f"{len(instances):024x}",
                }
            )
    message = {
        "dataset_info": {
            "task_id": "7",
            "task_type": "TEST",
            "created": "2026-01-01T00:00:00Z",
            "image_count": len(images),
            "instance_count": len(instances),
            "class_count": len(classes),
            "split": "val",
            "fingerprint": "0",
        },
        "image_info": images,
        "instance_info": instances,
        "class_info": [
            {"id": index, "name": name, "instance_count": sum(row["class_id"] == index for row in instances)}
            for index, name in enumerate(classes, 1)
        ],
    }
    (folder / "message.json").write_text(json.dumps(message))
    (folder / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "out").mkdir(exist_ok=True)
    job: dict[str, Any] = {
        "task_id": "7",
        "attempt": 1,
        "kind": "TEST",
        "params": {"batch_size": 3},
        "devices": ("cpu",),
        "message": folder / "message.json",
        "images": folder / "images.jsonl",
        "out": folder / "out",
        "model": RegisteredModel(onnx=onnx_file, class_names=NAMES, input_size=SIDE),
    }
    return Job(**(job | changes))


def never() -> bool:
    return False


def run(job: Job) -> tuple[Outcome, list[Event]]:
    events: list[Event] = []
    return run_test(job, events.append, never), events


def stored(result: Outcome) -> dict[int, list[dict[str, Any]]]:
    rows = [json.loads(line) for line in result.detections.read_text().splitlines()]
    return {row["image_id"]: row["detections"] for row in rows}


def test_every_usable_image_has_its_detections(tmp_path: Path, model: Path) -> None:
    """One line an image, best first, boxes as [x, y, width, height] in its pixels."""
    result, _ = run(write_job(tmp_path, model))
    rows = stored(result)
    assert list(rows) == [1, 2, 3, 4]
    assert rows[1] == [
        {"class_id": 1, "class_name": "left", "score": pytest.approx(250 / 255), "bbox": [0, 0, 40, 40]},
        {"class_id": 2, "class_name": "right", "score": pytest.approx(125 / 255), "bbox": [40, 10, 40, 20]},
    ]
    assert rows[2][1]["bbox"] == [30, 22.5, 30, 45]
    assert result.detection_count == 8
    assert result.device == "cpu"
    assert result.images_per_second > 0


def test_bad_images_are_left_out_with_the_reason(tmp_path: Path, model: Path) -> None:
    result, _ = run(write_job(tmp_path, model))
    assert (result.images.used, result.images.skipped) == (4, 2)
    reasons = {example.img_id: example.reason for example in result.images.skipped_examples}
    assert reasons[f"{6:024x}"] == "gone from GridFS"
    assert "not an image" in reasons[f"{5:024x}"]


def test_common_classes_are_scored_by_name_and_the_others_named(tmp_path: Path, model: Path) -> None:
    """Ids in the metrics are the model's. In image c, without labels, both detections are false."""
    result, events = run(write_job(tmp_path, model))
    metrics = result.metrics
    assert metrics is not None
    assert metrics.on == "val"
    left, right = metrics.per_class
    assert (left.class_id, left.class_name, left.instances, left.detections) == (1, "left", 2, 4)
    assert (right.class_id, right.class_name, right.instances, right.detections) == (2, "right", 2, 4)
    # The two labelled `left` are the two best found: every recall is reached without a mistake.
    assert left.map == pytest.approx(1)
    # `right`: the best is right, two mistakes follow, then the other: 51 recalls of 101 at 1, 50 at 1/2.
    assert right.map == pytest.approx((51 + 50 / 2) / 101)
    assert metrics.classes_not_in_model == ("other",)
    assert metrics.classes_not_in_data == ()
    # At the best score for both classes, that of `right` in a, `left` in c is false, and `right` in d is missed.
    assert metrics.threshold == pytest.approx((125 + 100) / 2 / 255)
    assert metrics.f1 == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert metrics.confusion is not None
    assert metrics.confusion.labels == ("left", "right", "background")
    assert metrics.confusion.counts == ((2, 0, 0), (0, 1, 1), (1, 0, 0))
    assert metrics.worst is not None
    worst = [(one.img_id, one.missed, one.false) for one in metrics.worst]
    assert worst == [(f"{3:024x}", 0, 1), (f"{4:024x}", 1, 0)]
    assert not [event for event in events if isinstance(event, Note)]


def test_a_class_that_the_data_lack_is_named(tmp_path: Path, model: Path) -> None:
    result, _ = run(write_job(tmp_path, model, classes=("right", "up", "other")))
    assert result.metrics is not None
    assert result.metrics.classes_not_in_data == ("left",)
    assert result.metrics.classes_not_in_model == ("up", "other")
    assert result.metrics.per_class[0].map is None


def test_without_labels_there_are_detections_only(tmp_path: Path, model: Path) -> None:
    result, events = run(write_job(tmp_path, model, labels=False))
    assert result.metrics is None
    assert result.detection_count == 8
    assert not [event for event in events if isinstance(event, Note)]


def test_without_a_common_class_nothing_is_measured_and_a_note_says_why(tmp_path: Path, model: Path) -> None:
    result, events = run(write_job(tmp_path, model, classes=("x", "y", "z")))
    assert result.metrics is None
    notes = [event.message for event in events if isinstance(event, Note)]
    assert notes == ["not measured: labelled are x, y, z; the model knows left, right"]


@pytest.mark.parametrize("batch_size", [1, 2, 10**6])
def test_the_batch_size_changes_nothing_that_is_found(tmp_path: Path, model: Path, batch_size: int) -> None:
    usual, _ = run(write_job(tmp_path, model))
    expected, metrics = stored(usual), usual.metrics
    other, _ = run(write_job(tmp_path, model, params={"batch_size": batch_size}))
    assert stored(other) == expected
    assert other.metrics == metrics


def test_a_batch_is_never_larger_than_the_limit(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of an attempt before, which ran out of memory; and our own, whatever a client asks for."""
    sizes: list[int] = []
    original = OnnxDetector.detect_stretched

    def spy(self: OnnxDetector, images: np.ndarray, of: Sequence[tuple[int, int]]) -> Any:
        sizes.append(len(images))
        return original(self, images, of)

    monkeypatch.setattr(OnnxDetector, "detect_stretched", spy)
    run(write_job(tmp_path, model, params={"batch_size": 100}, batch_size_limit=2))
    # Four good images, then a bad one; the one that is not there is in no batch.
    assert sizes == [2, 2]
    monkeypatch.setattr(predict, "MAX_BATCH", 3)
    sizes.clear()
    run(write_job(tmp_path, model, params={"batch_size": 100}))
    assert sizes == [3, 1]


def test_started_comes_first_and_the_last_image_is_reported(tmp_path: Path, model: Path) -> None:
    _, events = run(write_job(tmp_path, model))
    assert events[0] == Started(device="cpu")
    progress = [event for event in events if isinstance(event, Progress)]
    assert progress[-1].iteration == progress[-1].max_num_iters == 5
    assert progress[-1].eta_seconds == 0


@pytest.mark.parametrize("labels", [True, False])
def test_the_report_has_pictures(tmp_path: Path, model: Path, labels: bool) -> None:
    """Without labels, only that of what was found; and in one page all that there is."""
    result, _ = run(write_job(tmp_path, model, labels=labels))
    of_measurement = {"confusion.png", "precision_recall.png", "worst.png", "suspicious.png", "calibration.png"}
    assert set(result.reports) == {"samples.png", "report.html"} | (of_measurement if labels else set())
    for name, path in result.reports.items():
        assert path == tmp_path / "out" / name
        if path.suffix == ".html":
            # Without suspicious labels their picture has nothing to show.
            assert path.read_text().count("<img") == len(result.reports) - (2 if labels else 1)
            continue
        assert cv2.imread(str(path)).shape[1] > 700


def test_the_thresholds_of_the_model_are_held_to_these_images(tmp_path: Path, model: Path) -> None:
    """What comes of them is told beside the best: worse, and true. A class whose threshold is unknown is left out."""
    known = RegisteredModel(onnx=model, class_names=NAMES, input_size=SIDE, thresholds=(0.9, None), reference="m:3")
    result, _ = run(write_job(tmp_path, model, model=known))
    assert result.metrics is not None
    left, right = result.metrics.per_class
    # The two best, in a and b; b has no label `left` but `right`: see IMAGES. Of two labelled one is found at 0.9.
    assert left.at_model_threshold is not None
    at = left.at_model_threshold
    assert (at.threshold, at.precision, at.recall, at.f1) == (0.9, 1, 0.5, pytest.approx(2 / 3))
    assert (left.recall, left.f1) == (1, 1)
    assert right.at_model_threshold is None
    assert result.metrics.at_model_thresholds is not None
    assert result.metrics.at_model_thresholds.f1 == pytest.approx(2 / 3)
    plain, _ = run(write_job(tmp_path, model))
    assert plain.metrics is not None
    assert plain.metrics.at_model_thresholds is None
    assert "at_model_threshold" not in plain.metrics.model_dump()["per_class"][0]
    assert stored(result) == stored(plain)


def test_images_that_the_model_was_trained_on_are_told(tmp_path: Path, model: Path) -> None:
    """By the fingerprints in its file; of a model without them nothing is claimed."""
    random = np.random.default_rng(0)
    noise = cv2.resize(random.integers(0, 255, (12, 12, 3)).astype(np.uint8), (96, 60), interpolation=cv2.INTER_CUBIC)
    job = write_job(tmp_path, model)
    cv2.imwrite(str(tmp_path / "c.png"), cv2.resize(noise, (50, 50)))
    assert run(job)[0].leaks is None
    seen = fingerprint(cv2.cvtColor(noise, cv2.COLOR_BGR2RGB))
    add_facts(model, (), collected([("a" * 24, seen), ("b" * 24, bytes(range(16)))]))
    result, events = run(job)
    assert result.leaks is not None
    # The others are of one grey: they have nothing to tell them by.
    assert (result.leaks.count, result.leaks.compared, result.leaks.training_images) == (1, 1, 2)
    [example] = result.leaks.examples
    assert (example.img_id, example.other_img_id) == (f"{3:024x}", "a" * 24)
    notes = [event.message for event in events if isinstance(event, Note)]
    assert [note.split(":")[0] for note in notes] == [
        "1 of 1 tested images are nearly identical to images that were trained on"
    ]
    assert notes[0] in result.reports["report.html"].read_text()


def test_a_test_without_a_usable_image_fails(tmp_path: Path, model: Path) -> None:
    with pytest.raises(DataError, match=r"none of 6 images can be used, e\.g\. image 0{23}6: gone") as failure:
        run(write_job(tmp_path, model, usable=False))
    assert failure.value.field == "img_mongodb_ids"


def test_it_stops_when_asked_to(tmp_path: Path, model: Path) -> None:
    """Between two batches, with the number of images that are done."""
    asked: list[None] = []

    def second_time() -> bool:
        asked.append(None)
        return len(asked) == 2

    with pytest.raises(StoppedEarly) as stopped:
        run_test(write_job(tmp_path, model, params={"batch_size": 2}), lambda event: None, second_time)
    assert stopped.value.iteration == 2


def test_few_images_wait_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, and however long the network takes for each."""
    read: list[int] = []

    def reads(sample: Sample) -> tuple[np.ndarray, Boxes]:
        read.append(sample.id)
        return picture(0, 4, 4), sample.boxes

    monkeypatch.setattr(predict, "read_sample", reads)
    nothing = make_boxes([])
    samples = [Sample(number, "", "test", tmp_path, 4, 4, nothing) for number in range(500)]
    images = predict._prefetched(samples, SIDE, ahead=6)
    order = [next(images) for _ in range(3)]
    assert [image.sample.id for image in order if isinstance(image, predict._Loaded)] == [0, 1, 2]
    assert len(read) <= 3 + 6
    assert len([*images]) == 497
    assert sorted(read) == list(range(500))


def test_onnxruntime_is_quiet_about_a_missing_gpu(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        with pytest.raises(RuntimeError):
            OnnxDetector(model, NAMES, SIDE, "cuda:99")
    assert capfd.readouterr().err == ""
