"""The child process as the worker sees it: a job's path in, JSON lines out, an exit code, always a clean end."""

import hashlib
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from corpus import corpus
from drawn import CLASSES, make_job, parse_events, write_job

from handlers.detection.attempt import _failed
from handlers.detection.devices import open_device
from handlers.detection.errors import DeviceError
from handlers.detection.job import Failed, Job, Measured, Note, Progress, Snapshot, Started, Stopped, Trained

# Under names that pytest does not take for test classes.
from handlers.detection.job import Tested as Outcome
from handlers.detection.job import TestedModel as RegisteredModel
from schemas.result import MAX_EXAMPLES
from tests.disks import small_disk

COMMAND = (sys.executable, "-m", "handlers.detection")


@contextmanager
def child() -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(COMMAND, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run(job_file: Path) -> tuple[int, list[object], str]:
    """(exit code, events, stderr) of a child that is given `job_file`."""
    with child() as process:
        out, err = process.communicate(f"{job_file}\n")
        return process.returncode, list(parse_events(out)), err


def test_end_of_stdin_without_a_job_is_the_end() -> None:
    """A warm child that is no longer needed goes, silently."""
    with child() as process:
        assert process.communicate("") == ("", "")
        assert process.returncode == 0


def test_a_training_from_bad_images_to_a_model(tmp_path: Path) -> None:
    """Unusable images are named and passed over, and boxes that cannot be; what comes out is a model that finds things,
    with pictures. Memory stays bounded, and a test of the model on the same images passes over the same ones.
    """
    job = make_job(tmp_path, 16, max_num_iters=3, dataset_expansion_lst=["HOR_FLIPE"], batch_size_limit=3)
    files = tmp_path / "images"
    files.joinpath("1.png").write_bytes(b"")
    files.joinpath("2.png").write_bytes(files.joinpath("2.png").read_bytes()[:200])
    files.joinpath("4.png").write_text("not an image")
    cv2.imwrite(str(files / "5.png"), np.zeros((10, 10, 3), np.uint8))
    files.joinpath("6.png").unlink()
    lines = job.images.read_text().splitlines()
    lines[6] = json.dumps({"id": 7, "reason": "GridFS has no such file"})
    job.images.write_text("\n".join(lines))

    odd = add_odd_images(job)

    code, events, err = run(write_job(tmp_path, job))

    assert code == 0, err
    trained = events[-1]
    assert isinstance(trained, Trained)
    skipped = {number: reason for number, reason in odd.items() if reason}
    reasons = {image.img_id: image.reason for image in trained.images.skipped_examples}
    named = {number: reasons.pop(f"{number:024x}", None) for number in odd}
    assert all(re.search(skipped[number], reason) for number, reason in named.items() if reason)
    assert sum(reason is not None for reason in named.values()) == MAX_EXAMPLES - 6
    assert reasons == {
        f"{1:024x}": "the file is empty",
        f"{2:024x}": "the file is truncated",
        f"{4:024x}": "the file is not an image, or a damaged one",
        f"{5:024x}": "the file is 10 x 10 pixels; recorded is 96 x 96",
        f"{6:024x}": "the file cannot be read: No such file or directory",
        f"{7:024x}": "GridFS has no such file",
    }
    assert (trained.images.used, trained.images.skipped) == (10 + len(odd) - len(skipped), 6 + len(skipped))
    assert trained.metrics.on == "val"
    assert {row.class_name for row in trained.metrics.per_class} == set(CLASSES)
    assert (trained.iterations, trained.resumed_from_iteration) == (3, None)
    assert trained.best_iteration in (2, 3)
    report = trained.reports["report.html"].read_text()
    drawn = {"samples.png", "confusion.png", "precision_recall.png", "worst.png", "suspicious.png", "calibration.png"}
    assert set(trained.reports) == {"training.png", "report.html"} | drawn
    pictures = [path for name, path in trained.reports.items() if name.endswith(".png")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    # Without suspicious labels their picture has nothing to show.
    assert trained.metrics.suspicious is not None
    assert report.count("<img") == len(pictures) - (not trained.metrics.suspicious.examples)
    assert reasons[f"{1:024x}"] in report
    assert trained.metrics.confusion is not None
    assert trained.metrics.confusion.labels == (*CLASSES, "background")

    assert trained.weights is not None
    assert trained.card is not None
    assert (trained.card.batch_size, trained.card.train_images + trained.card.val_images) == (4, trained.images.used)
    assert "begins at 0.001, rises to 0.025 over the first 30 % of 3 iterations" in trained.card.recipe

    assert [event.message for event in events if isinstance(event, Note)] == [
        "images with more than 100 objects: 1; no more than that are found in one",
        "each batch of 4 images is taken in 2 parts, to fit into the device's memory",
        "2 images at once are too few for batch normalisation: it keeps its statistics",
    ]
    started = [event for event in events if isinstance(event, Started)]
    assert [(event.device, event.iteration) for event in started] == [("cpu", 0)]
    assert started[0].initial_weights == trained.initial_weights
    reported = [event.iteration for event in events if isinstance(event, Progress)]
    assert (reported[0], reported[-1]) == (1, 3)
    measured = {name for event in events if isinstance(event, Measured) for name in event.values}
    assert measured == {"loss", "learning_rate", "map", "map_50", "map_75"}
    assert [event.iteration for event in events if isinstance(event, Snapshot)] == [2, 3]

    session = onnxruntime.InferenceSession(trained.onnx, providers=["CPUExecutionProvider"])
    boxes, scores, class_ids = session.run(None, {"images": np.zeros((2, 224, 224, 3), np.uint8)})
    assert (boxes.shape, scores.shape, class_ids.shape) == ((2, 100, 4), (2, 100), (2, 100))
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["class_names"]) == list(CLASSES)
    thresholds = json.loads(facts["thresholds"])
    assert thresholds == [row.threshold for row in trained.metrics.per_class]
    assert trained.sha256 == hashlib.sha256(trained.onnx.read_bytes()).hexdigest()
    assert trained.leaks is not None
    assert trained.leaks.training_images + trained.leaks.compared <= trained.images.used

    model = RegisteredModel(
        onnx=trained.onnx, class_names=trained.class_names, input_size=trained.input_size, thresholds=tuple(thresholds)
    )
    code, events, err = run(write_job(tmp_path, job.model_copy(update={"kind": "TEST", "model": model})))
    assert code == 0, err
    tested = events[-1]
    assert isinstance(tested, Outcome)
    assert (tested.images.used, tested.images.skipped) == (trained.images.used, trained.images.skipped)
    assert len(tested.detections.read_text().splitlines()) == tested.images.used
    assert set(tested.reports) == drawn | {"report.html"}
    # These very images were trained on.
    assert tested.leaks is not None
    assert tested.leaks.training_images == trained.leaks.training_images
    assert tested.leaks.count >= trained.leaks.training_images
    # The most that any child of this process has held, in kB.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4_000_000


def add_odd_images(job: Job) -> dict[int, str | None]:
    """Add the corpus to the job's images, and boxes as nobody draws them: the reason for each number, if it is skipped.

    The boxes: outside the image and across its edge, without area, of negative size, beyond all numbers; and 10,000 on
    one image.
    """
    document = json.loads(job.message.read_text())
    boxes = [
        [500, 500, 5, 5],
        [-10, -10, 30, 30],
        [5, 5, 1e-30, 5],
        [30, 30, -9, -9],
        [1e308, 0, 1e308, 5],
        [0, 0, 1e300, 9],
    ]
    odd = {}
    first = len(document["image_info"]) + 1
    for number, (name, (data, reason)) in enumerate(corpus().items(), first):
        path = job.out.parent / "images" / f"{number}.jpg"
        path.write_bytes(data)
        odd[number] = reason
        image = {"id": number, "file_name": name, "width": 0, "height": 0, "split": "train"}
        document["image_info"].append(image | {"mongodb_id": f"{number:024x}"})
        drawn = boxes
        if name == "grey":
            drawn = [[float(n % 60), float(n // 60 % 60), 3.0, 3.0] for n in range(10_000)]
        for box in drawn:
            label = {"image_id": number, "class_id": 1, "bbox": box, "area": 1.0, "mongodb_id": "0" * 24}
            document["instance_info"].append(label | {"id": len(document["instance_info"]) + 1})
        with job.images.open("a") as lines:
            lines.write("\n" + json.dumps({"id": number, "path": str(path)}))
    job.message.write_text(json.dumps(document))
    return odd


def test_without_validation_images_the_last_averaged_weights_are_kept(tmp_path: Path) -> None:
    """And measured on the training images, which the result says. Fewer images than the batch are trained on."""
    job = make_job(tmp_path, 3, splits=["train"] * 3, max_num_iters=2, batch_size=5)
    code, events, err = run(write_job(tmp_path, job))
    assert code == 0, err
    trained = events[-1]
    assert isinstance(trained, Trained)
    assert (trained.metrics.on, trained.best_iteration, trained.images.used) == ("train", 2, 3)
    assert any("no validation images" in event.message for event in events if isinstance(event, Note))


def test_validation_images_without_labels_are_not_trained_on(tmp_path: Path) -> None:
    """What they show would be learnt as background. That no size is recorded of images is said too."""
    job = make_job(tmp_path, 5, max_num_iters=1, batch_size=2, model_scope="NORMAL")
    document = json.loads(job.message.read_text())
    document["instance_info"] = [row for row in document["instance_info"] if row["image_id"] != 4]
    document["image_info"][0] |= {"width": 0, "height": 0}
    job.message.write_text(json.dumps(document))
    code, events, err = run(write_job(tmp_path, job))
    assert code == 0, err
    trained = events[-1]
    assert isinstance(trained, Trained)
    assert (trained.metrics.on, trained.images.used) == ("train", 4)
    notes = " ".join(event.message for event in events if isinstance(event, Note))
    assert "no validation images with labels to measure by" in notes
    assert "1 images have no recorded size" in notes


def failure(tmp_path: Path, job: Job) -> Failed:
    code, events, err = run(write_job(tmp_path, job))
    assert code == 1, err
    assert isinstance(events[-1], Failed)
    return events[-1]


def test_images_of_the_test_split_are_never_trained_on(tmp_path: Path) -> None:
    """A message of nothing else is an error of the data."""
    failed = failure(tmp_path, make_job(tmp_path, 3, splits=["test"] * 3))
    assert failed.kind == "data"
    assert "all 3 images belong to the split test" in failed.message


def test_too_little_left_to_train_on(tmp_path: Path) -> None:
    """Not one readable image with a labelled object."""
    job = make_job(tmp_path, 4)
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"x")
    failed = failure(tmp_path, job)
    assert failed.kind == "data"
    assert "no training image with a labelled box is left: 0 images can be read, 4 cannot" in failed.message


def test_nothing_but_difficult_objects(tmp_path: Path) -> None:
    """There are boxes, and the error says why they are none to train with."""
    job = make_job(tmp_path, 4)
    document = json.loads(job.message.read_text())
    document["instance_info"] = [row | {"difficult": 1} for row in document["instance_info"]]
    job.message.write_text(json.dumps(document))
    assert "with a box that is neither a crowd nor difficult is left: 3 images" in failure(tmp_path, job).message


def test_a_loss_that_is_not_finite_names_iteration_and_images(tmp_path: Path) -> None:
    """A learning rate far too high; the images are those of the batch, by their ids in the database."""
    failed = failure(tmp_path, make_job(tmp_path, 4, inital_learning_rate=1e30, max_num_iters=50))
    assert failed.kind == "loss"
    assert "the loss of iteration " in failed.message
    assert sum(f"{number:024x}" in failed.message for number in (1, 2, 3)) == 3


def test_a_batch_beyond_all_memory(tmp_path: Path) -> None:
    """Is said to be one, before the machine is brought down."""
    assert failure(tmp_path, make_job(tmp_path, 4, batch_size=4_000_000_000)).kind == "memory"


def test_a_full_disk_is_the_machines_fault(tmp_path: Path) -> None:
    """Another machine may do better. No half snapshot is announced."""
    job = make_job(tmp_path, 4, max_num_iters=1)
    with small_disk(tmp_path / "disk", 4) as disk:
        code, events, err = run(write_job(tmp_path, job.model_copy(update={"out": disk / "out"})))
    assert code == 1, err
    failed = events[-1]
    assert isinstance(failed, Failed)
    assert failed.kind == "machine"
    assert "No space left on device" in failed.message
    assert not any(isinstance(event, Snapshot) for event in events)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), "machine"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), "bug"),
        (torch.AcceleratorError("CUDA error: out of memory"), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
        (DeviceError("cuda:0 cannot be used: No CUDA GPUs are available"), "machine"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "bug"),
    ],
    ids=str,
)
def test_what_a_failing_device_says(error: Exception, kind: str) -> None:
    """Is the machine's fault, so that another worker tries; but what wrong indices end in is ours."""
    assert _failed(error).kind == kind


def test_a_device_that_cannot_be_opened_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(device: object) -> None:
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setattr(torch.cuda, "set_device", gone)
    with pytest.raises(DeviceError, match=r"cuda:0 cannot be used: No CUDA GPUs are available") as raised:
        open_device("cuda:0")
    assert _failed(raised.value).kind == "machine"


def test_a_message_that_is_none(tmp_path: Path) -> None:
    """Names the field, its value and what was expected."""
    job = make_job(tmp_path, 4)
    document = json.loads(job.message.read_text())
    document["instance_info"][0]["class_id"] = 9
    job.message.write_text(json.dumps(document))
    failed = failure(tmp_path, job)
    assert (failed.kind, failed.field) == ("data", "instance_info.0.class_id")
    assert "is 9; expected 1 to 2" in failed.message


def test_sigterm_snapshots_and_stops(tmp_path: Path) -> None:
    """Exit code 0, a last snapshot, and Stopped at its iteration; SIGINT is left to the worker."""
    job = make_job(tmp_path, max_num_iters=100_000, snap_shot_ivterval=100_000)
    with child() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{write_job(tmp_path, job)}\n")
        process.stdin.flush()
        seen = [process.stdout.readline()]
        while '"progress"' not in seen[-1]:
            seen.append(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        events = parse_events("".join(seen) + process.stdout.read())
        assert process.wait() == 0
    stopped, snapshot = events[-1], events[-2]
    assert isinstance(stopped, Stopped)
    assert isinstance(snapshot, Snapshot)
    assert snapshot.iteration == stopped.iteration >= 1
    assert snapshot.path.is_file()


def test_a_dead_worker_leaves_no_orphan(tmp_path: Path) -> None:
    """Killed without a chance to clean up, it takes the child along, busy or not."""
    job = make_job(tmp_path, max_num_iters=100_000)
    code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen({list(COMMAND)!r}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)\n"
        f"child.stdin.write({f'{write_job(tmp_path, job)}'!r} + chr(10)); child.stdin.flush()\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child_pid = int(parent.stdout.readline())
    # A handle on the process itself, since its number may be used again.
    handle = os.pidfd_open(child_pid)
    parent.kill()
    parent.communicate()
    # A pidfd becomes readable when its process ends.
    gone, _, _ = select.select([handle], [], [], 60)
    os.close(handle)
    assert gone
