"""Data expansion: boxes move exactly with the pixels, every operation exists, and a random state decides all of it."""

from pathlib import Path

import numpy as np
import pytest

from handlers.detection.augment import expand
from handlers.detection.boxes import Boxes, make_boxes
from handlers.detection.geometric import GEOMETRIC, MIN_VISIBLE, Geometric, reframe
from handlers.detection.photometric import PHOTOMETRIC, relight
from handlers.detection.train import operations
from schemas.enums import ExpansionDataClass
from schemas.params import ParamClass

WIDTH, HEIGHT = 97, 61
#: x, y, width, height of each object; object i is painted in grey 40 (i + 1), so that it can be found again.
OBJECTS = [(5, 7, 20, 10), (60, 3, 30, 9), (40, 30, 13, 26), (8, 40, 9, 9)]


def picture() -> tuple[np.ndarray, Boxes]:
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for index, (x, y, w, h) in enumerate(OBJECTS):
        image[y : y + h, x : x + w] = 40 * (index + 1)
    return image, make_boxes([(tuple(map(float, box)), index + 1, False) for index, box in enumerate(OBJECTS)])


def painted(image: np.ndarray, class_id: int) -> tuple[int, int, int, int] | None:
    """The corners of what is painted in the grey of `class_id`."""
    rows, columns = np.nonzero((image == 40 * class_id).all(axis=2))
    if not len(rows):
        return None
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize(
    "move",
    [pytest.param(reframe, id="reframe")]
    + [
        pytest.param(move, id=operation.name)
        for operation, move in GEOMETRIC.items()
        if operation != ExpansionDataClass.ROTATE_SMALL
    ],
)
def test_boxes_move_exactly_with_the_pixels(move: Geometric) -> None:
    """After each operation on whole pixels a box has the very corners of what is painted; none is lost or invented."""
    for seed in range(50):
        image, boxes = picture()
        changed, moved = move(image, boxes, np.random.default_rng(seed))
        seen = dict(zip(moved.class_ids.tolist(), moved.xyxy.tolist(), strict=True))
        for class_id, (_, _, w, h) in enumerate(OBJECTS, 1):
            corners = painted(changed, class_id)
            shown = 0.0 if corners is None else (corners[2] - corners[0]) * (corners[3] - corners[1]) / (w * h)
            assert (class_id in seen) == (shown >= MIN_VISIBLE)
            if class_id in seen:
                assert tuple(seen[class_id]) == corners


@pytest.mark.parametrize(
    ("operation", "corner"),
    [
        ("HOR_FLIPE", "right top"),
        ("VER_FLIPE", "left bottom"),
        ("ROTATE_90", "right top"),
        ("ROTATE_180", "right bottom"),
        ("ROTATE_270", "left bottom"),
    ],
)
def test_flips_and_turns_go_the_way_they_are_named(operation: str, corner: str) -> None:
    """A turn is clockwise, a horizontal flip swaps left and right."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[:5, :5] = 255
    changed, _ = GEOMETRIC[ExpansionDataClass[operation]](image, make_boxes([]), np.random.default_rng(0))
    height, width = changed.shape[:2]
    corners = {"left top": (0, 0), "right top": (0, width - 1), "left bottom": (height - 1, 0)}
    corners["right bottom"] = (height - 1, width - 1)
    assert [name for name, at in corners.items() if changed[at][0] == 255] == [corner]


def test_every_operation_exists_and_changes_something() -> None:
    """No member of the enumeration is accepted and then ignored."""
    assert set(GEOMETRIC) | set(PHOTOMETRIC) == set(ExpansionDataClass)
    noise = np.random.default_rng(1).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    boxes = make_boxes([((10.0, 10.0, 30.0, 30.0), 1, False)])
    for operation, geometric in GEOMETRIC.items():
        changed, _ = geometric(noise, boxes, np.random.default_rng(2))
        assert changed.shape != noise.shape or (changed != noise).any(), operation.name
    for operation, photometric in PHOTOMETRIC.items():
        changed = photometric(noise, np.random.default_rng(2))
        assert changed.shape == noise.shape, operation.name
        assert changed.dtype == np.uint8, operation.name
        assert (changed != noise).any(), operation.name


def test_every_operation_is_documented() -> None:
    """With a line of its own in a table of docs/training.md, beside the picture."""
    text = (Path(__file__).parents[3] / "docs/training.md").read_text()
    tables = " ".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    assert [operation.name for operation in ExpansionDataClass if f"`{operation.name}`" not in tables] == []


def test_photometric_operations_keep_the_order_of_colours() -> None:
    """A red image stays red: no operation swaps channels on its way through OpenCV."""
    red = np.full((32, 32, 3), (180, 60, 40), np.uint8)
    for operation, photometric in PHOTOMETRIC.items():
        if operation != ExpansionDataClass.GRAYSCALE:
            mean = photometric(red, np.random.default_rng(3)).mean(axis=(0, 1))
            assert mean.argmax() == 0, operation.name


def test_expansion_is_decided_by_its_random_state_alone() -> None:
    """The same state gives the same image and boxes, whatever order the operations are named in; another, another."""
    everything = list(ExpansionDataClass)
    first = expand(*picture(), everything, np.random.default_rng([0, 1, 2]), 64)
    again = expand(*picture(), everything[::-1], np.random.default_rng([0, 1, 2]), 64)
    other = expand(*picture(), everything, np.random.default_rng([0, 1, 3]), 64)
    assert first[0].shape == (64, 64, 3)
    assert (first[0] == again[0]).all()
    assert (first[1].xyxy == again[1].xyxy).all()
    assert (first[0] != other[0]).any()


def test_each_operation_is_applied_half_of_the_time() -> None:
    """With probability one half, and not at all where it is not named."""
    image, boxes = picture()
    plain, plain_boxes = expand(image, boxes, [], np.random.default_rng(0), 64)
    assert np.allclose(plain_boxes.xyxy, boxes.xyxy * ([64 / WIDTH, 64 / HEIGHT] * 2))
    flipped = [
        (expand(image, boxes, [ExpansionDataClass.HOR_FLIPE], np.random.default_rng(i), 64)[0] != plain).any()
        for i in range(200)
    ]
    assert 70 < sum(flipped) < 130


def test_a_training_mirrors_unless_told_otherwise() -> None:
    """As if `HOR_FLIPE` were named, and with what is named."""
    named = ParamClass("m", [ExpansionDataClass.VER_FLIPE])
    assert set(operations(named, True)) == {ExpansionDataClass.VER_FLIPE, ExpansionDataClass.HOR_FLIPE}
    assert operations(named, False) == (ExpansionDataClass.VER_FLIPE,)


def test_images_without_boxes_are_expanded_too() -> None:
    """They are negatives; no operation needs a box."""
    image, _ = picture()
    for seed in range(20):
        changed, boxes = expand(image, make_boxes([]), list(ExpansionDataClass), np.random.default_rng(seed), 64)
        assert changed.shape == (64, 64, 3)
        assert len(boxes) == 0


def test_every_training_image_is_framed_anew() -> None:
    """From six tenths of each side to four tenths more; something of what there was is always seen."""
    shares = []
    for seed in range(200):
        image, boxes = picture()
        framed, seen = reframe(image, boxes, np.random.default_rng(seed))
        shares.append(framed.shape[1] / WIDTH)
        assert len(seen) > 0
    assert 0.5 < min(shares) < 0.65
    assert 1.35 < max(shares) < 1.65


def test_every_training_image_is_lit_anew() -> None:
    """Brighter or darker by a third at most, with more or less colour; a grey one stays grey, a black one black."""
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    means = [relight(image, np.random.default_rng(seed)).mean() for seed in range(100)]
    assert 0.75 * image.mean() < min(means) < 0.9 * image.mean()
    assert 1.1 * image.mean() < max(means) < 1.25 * image.mean()
    grey = np.repeat(image[..., :1], 3, axis=2)
    lit = relight(grey, np.random.default_rng(0))
    assert (lit == lit[..., :1]).all()
    assert (lit != grey).any()
    assert not relight(np.zeros_like(image), np.random.default_rng(0)).any()
    # What is faint on white paper can be seen in whatever light.
    paper = np.full((64, 64, 3), 245, np.uint8)
    paper[20:26, 20:26] = 225
    seen = [relight(paper, np.random.default_rng(seed)).astype(int) for seed in range(100)]
    assert min(one[40, 40, 0] - one[22, 22, 0] for one in seen) > 5
