"""What a detector got wrong in each image, and where most."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from handlers.detection.boxes import Boxes, Detections, Ints
from handlers.detection.coco import Measured


@dataclass(frozen=True)
class ImageMistakes:
    """One image, with all its labelled boxes and the detections that count, in pixels of the image as labelled."""

    image_id: int
    truths: Boxes
    #: bool [len(truths)]: no detection of its class found it, and it counts.
    missed: NDArray[np.bool_]
    #: Of at least the threshold.
    detections: Detections
    #: bool [len(detections)]: found no object of its class, not even one that does not count.
    false: NDArray[np.bool_]

    @property
    def missed_count(self) -> int:
        """Objects that were missed."""
        return int(self.missed.sum())

    @property
    def false_count(self) -> int:
        """Detections that are false."""
        return int(self.false.sum())


def worst_images(measured: Measured, found: Ints, threshold: float, most: int) -> list[ImageMistakes]:
    """The images with most mistakes, misses and false detections of at least `threshold` together; none without any.

    `found` is what each detection found of its class. Of equals the first in `measured.image_ids`.
    """
    truths, detections = measured.truths, measured.found
    shown = detections.scores >= threshold
    false = shown & (found < 0)
    missed = truths.counted
    missed[found[shown & (found >= 0)]] = False
    place = {image_id: index for index, image_id in enumerate(measured.image_ids)}
    mistakes = np.zeros(len(place), np.int64)
    for images in (measured.truth_images[missed], measured.found_images[false]):
        ids, counts = np.unique(images, return_counts=True)
        mistakes[[place[int(image_id)] for image_id in ids]] += counts
    order = np.argsort(-mistakes, kind="stable")[:most]
    worst = []
    for index in order[mistakes[order] > 0]:
        image_id = measured.image_ids[index]
        of_truths = np.flatnonzero(measured.truth_images == image_id)
        of_found = np.flatnonzero((measured.found_images == image_id) & shown)
        worst.append(
            ImageMistakes(
                image_id,
                truths.select(of_truths),
                missed[of_truths],
                Detections(detections.xyxy[of_found], detections.class_ids[of_found], detections.scores[of_found]),
                false[of_found],
            )
        )
    return worst
