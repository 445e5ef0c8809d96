"""Batches for training: which images, in which order, changed how; prepared by threads ahead of the step.

Everything about sample k of iteration i follows from (seed, i, k) alone. So a training that was interrupted goes on
with exactly the batches that it would have had, and the number of threads changes nothing.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from handlers.detection.augment import vary
from handlers.detection.boxes import Boxes, Image
from handlers.detection.data import ImageError, Sample, read_sample, shrink
from handlers.detection.errors import DataError
from handlers.detection.fingerprints import fingerprint
from handlers.detection.targets import Assign, Assignment, Targets, collate
from schemas.enums import ExpansionDataClass
from schemas.result import SkippedImage

#: Batches that are ready or being made while a step runs.
_AHEAD = 3


class ImageStore:
    """Decoded images, no larger than training needs; kept in memory up to a number of bytes, read again beyond it."""

    def __init__(self, input_size: int, max_bytes: int) -> None:
        self._input_size = input_size
        self._room = max_bytes
        self._kept: dict[int, tuple[Image, Boxes]] = {}
        #: (width, height) of the images whose size is not recorded.
        self._sizes: dict[int, tuple[int, int]] = {}
        #: Of every image that was read; None where it has none.
        self.fingerprints: dict[int, bytes | None] = {}
        self._lock = threading.Lock()

    def get(self, sample: Sample) -> tuple[Image, Boxes]:
        """The image and its boxes, both shrunk alike if it is large. Do not write to it. Raises ImageError."""
        kept = self._kept.get(sample.id)
        if kept is not None:
            return kept
        # Twice the input leaves a crop of half the sides at full resolution.
        image, boxes = read_sample(sample)
        size = (image.shape[1], image.shape[0])
        if sample.id not in self.fingerprints:
            # Of the whole image, as a test takes it.
            self.fingerprints[sample.id] = fingerprint(image)
        image, boxes = shrink(image, boxes, 2 * self._input_size)
        with self._lock:
            if not (sample.width and sample.height):
                self._sizes[sample.id] = size
            if image.nbytes <= self._room and sample.id not in self._kept:
                self._room -= image.nbytes
                self._kept[sample.id] = (image, boxes)
        return image, boxes

    def size(self, sample: Sample) -> tuple[int, int]:
        """(width, height) of the image as it is labelled; its size must be recorded, or the image have been read."""
        return self._sizes.get(sample.id, (sample.width, sample.height))

    def usable(self, samples: Sequence[Sample], pool: ThreadPoolExecutor) -> tuple[list[Sample], list[SkippedImage]]:
        """`samples` whose image can be read, and the others with the reason. Reads every one."""

        def problem(sample: Sample) -> str | None:
            try:
                self.get(sample)
            except ImageError as error:
                return str(error)
            return None

        good: list[Sample] = []
        bad: list[SkippedImage] = []
        for sample, reason in zip(samples, pool.map(problem, samples), strict=True):
            if reason is None:
                good.append(sample)
            else:
                bad.append(SkippedImage(img_id=sample.mongodb_id, reason=reason))
        return good, bad


class Batch(NamedTuple):
    """One rank's share of one iteration, or as much of it as fits into memory at once."""

    #: uint8 [N, S, S, 3].
    images: Tensor
    targets: Targets
    #: Hex ids of the images.
    mongodb_ids: tuple[str, ...]

    def to(self, device: torch.device) -> "Batch":
        """The same on `device`; the copy to a GPU is not waited for."""
        if device.type == "cpu":
            return self

        def moved(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return Batch(moved(self.images), Targets(*map(moved, self.targets)), self.mongodb_ids)


@dataclass(frozen=True)
class BatchPlan:
    """What decides the batches of a training."""

    seed: int
    #: Images in an iteration over all ranks.
    batch_size: int
    #: Positions in an iteration that this rank prepares.
    share: range
    #: Batches that the share is divided into, whose gradients are added up.
    parts: int
    operations: tuple[ExpansionDataClass, ...]
    input_size: int


class Batches:
    """The batches of one rank. Every image is seen once before any is seen again."""

    def __init__(
        self, plan: BatchPlan, samples: Sequence[Sample], store: ImageStore, assign: Assign, predictions: int
    ) -> None:
        """`assign`: which of a network's `predictions` for an image answer for which object."""
        self._plan = plan
        self._samples = samples
        self._store = store
        self._assign = assign
        self._predictions = predictions
        #: Images found unreadable after all (a file that went away), by mongodb id.
        self.lost: dict[str, SkippedImage] = {}
        self._epoch_order = lru_cache(maxsize=4)(self._shuffled)

    def iterate(self, first: int, last: int, pool: ThreadPoolExecutor) -> Iterator[list[Batch]]:
        """The batches of the iterations `first` … `last`, counted from 1, in their parts. Raises DataError."""
        ahead: deque[list[Future[tuple[str, Image, Assignment]]]] = deque()
        following = iter(range(first, last + 1))
        try:
            while True:
                while len(ahead) < _AHEAD and (iteration := next(following, None)) is not None:
                    ahead.append([pool.submit(self._prepare, iteration, k) for k in self._plan.share])
                if not ahead:
                    return
                prepared = [future.result() for future in ahead.popleft()]
                count, parts = len(prepared), self._plan.parts
                bounds = [part * count // parts for part in range(parts + 1)]
                yield [self._collate(prepared[begin:end]) for begin, end in pairwise(bounds)]
        finally:
            for future in (future for batch in ahead for future in batch):
                future.cancel()

    def _shuffled(self, epoch: int) -> list[int]:
        order: list[int] = np.random.default_rng([self._plan.seed, epoch]).permutation(len(self._samples)).tolist()
        return order

    def _sample_at(self, position: int) -> tuple[Sample, Image, Boxes]:
        """The image at `position` in the endless row of shuffled epochs; if it cannot be read, the next that can."""
        for step in range(len(self._samples)):
            epoch, place = divmod(position + step, len(self._samples))
            sample = self._samples[self._epoch_order(epoch)[place]]
            try:
                return sample, *self._store.get(sample)
            except ImageError as error:
                self.lost[sample.mongodb_id] = SkippedImage(img_id=sample.mongodb_id, reason=str(error))
        raise DataError("none of the images can be read any more")

    def _prepare(self, iteration: int, k: int) -> tuple[str, Image, Assignment]:
        plan = self._plan
        sample, image, boxes = self._sample_at((iteration - 1) * plan.batch_size + k)
        random = np.random.default_rng([plan.seed, iteration, k])
        image, boxes = vary(image, boxes, plan.operations, random, plan.input_size)
        fractions = boxes.moved(boxes.xyxy / np.float32(plan.input_size))
        return sample.mongodb_id, image, self._assign(fractions)

    def _collate(self, prepared: list[tuple[str, Image, Assignment]]) -> Batch:
        return Batch(
            torch.from_numpy(np.stack([image for _, image, _ in prepared])),
            collate([assignment for _, _, assignment in prepared], self._predictions),
            tuple(mongodb_id for mongodb_id, _, _ in prepared),
        )
