"""Images that are measured on and, nearly the same, were trained on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from handlers.detection.fingerprints import Fingerprints
from schemas.result import MAX_EXAMPLES, Leaks, NearIdentical

#: Of 128 bits, those that may differ between near-identical images. docs/results.md has what was measured.
MAX_DISTANCE = 6
#: Pairs that are compared at most, 350 million of which take a second: of more, only some of the measured images are.
MAX_PAIRS = 5_000_000_000

#: Pairs at once: their distances stay in the processor's cache.
_BLOCK = 500_000


@dataclass(frozen=True)
class _Nearest:
    """For each measured image the training image that is most alike: its row, and the bits that differ."""

    rows: NDArray[np.int64]
    distances: NDArray[np.int64]


def leaks(measured: Fingerprints, training: Fingerprints, *, in_training: bool) -> Leaks:
    """Compare every measured image with every training image: no more than `MAX_DISTANCE` bits may differ.

    Of more than `MAX_PAIRS` pairs as many measured images are compared as fit, evenly spread. `in_training`: count
    those of `training` too that have the fingerprint of an earlier one.
    """
    count = min(len(measured), MAX_PAIRS // max(len(training), 1))
    chosen = np.arange(count) * len(measured) // max(count, 1)
    nearest = _nearest(measured.bits[chosen], training.bits)
    order = np.argsort(nearest.distances, kind="stable")
    found = order[nearest.distances[order] <= MAX_DISTANCE]
    examples = tuple(
        NearIdentical(
            img_id=measured.ids[chosen[at]],
            other_img_id=training.ids[nearest.rows[at]],
            distance=int(nearest.distances[at]),
        )
        for at in found[:MAX_EXAMPLES].tolist()
    )
    return Leaks(
        count=len(found),
        compared=count if len(training) else 0,
        training_images=len(training),
        duplicates_in_training=len(training) - len(np.unique(training.bits, axis=0)) if in_training else None,
        examples=examples,
    )


def leaks_note(found: Leaks, what: str) -> str:
    """What a reader of the result should know of it; `what` the images are that were measured."""
    return (
        f"{found.count} of {found.compared} {what} images are nearly identical to images that were trained on: "
        "what is measured on them is too good (see `leaks` of the result)"
    )


def _nearest(some: NDArray[np.uint8], others: NDArray[np.uint8]) -> _Nearest:
    rows, distances = np.zeros(len(some), np.int64), np.full(len(some), 8 * some.shape[1], np.int64)
    if not len(others):
        return _Nearest(rows, distances)
    # Two words each, so that a pair is two steps of XOR and counting bits.
    ones, twos = (np.ascontiguousarray(bits).view(np.uint64) for bits in (some, others))
    width = min(len(twos), _BLOCK)
    height = max(_BLOCK // width, 1)
    for top in range(0, len(ones), height):
        part = ones[top : top + height]
        for left in range(0, len(twos), width):
            block = twos[left : left + width]
            bits = np.bitwise_count(part[:, None, 0] ^ block[None, :, 0])
            bits += np.bitwise_count(part[:, None, 1] ^ block[None, :, 1])
            at = bits.argmin(axis=1)
            least = bits[np.arange(len(part)), at]
            better = least < distances[top : top + height]
            rows[top : top + height][better] = left + at[better]
            distances[top : top + height][better] = least[better]
    return _Nearest(rows, distances)
