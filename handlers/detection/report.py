"""The report of a training or a test: its numbers, and its pictures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from handlers.detection.boxes import Boxes, Detections, Image
from handlers.detection.data import ImageError, Sample, read_sample
from handlers.detection.evaluate import Evaluation, evaluate
from handlers.detection.mistakes import ImageMistakes
from handlers.detection.pictures.calibration import calibration_picture
from handlers.detection.pictures.confusion import confusion_picture
from handlers.detection.pictures.precision_recall import precision_recall_picture
from handlers.detection.pictures.samples import SHEET_SAMPLES, sample_sheet
from handlers.detection.pictures.suspicious import MAX_IMAGES, suspicious_sheet
from handlers.detection.pictures.worst import worst_sheet
from handlers.detection.suspicious import Suspect
from schemas.result import Metrics


@dataclass(frozen=True)
class Measurement:
    """What a measurement leaves."""

    metrics: Metrics
    #: The best threshold of each class, in the order of the class names; None where nothing right was found.
    thresholds: tuple[float | None, ...]
    #: By name.
    pictures: dict[str, Path]


def measure_and_draw(
    samples: Sequence[Sample],
    truths: Mapping[int, Boxes],
    detections: Mapping[int, Detections],
    class_names: Sequence[str],
    on: str,
    out: Path,
    thresholds: Sequence[float | None] = (),
) -> Measurement:
    """Measure `detections` (by image id, in pixels of the image as labelled), and draw where they are good and bad.

    The pictures lie in the folder `out`, by their names: `confusion.png`, `precision_recall.png`, `worst.png`,
    `suspicious.png` and `calibration.png`. `thresholds` are those that the model brought along, if it did.
    Images are read again one by one, since keeping them would have kept them all; one that can no longer be read is
    left out of the picture. Raises DataError where nothing is labelled.
    """
    by_id = {sample.id: sample for sample in samples if sample.id in truths}
    mongodb_ids = {sample.id: sample.mongodb_id for sample in samples}
    evaluation = evaluate(list(by_id), truths, detections, class_names, on, mongodb_ids, thresholds)
    names = ("confusion.png", "precision_recall.png", "worst.png", "suspicious.png", "calibration.png")
    pictures = {name: out / name for name in names}
    confusion_png, curves_png, worst_png, suspicious_png, calibration_png = pictures.values()
    confusion_picture(evaluation.confusion, class_names, evaluation.threshold, confusion_png)
    precision_recall_picture(evaluation.precision, evaluation.scores, class_names, evaluation.threshold, curves_png)
    worst_sheet(_worst(evaluation, by_id), class_names, evaluation.threshold, worst_png)
    suspicious_sheet(_suspicious(evaluation, by_id), class_names, suspicious_png)
    assert evaluation.metrics.calibration is not None
    calibration_picture(evaluation.metrics.calibration, calibration_png)
    return Measurement(evaluation.metrics, evaluation.thresholds, pictures)


def draw_samples(
    samples: Sequence[Sample],
    truths: Mapping[int, Boxes],
    detections: Mapping[int, Detections],
    class_names: Sequence[str],
    out: Path,
    thresholds: Sequence[float | None] = (),
) -> dict[str, Path]:
    """Draw `samples.png`, images evenly spread over those of `samples` that have detections, in the folder `out`.

    `thresholds`: the scores from which on detections are drawn, one for each class (see `sample_sheet`).
    """
    shown = [sample for sample in samples if sample.id in detections]
    count = min(SHEET_SAMPLES, len(shown))
    chosen = [shown[index * len(shown) // count] for index in range(count)]
    path = out / "samples.png"
    pictures = ((image, truths[sample.id], detections[sample.id]) for sample, image in _read(chosen))
    sample_sheet(pictures, class_names, path, thresholds)
    return {path.name: path}


def _worst(evaluation: Evaluation, by_id: Mapping[int, Sample]) -> Iterator[tuple[Image, ImageMistakes, str]]:
    mistakes = {one.image_id: one for one in evaluation.worst}
    for sample, image in _read([by_id[image_id] for image_id in mistakes]):
        yield image, mistakes[sample.id], sample.mongodb_id


def _suspicious(evaluation: Evaluation, by_id: Mapping[int, Sample]) -> Iterator[tuple[Image, list[Suspect], str]]:
    suspects: dict[int, list[Suspect]] = {}
    for suspect in evaluation.suspects.worst:
        suspects.setdefault(suspect.image_id, []).append(suspect)
    for sample, image in _read([by_id[image_id] for image_id in islice(suspects, MAX_IMAGES)]):
        yield image, suspects[sample.id], sample.mongodb_id


def _read(samples: Sequence[Sample]) -> Iterator[tuple[Sample, Image]]:
    for sample in samples:
        try:
            yield sample, read_sample(sample)[0]
        except ImageError:  # It could be read before, and its numbers count.
            continue
