"""A test of a registered model on the images of a job."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import orjson

from handlers.detection.boxes import Boxes, Detections, Image
from handlers.detection.coco import xywh
from handlers.detection.data import (
    ImageError,
    Sample,
    fit,
    image_paths,
    images_used,
    load_samples,
    read_message,
    read_sample,
)
from handlers.detection.devices import reader_threads
from handlers.detection.errors import DataError, StoppedEarly
from handlers.detection.evaluate import measurable, names_that_fit
from handlers.detection.fingerprints import collected, decoded, fingerprint
from handlers.detection.html_report import Notes, html_report
from handlers.detection.job import Event, Job, Note, Progress, Started, Tested, TestedModel
from handlers.detection.leaks import leaks, leaks_note
from handlers.detection.onnx_detector import OnnxDetector
from handlers.detection.report import draw_samples, measure_and_draw
from handlers.detection.suppression import crowded_note
from schemas.message import RequestMessage
from schemas.result import MAX_EXAMPLES, MAX_NAMES_BYTES, Leaks, Metrics, SkippedImage

#: Most images in one run of the network, whatever `batch_size` says: more is no faster, and takes memory.
MAX_BATCH = 64
#: Seconds between two reports of progress.
_PROGRESS_INTERVAL = 0.5


def run_test(job: Job, emit: Callable[[Event], None], stopping: Callable[[], bool]) -> Tested:
    """Run the model of `job` on every image of its message; measure it if there are labels.

    Emits Started and Progress. Raises DataError where the message, the model or every image is unusable, OutOfMemory,
    and StoppedEarly soon after `stopping()` has turned true.
    """
    if job.model is None:
        raise DataError("the job names no model to test", "model_name")
    emit = notes = Notes(emit)
    message = read_message(job.message)
    samples, skipped = load_samples(message, image_paths(job.images))
    detector = OnnxDetector(job.model.onnx, job.model.class_names, job.model.input_size, job.devices[0])
    if len(job.devices) > 1:
        emit(Note(message=f"a test runs on one device; {detector.device} was used"))
    emit(Started(device=detector.device))
    run = _run(detector, samples, _batch_size(job), job.out / "detections.jsonl", emit, stopping)
    skipped.extend(run.skipped)
    if not run.detections:
        example = f", e.g. image {skipped[0].img_id}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"none of {len(message.image_info)} images can be used{example}", "img_mongodb_ids")
    truths = _match_classes(message, job.model, run)
    if note := crowded_note(truths.values()):
        emit(Note(message=note))
    used = [sample for sample in samples if sample.id in run.detections]
    metrics, reports = _measure(message, job.model, used, run, truths, job.out, emit)
    reports |= draw_samples(used, truths, run.detections, job.model.class_names, job.out, job.model.thresholds)
    found_again = _leaks(used, run, detector, emit)
    tested = Tested(
        detections=job.out / "detections.jsonl",
        detection_count=sum(map(len, run.detections.values())),
        images_per_second=run.images_per_second,
        device=detector.device,
        metrics=metrics,
        leaks=found_again,
        images=images_used(len(used), skipped),
        reports=reports,
    )
    report = html_report(job, message, tested, notes.texts)
    return tested.model_copy(update={"reports": {report.name: report, **reports}})


def _batch_size(job: Job) -> int:
    wanted = int(str(job.params.get("batch_size", MAX_BATCH)))
    return min(wanted, MAX_BATCH, job.batch_size_limit or MAX_BATCH)


@dataclass(frozen=True)
class _Run:
    """What came out for each image, by its id in the message."""

    detections: dict[int, Detections]
    #: As labelled, with the class ids of the data, inside the image.
    labels: dict[int, Boxes]
    fingerprints: dict[int, bytes | None]
    skipped: list[SkippedImage]
    images_per_second: float


@dataclass(frozen=True)
class _Loaded:
    """An image at input size. The image itself is let go of in the thread that read it: it may be large."""

    sample: Sample
    stretched: Image
    size: tuple[int, int]
    boxes: Boxes
    fingerprint: bytes | None


def _load(sample: Sample, input_size: int) -> _Loaded | SkippedImage:
    try:
        image, boxes = read_sample(sample)
    except ImageError as error:
        return SkippedImage(img_id=sample.mongodb_id, reason=str(error))
    return _Loaded(sample, fit(image, input_size), (image.shape[1], image.shape[0]), boxes, fingerprint(image))


def _run(
    detector: OnnxDetector,
    samples: Sequence[Sample],
    batch_size: int,
    out: Path,
    emit: Callable[[Event], None],
    stopping: Callable[[], bool],
) -> _Run:
    run = _Run({}, {}, {}, [], 0.0)
    begin = reported = time.monotonic()
    done = 0

    def report(now: float) -> None:
        rate = done / max(now - begin, 1e-9)
        emit(
            Progress(
                iteration=done,
                max_num_iters=len(samples),
                images_per_second=rate,
                eta_seconds=(len(samples) - done) / rate if rate else 0.0,
            )
        )

    reading = closing(_prefetched(samples, detector.input_size, 2 * batch_size))
    with out.open("wb") as lines, reading as images:
        for batch in _batches(images, batch_size):
            if stopping():
                raise StoppedEarly(done)
            loaded = [image for image in batch if isinstance(image, _Loaded)]
            run.skipped.extend(image for image in batch if isinstance(image, SkippedImage))
            if loaded:
                stretched = np.stack([image.stretched for image in loaded])
                found = detector.detect_stretched(stretched, [image.size for image in loaded])
                for image, detections in zip(loaded, found, strict=True):
                    run.detections[image.sample.id] = detections
                    run.labels[image.sample.id] = image.boxes
                    run.fingerprints[image.sample.id] = image.fingerprint
                    lines.write(_line(image.sample.id, detections, detector.class_names))
            done += len(batch)
            now = time.monotonic()
            if now - reported >= _PROGRESS_INTERVAL or done == len(samples):
                report(now)
                reported = now
    seconds = max(time.monotonic() - begin, 1e-9)
    return replace(run, images_per_second=len(run.detections) / seconds)


def _prefetched(
    samples: Sequence[Sample], input_size: int, ahead: int
) -> Generator[_Loaded | SkippedImage, None, None]:
    """`samples`, read by threads: in order, at most `ahead` of them waiting."""
    with ThreadPoolExecutor(reader_threads(1)) as pool:
        waiting: deque[Future[_Loaded | SkippedImage]] = deque()
        try:
            for sample in samples:
                waiting.append(pool.submit(_load, sample, input_size))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _batches(images: Iterator[_Loaded | SkippedImage], batch_size: int) -> Iterator[list[_Loaded | SkippedImage]]:
    batch: list[_Loaded | SkippedImage] = []
    for image in images:
        batch.append(image)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _line(image_id: int, detections: Detections, class_names: Sequence[str]) -> bytes:
    # Unrounded, so that the metrics can be computed again from what is stored.
    rows = [
        {"class_id": class_id, "class_name": class_names[class_id - 1], "score": score, "bbox": box}
        for class_id, score, box in zip(
            detections.class_ids.tolist(), detections.scores.tolist(), xywh(detections.xyxy), strict=True
        )
    ]
    return orjson.dumps({"image_id": image_id, "detections": rows}, option=orjson.OPT_APPEND_NEWLINE)


def _match_classes(message: RequestMessage, model: TestedModel, run: _Run) -> dict[int, Boxes]:
    """The labels with the model's class ids: matched by name, and left out where the model does not know the class."""
    known = {name: index + 1 for index, name in enumerate(model.class_names)}
    # Position 0 belongs to no class.
    renumbered = np.array([0] + [known.get(row.name, 0) for row in message.class_info], np.int64)
    truths = {}
    for image_id, labels in run.labels.items():
        class_ids = renumbered[labels.class_ids]
        truths[image_id] = Boxes(labels.xyxy, class_ids, labels.crowd, labels.difficult).select(class_ids > 0)
    return truths


def _measure(
    message: RequestMessage,
    model: TestedModel,
    used: Sequence[Sample],
    run: _Run,
    truths: dict[int, Boxes],
    out: Path,
    emit: Callable[[Event], None],
) -> tuple[Metrics | None, dict[str, Path]]:
    """The numbers and their pictures; none where nothing is labelled that the model knows: a Note says so if other
    things are.
    """
    if not measurable(truths.values()):
        if any(map(len, run.labels.values())):
            labelled = ", ".join(row.name for row in message.class_info[:MAX_EXAMPLES])
            known = ", ".join(model.class_names[:MAX_EXAMPLES])
            emit(Note(message=f"not measured: labelled are {labelled}; the model knows {known}"))
        return None, {}
    on = message.dataset_info.split or "test"
    compared = truths, run.detections, model.class_names
    measurement = measure_and_draw(used, *compared, on, out, model.thresholds)
    in_data = {row.name for row in message.class_info}
    unknown = [row.name for row in message.class_info if row.name not in model.class_names]
    absent = [name for name in model.class_names if name not in in_data]
    named = {
        "classes_not_in_model": names_that_fit(unknown, MAX_NAMES_BYTES),
        "classes_not_in_data": names_that_fit(absent, MAX_NAMES_BYTES),
    }
    return measurement.metrics.model_copy(update=named), measurement.pictures


def _leaks(used: Sequence[Sample], run: _Run, detector: OnnxDetector, emit: Callable[[Event], None]) -> Leaks | None:
    """Tested images that the model was trained on; None where its file does not tell on which it was."""
    remembered = detector.facts.get("fingerprints")
    training = None if remembered is None else decoded(remembered)
    if training is None:
        return None
    tested = collected([(sample.mongodb_id, run.fingerprints[sample.id]) for sample in used])
    found = leaks(tested, training, in_training=False)
    if found.count:
        emit(Note(message=leaks_note(found, "tested")))
    return found
