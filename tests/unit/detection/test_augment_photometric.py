"""Operations that leave boxes as they are: they change values, and neither size nor place nor what comes in."""

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handlers.detection.augment import expand
from handlers.detection.boxes import Image, make_boxes
from handlers.detection.photometric import PHOTOMETRIC
from schemas.enums import ExpansionDataClass as Op

EVERY = tuple(PHOTOMETRIC)
#: However slow: what is to fail is the property.
on_any_machine = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.sampled_from([(1, 1), (1, 500), (500, 1), (3, 499)])


def change(operation: Op, image: Image, seed: int = 0) -> Image:
    return PHOTOMETRIC[operation](image, np.random.default_rng(seed))


@st.composite
def images(draw: st.DrawFn) -> Image:
    """Noise, and images of nothing but black, white or one colour."""
    height, width = draw(SIZES)
    random = np.random.default_rng(draw(SEEDS))
    colours = draw(st.sampled_from(["noise", "black", "white", "one"]))
    if colours == "noise":
        return random.integers(0, 256, (height, width, 3), np.uint8)
    fill = {"black": 0, "white": 255, "one": random.integers(0, 256, 3, np.uint8)}[colours]
    return np.full((height, width, 3), fill, np.uint8)


@pytest.mark.parametrize("operation", EVERY)
@on_any_machine
@given(image=images(), seed=SEEDS)
def test_size_and_type_stay_and_the_random_state_decides(operation: Op, image: Image, seed: int) -> None:
    """On one pixel and on long strips too; what comes in is not written into."""
    before = image.copy()
    changed = change(operation, image, seed)
    assert (changed.shape, changed.dtype) == (image.shape, np.uint8)
    assert (image == before).all()
    assert changed.tobytes() == change(operation, image, seed).tobytes()


@on_any_machine
@given(seed=SEEDS, operations=st.lists(st.sampled_from(EVERY)))
def test_boxes_stay(seed: int, operations: list[Op]) -> None:
    """Not one coordinate, class or crowd changes, whatever is named."""
    image = np.random.default_rng(seed).integers(0, 256, (50, 70, 3), np.uint8)
    boxes = make_boxes([((3.5, 4.25, 20.0, 30.0), 2, False), ((0.0, 0.0, 70.0, 50.0), 1, True)])
    _, plain = expand(image, boxes, [], np.random.default_rng(seed), 64)
    _, moved = expand(image, boxes, operations, np.random.default_rng(seed), 64)
    assert moved.xyxy.tobytes() == plain.xyxy.tobytes()
    assert moved.class_ids.tolist() == [2, 1]
    assert moved.crowd.tolist() == [False, True]


@pytest.mark.parametrize("operation", [op for op in EVERY if op is not Op.GAUSSIAN_NOISE])
@on_any_machine
@given(level=st.integers(0, 255), seed=SEEDS)
def test_no_colour_comes_from_nowhere(operation: Op, level: int, seed: int) -> None:
    """A grey image stays grey, to a rounding: industrial and medical ones often are. Noise has colours of its own."""
    image = np.full((16, 16, 3), level, np.uint8)
    image[4:12, 4:12] = 255 - level
    changed = change(operation, image, seed).astype(int)
    assert (changed.max(axis=2) - changed.min(axis=2)).max() <= 2


@pytest.mark.parametrize("operation", EVERY)
def test_objects_stay_where_they_are(operation: Op) -> None:
    """The middle of a bright disc does not move by a pixel: neither lens nor light shifts what a box encloses."""
    image = np.full((64, 64, 3), 40, np.uint8)
    cv2.circle(image, (24, 36), 10, (200, 200, 200), -1)
    for seed in range(50):
        bright = change(operation, image, seed).mean(axis=2)[20:53, 8:41]
        shown = bright > (bright.min() + bright.max()) / 2
        rows, columns = np.nonzero(shown)
        assert abs(rows.mean() - 16) < 1, seed
        assert abs(columns.mean() - 16) < 1, seed


@pytest.mark.parametrize("operation", [op for op in EVERY if op is not Op.CLAHE])
def test_operations_are_fair(operation: Op) -> None:
    """Over many images a middle grey comes out neither brighter nor darker: only its spread is learnt.

    CLAHE apart, which brightens an even grey: it spreads what values there are.
    """
    image = np.full((24, 24, 3), 128, np.uint8)
    means = [change(operation, image, seed).mean() for seed in range(400)]
    # The brightness of one image spreads by 30, so the mean of 400 by 1.5.
    assert abs(np.mean(means) - 128) < (4.5 if operation in (Op.BRIGHTNESS, Op.GAMMA) else 0.3)


def test_noise_does_not_darken() -> None:
    """Values are rounded; cut off instead, each image would lose half a level."""
    image = np.full((200, 200, 3), 128, np.uint8)
    assert abs(change(Op.GAUSSIAN_NOISE, image, 1).mean() - 128) < 0.1


@on_any_machine
@given(seed=SEEDS)
def test_gamma_keeps_black_white_and_order(seed: int) -> None:
    image = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    changed = change(Op.GAMMA, image, seed)[0, :, 0].astype(int)
    assert (changed[0], changed[255]) == (0, 255)
    assert (np.diff(changed) >= 0).all()


@on_any_machine
@given(seed=SEEDS)
def test_uneven_light_is_a_third_at_most(seed: int) -> None:
    """And as much brighter on one side as darker on the other."""
    changed = change(Op.UNEVEN_LIGHT, np.full((40, 60, 3), 120, np.uint8), seed).astype(float)
    assert 0.7 * 120 - 1 <= changed.min() < 120 < changed.max() <= 1.3 * 120 + 1
    assert abs(changed.min() + changed.max() - 240) < 3


@on_any_machine
@given(seed=SEEDS)
def test_motion_blur_draws_out_evenly_to_both_sides(seed: int) -> None:
    """A point becomes a line through its own place, no longer than it may be, and none of its light is lost."""
    image = np.zeros((21, 21, 3), np.uint8)
    image[10, 10] = 255
    line = change(Op.MOTION_BLUR, image, seed)[..., 0].astype(float)
    rows, columns = np.nonzero(line)
    # Each value is rounded, which in sum is up to half a level for each pixel.
    assert abs(line.sum() - 255) <= len(rows) / 2 + 1
    assert np.abs(line - line[::-1, ::-1]).max() <= 1
    assert max(rows.max() - rows.min(), columns.max() - columns.min()) <= 10
