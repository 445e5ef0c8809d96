"""Fingerprints of images: near-identical images have near-identical ones, whatever their size and compression.

A fingerprint is 128 bits, 16 bytes: the difference hash of Krawetz 2013 ("Kind of Like That",
https://hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html) in both directions. The image is made grey
(`cv2.COLOR_RGB2GRAY`) and shrunk by area (as by `cv2.INTER_AREA`) to 9 x 8 and to 8 x 9 pixels; of the first a bit says
whether a pixel is brighter than the one to its left, of the second whether it is brighter than the one above it.
Flipped and turned images have others, and so do most that were cropped by more than a hundredth of each side.
"""

import base64
import binascii
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from handlers.detection.boxes import Image

Grid = NDArray[np.float64]

#: Bytes of a fingerprint.
BYTES = 16
#: A model remembers at most so many training images, evenly spread over all: 28 bytes each, and a third more as text.
MAX_REMEMBERED = 100_000

_CELLS = 8
#: Grey levels, of 255, by which the shrunk image must vary (standard deviation): of an even ground the bits are noise.
_LEAST_CONTRAST = 2.0
_ID_BYTES = 12
#: Pixels whose sum is below 2^31.
_MOST_SUMMED = 2**31 // 256


def fingerprint(image: Image) -> bytes | None:
    """16 bytes of `image` (uint8 [height, width, 3], RGB); None where it has next to no structure to tell it by."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    while grey.size > _MOST_SUMMED:
        grey = cv2.resize(grey, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    sums = cv2.integral(grey)
    across, down = _means(sums, _CELLS, _CELLS + 1), _means(sums, _CELLS + 1, _CELLS)
    if down.std() < _LEAST_CONTRAST:
        return None
    bits = np.concatenate([(across[:, 1:] > across[:, :-1]).ravel(), (down[1:] > down[:-1]).ravel()])
    return np.packbits(bits).tobytes()


def _means(sums: NDArray[Any], rows: int, columns: int) -> Grid:
    """The means of `rows` x `columns` cells of the image that has these `sums` (`cv2.integral`), rounded.

    What `cv2.resize` with INTER_AREA gives, to the bit, in a seventh of its time: between the pixels sums grow in a
    straight line, so that those of any rectangle can be read off at its corners.
    """
    height, width = sums.shape[0] - 1, sums.shape[1] - 1
    corners = _between(_between(sums, rows).T, columns).T
    means = np.diff(np.diff(corners, axis=0), axis=1) * (rows * columns / (height * width))
    return np.asarray(np.rint(means), np.float64)


def _between(sums: NDArray[Any], cells: int) -> Grid:
    """The rows of `sums` at the edges of so many cells, which may lie between two."""
    last = len(sums) - 1
    edges = np.linspace(0, last, cells + 1)
    before = np.minimum(edges.astype(np.int64), last - 1)
    share = (edges - before)[:, None]
    return np.asarray(sums[before] * (1 - share) + sums[before + 1] * share, np.float64)


@dataclass(frozen=True)
class Fingerprints:
    """Those of many images, with the images' ids."""

    #: Hex ids in IMG_INFO; empty where it is unknown.
    ids: tuple[str, ...]
    #: uint8 [len(ids), 16].
    bits: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.ids)


def collected(images: Sequence[tuple[str, bytes | None]]) -> Fingerprints:
    """Of (id, fingerprint) of each image; those without a fingerprint are left out."""
    known = [(name, bits) for name, bits in images if bits is not None]
    joined = b"".join(bits for _, bits in known)
    return Fingerprints(tuple(name for name, _ in known), np.frombuffer(joined, np.uint8).reshape(-1, BYTES))


def encoded(fingerprints: Fingerprints) -> str:
    """As text: base64 of 16 bytes of fingerprint and 12 of id for each image, `MAX_REMEMBERED` of them at most."""
    count = min(len(fingerprints), MAX_REMEMBERED)
    rows = [index * len(fingerprints) // count for index in range(count)]
    # An id that is no ObjectId is left out: an image is compared without it all the same.
    parts = (fingerprints.bits[row].tobytes() + _id_bytes(fingerprints.ids[row]) for row in rows)
    return base64.b64encode(b"".join(parts)).decode("ascii")


def decoded(text: str) -> Fingerprints | None:
    """The inverse of `encoded`; None for a text that is none."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    if len(data) % (BYTES + _ID_BYTES):
        return None
    rows = np.frombuffer(data, np.uint8).reshape(-1, BYTES + _ID_BYTES)[: 2 * MAX_REMEMBERED]
    ids = tuple(row.tobytes().hex() if row.any() else "" for row in rows[:, BYTES:])
    return Fingerprints(ids, np.ascontiguousarray(rows[:, :BYTES]))


def _id_bytes(name: str) -> bytes:
    good = len(name) == 2 * _ID_BYTES and set(name) <= set(string.hexdigits)
    return bytes.fromhex(name) if good else bytes(_ID_BYTES)
