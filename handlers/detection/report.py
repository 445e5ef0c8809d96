"""The report of a training or a test: its numbers, and its pictures."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from handlers.detection.boxes import Boxes, Detections, Image
from handlers.detection.data import ImageError, Sample, read_sample
from handlers.detection.evaluate import Evaluation, evaluate
from handlers.detection.mistakes import ImageMistakes
from handlers.detection.pictures.confusion import confusion_picture
from handlers.detection.pictures.precision_recall import precision_recall_picture
from handlers.detection.pictures.samples import SHEET_SAMPLES, sample_sheet
from handlers.detection.pictures.worst import worst_sheet
from schemas.result import Metrics


def measure_and_draw(
    samples: Sequence[Sample],
    truths: Mapping[int, Boxes],
    detections: Mapping[int, Detections],
    class_names: Sequence[str],
    on: str,
    out: Path,
) -> tuple[Metrics, dict[str, Path]]:
    """Measure `detections` (by image id, in pixels of the image as labelled), and draw where they are good and bad.

    The pictures lie in the folder `out`: `confusion.png`, `precision_recall.png` and `worst.png`, by these names.
    Images are read again one by one, since keeping them would have kept them all; one that can no longer be read is
    left out of the picture. Raises DataError where nothing is labelled.
    """
    by_id = {sample.id: sample for sample in samples if sample.id in truths}
    mongodb_ids = {sample.id: sample.mongodb_id for sample in samples}
    evaluation = evaluate(list(by_id), truths, detections, class_names, on, mongodb_ids)
    confusion_png, curves_png, worst_png = (
        out / name for name in ("confusion.png", "precision_recall.png", "worst.png")
    )
    confusion_picture(evaluation.confusion, class_names, evaluation.threshold, confusion_png)
    precision_recall_picture(evaluation.precision, evaluation.scores, class_names, evaluation.threshold, curves_png)
    worst_sheet(_worst(evaluation, by_id), class_names, evaluation.threshold, worst_png)
    return evaluation.metrics, {path.name: path for path in (confusion_png, curves_png, worst_png)}


def draw_samples(
    samples: Sequence[Sample],
    truths: Mapping[int, Boxes],
    detections: Mapping[int, Detections],
    class_names: Sequence[str],
    out: Path,
) -> dict[str, Path]:
    """Draw `samples.png`, images evenly spread over those of `samples` that have detections, in the folder `out`."""
    shown = [sample for sample in samples if sample.id in detections]
    count = min(SHEET_SAMPLES, len(shown))
    chosen = [shown[index * len(shown) // count] for index in range(count)]
    path = out / "samples.png"
    pictures = ((image, truths[sample.id], detections[sample.id]) for sample, image in _read(chosen))
    sample_sheet(pictures, class_names, path)
    return {path.name: path}


def _worst(evaluation: Evaluation, by_id: Mapping[int, Sample]) -> Iterator[tuple[Image, ImageMistakes, str]]:
    mistakes = {one.image_id: one for one in evaluation.worst}
    for sample, image in _read([by_id[image_id] for image_id in mistakes]):
        yield image, mistakes[sample.id], sample.mongodb_id


def _read(samples: Sequence[Sample]) -> Iterator[tuple[Sample, Image]]:
    for sample in samples:
        try:
            yield sample, read_sample(sample)[0]
        except ImageError:  # It could be read before, and its numbers count.
            continue
