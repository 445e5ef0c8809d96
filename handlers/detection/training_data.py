"""The images of a training: read once, those that cannot be used set aside."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from handlers.detection.batches import ImageStore
from handlers.detection.boxes import Floats
from handlers.detection.data import Sample, image_paths, images_used, load_samples, separate_validation
from handlers.detection.errors import DataError
from handlers.detection.evaluate import measurable
from handlers.detection.fingerprints import Fingerprints, collected
from handlers.detection.job import Event, Job, Note
from handlers.detection.leaks import leaks, leaks_note
from handlers.detection.ranks import Ranks
from schemas.message import RequestMessage
from schemas.result import ImagesUsed, Leaks, SkippedImage


@dataclass(frozen=True)
class TrainingData:
    """The images of the splits train and val that can be read, and how many cannot."""

    message: RequestMessage
    class_names: tuple[str, ...]
    train: list[Sample]
    #: Empty where there are too few images, or none of them has a label to measure by.
    val: list[Sample]
    skipped: list[SkippedImage]
    #: float32 [N, 2]: width and height of the objects to be learnt, fractions of their images, in order of size.
    object_sizes: Floats
    #: Of every image that was read, by its id in the message.
    fingerprints: dict[int, bytes | None]

    def fingerprints_of(self, samples: Sequence[Sample]) -> Fingerprints:
        """Those of `samples`, as far as they have any."""
        return collected([(sample.mongodb_id, self.fingerprints.get(sample.id)) for sample in samples])

    def leaks(self, emit: Callable[[Event], None]) -> Leaks:
        """The validation images compared with the training images; a Note tells of what is found."""
        found = leaks(self.fingerprints_of(self.val), self.fingerprints_of(self.train), in_training=True)
        if found.count:
            emit(Note(message=leaks_note(found, "validation")))
        return found

    def used(self) -> ImagesUsed:
        """For the result."""
        lost = {image.img_id for image in self.skipped}
        return images_used(sum(sample.mongodb_id not in lost for sample in self.train + self.val), self.skipped)


def load_data(
    job: Job, message: RequestMessage, store: ImageStore, pool: ThreadPoolExecutor, ranks: Ranks
) -> TrainingData:
    """Read every image that the `message` of a job wants trained or validated on; each rank reads its part.

    Raises DataError if not one image with a labelled object is left to train on.
    """
    samples, skipped = load_samples(message, image_paths(job.images), ("train", "val"))
    if message.image_info and all(image.split == "test" for image in message.image_info):
        raise DataError(
            f"all {len(message.image_info)} images belong to the split test, which is never trained on; "
            "expected images of the split train",
            "split",
        )
    # Before the unreadable are left out: what is chosen for validation must not hang on them.
    train, val = separate_validation(samples, job.seed)
    mine, unreadable = store.usable(samples[ranks.rank :: ranks.size], pool)
    skipped += [image for part in ranks.gather(unreadable) for image in part]
    fingerprints = {number: bits for part in ranks.gather(store.fingerprints) for number, bits in part.items()}
    bad = {image.img_id for image in skipped}
    train = [sample for sample in train if sample.mongodb_id not in bad]
    val = [sample for sample in val if sample.mongodb_id not in bad]
    if not measurable([sample.boxes for sample in train]):
        example = f", e.g. {skipped[0].img_id}: {skipped[0].reason}" if skipped else ""
        none = (
            "a box that is neither a crowd nor difficult"
            if any(len(sample.boxes) for sample in train)
            else "a labelled box"
        )
        raise DataError(
            f"no training image with {none} is left: {len(train)} images can be read, {len(skipped)} cannot{example}",
            "img_mongodb_ids",
        )
    if not measurable([sample.boxes for sample in val]):
        # Not trained on either: what shows objects and has no labels yet would be taken for background.
        val = []
    learnt = {sample.id for sample in train}
    parts = ranks.gather(_object_sizes([sample for sample in mine if sample.id in learnt], store))
    # Which rank read which image must make no difference.
    sizes = np.concatenate(parts)
    sizes = sizes[np.lexsort(sizes.T)]
    class_names = tuple(known.name for known in message.class_info)
    return TrainingData(message, class_names, train, val, skipped, sizes, fingerprints)


def _object_sizes(samples: Sequence[Sample], store: ImageStore) -> Floats:
    """float32 [N, 2]: width and height of the objects in `samples`, which `store` has read."""
    sizes = [np.empty((0, 2), np.float32)]
    for sample in samples:
        width, height = store.size(sample)
        objects = sample.boxes.select(~sample.boxes.crowd).clipped(width, height)
        sides = (objects.xyxy[:, 2:] - objects.xyxy[:, :2]) / np.array([width, height], np.float32)
        sizes.append(np.asarray(sides, np.float32))
    return np.concatenate(sizes)
