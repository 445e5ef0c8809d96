"""Copies of an image have nearly its fingerprint, other images have not; and a model's file can carry them."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from handlers.detection.data import read_image
from handlers.detection.fingerprints import MAX_REMEMBERED, Fingerprints, collected, decoded, encoded, fingerprint
from handlers.detection.leaks import MAX_DISTANCE, leaks


def photographs(folder: Path, count: int | None = None) -> dict[str, np.ndarray]:
    paths = sorted((folder / "images").iterdir())[:count]
    return {path.name: read_image(path) for path in paths}


def distance(one: bytes | None, other: bytes | None) -> int:
    assert one is not None
    assert other is not None
    return sum((a ^ b).bit_count() for a, b in zip(one, other, strict=True))


def recompressed(image: np.ndarray) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR)


def smaller(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, None, fx=0.4, fy=0.4, interpolation=cv2.INTER_AREA)


def larger(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, None, fx=1.5, fy=1.5, interpolation=cv2.INTER_CUBIC)


def brighter(image: np.ndarray) -> np.ndarray:
    return cv2.add(image, (20, 20, 20, 0))


def darker(image: np.ndarray) -> np.ndarray:
    return cv2.subtract(image, (20, 20, 20, 0))


@pytest.mark.parametrize("change", [recompressed, smaller, larger, brighter, darker])
@pytest.mark.parametrize("dataset", ["bccd", "dice"])
def test_copies_are_found(shared_datasets: Path, dataset: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Stored again, of another size, a little brighter or darker: of 40 photographs, at least 38."""
    images = photographs(shared_datasets / dataset, 40).values()
    distances = [distance(fingerprint(image), fingerprint(np.ascontiguousarray(change(image)))) for image in images]
    assert sum(bits <= MAX_DISTANCE for bits in distances) >= 38, distances


@pytest.mark.parametrize(
    ("dataset", "pairs"),
    [
        # One pair, and it is no false alarm: the same field of view, taken twice with another focus.
        ("bccd", {("BloodImage_00037.jpg", "BloodImage_00038.jpg")}),
        # A camera that stands still over a table, with one or two dice at much the same place.
        (
            "dice",
            {
                ("IMG_20191208_112645.jpg", "IMG_20191208_112714.jpg"),
                ("IMG_20191208_112704.jpg", "IMG_20191208_112714.jpg"),
                ("IMG_20191208_112600.jpg", "IMG_20191208_112645.jpg"),
                ("IMG_20191208_112605.jpg", "IMG_20191208_112704.jpg"),
            },
        ),
    ],
)
def test_other_images_are_not(shared_datasets: Path, dataset: str, pairs: set[tuple[str, str]]) -> None:
    """Of all pairs of frames: 66,066 of blood cells, and 31,125 of dice."""
    images = photographs(shared_datasets / dataset)
    known = collected([(name, fingerprint(image)) for name, image in images.items()])
    assert len(known) == len(images)
    words = known.bits.view(np.uint64)
    bits = np.bitwise_count(words[:, None] ^ words[None]).sum(axis=2)
    alike = zip(*np.nonzero(np.triu(bits <= MAX_DISTANCE, 1)), strict=True)
    assert {(known.ids[one], known.ids[other]) for one, other in alike} == pairs


@pytest.mark.parametrize("shape", [(480, 640), (97, 61), (61, 1201), (16, 16)])
def test_the_cells_are_those_of_opencv(shape: tuple[int, int]) -> None:
    """Shrunk by area, to the bit: so whoever has OpenCV can compute the same."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), min(shape) / 8, borderType=cv2.BORDER_REFLECT)
    image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    across, down = (cv2.resize(grey, size, interpolation=cv2.INTER_AREA) for size in ((9, 8), (8, 9)))
    bits = np.concatenate([(across[:, 1:] > across[:, :-1]).ravel(), (down[1:] > down[:-1]).ravel()])
    assert distance(fingerprint(image), np.packbits(bits).tobytes()) <= 1


def test_a_large_bright_image_has_that_of_its_smaller_copy() -> None:
    """The sum of its pixels is more than 32 bits hold."""
    rows, columns = np.mgrid[0:1:3000j, 0:1:4000j]
    grey = (200 + 55 * np.sin(7 * columns) * np.cos(5 * rows)).astype(np.uint8)
    large = np.repeat(grey[..., None], 3, axis=2)
    assert int(grey.sum()) > 2**31
    assert distance(fingerprint(large), fingerprint(smaller(large))) <= MAX_DISTANCE


def test_a_flipped_image_is_another(shared_datasets: Path) -> None:
    """As the docs say."""
    [image] = photographs(shared_datasets / "bccd", 1).values()
    assert distance(fingerprint(image), fingerprint(np.ascontiguousarray(image[:, ::-1]))) > 4 * MAX_DISTANCE


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (3, 7), (480, 640)])
def test_images_without_structure_have_none(shape: tuple[int, int]) -> None:
    """Their bits would be noise, and each would be found to be all others. Images of any size are no error."""
    random = np.random.default_rng(0)
    assert fingerprint(np.full((*shape, 3), 130, np.uint8)) is None
    assert fingerprint(np.full((*shape, 3), 255, np.uint8)) is None
    flecked = random.integers(0, 255, (*shape, 3)).astype(np.uint8)
    assert fingerprint(flecked) is None or len(fingerprint(flecked) or b"") == 16


def test_a_file_carries_them() -> None:
    """28 bytes each as base64; ids that are no ObjectIds are forgotten, and their images are not."""
    known = collected([("0a" * 12, bytes(range(16))), ("odd", bytes(16)), ("0b" * 12, None)])
    text = encoded(known)
    assert len(text) == -(-2 * 28 // 3) * 4
    again = decoded(text)
    assert again is not None
    assert again.ids == ("0a" * 12, "")
    assert np.array_equal(again.bits, known.bits)
    assert encoded(collected([])) == ""
    empty = decoded("")
    assert empty is not None
    assert (len(empty), empty.bits.shape) == (0, (0, 16))


@pytest.mark.parametrize("text", ["x", "AAAA", "é", "A" * 39, "{}"])
def test_what_is_none_is_none(text: str) -> None:
    assert decoded(text) is None


def test_a_file_does_not_grow_without_end() -> None:
    """Of more training images, so many are remembered, evenly spread."""
    count = 2 * MAX_REMEMBERED
    bits = np.arange(2 * count, dtype=np.uint64).reshape(count, 2).view(np.uint8)
    again = decoded(encoded(Fingerprints(("",) * count, bits)))
    assert again is not None
    assert len(again) == MAX_REMEMBERED
    assert np.array_equal(again.bits, bits[::2])
    assert leaks(Fingerprints(("x",), bits[-2:-1]), again, in_training=False).count == 1
