"""Operations that move boxes: held against masks that are drawn, moved by the same operation, and measured again."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from handlers.detection.augment import expand
from handlers.detection.boxes import MIN_SIDE, Boxes, Image, make_boxes
from handlers.detection.geometric import GEOMETRIC, MIN_VISIBLE
from schemas.enums import ExpansionDataClass as Op

FLIPS = (Op.HOR_FLIPE, Op.VER_FLIPE, Op.ROTATE_180)
TURNS = (Op.ROTATE_90, Op.ROTATE_270)
WINDOWS = (Op.RANDOM_CROP, Op.ZOOM_OUT, Op.TRANSLATE, Op.SCALE)
EXACT = (*FLIPS, *TURNS, *WINDOWS)
EVERY = tuple(GEOMETRIC)
#: What a mask is drawn with; the mean colour around an image is darker as long as the mask covers less than half.
INK = 255

#: However slow: what is to fail is the property.
on_any_machine = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
SEEDS = st.integers(0, 2**32 - 1)
#: Height and width: from one pixel to 300 times as long as wide.
SIZES = st.tuples(st.integers(1, 60), st.integers(1, 60)) | st.sampled_from([(1, 1), (1, 300), (300, 1), (2, 299)])


def move(operation: Op, image: Image, boxes: Boxes, seed: int = 0) -> tuple[Image, Boxes]:
    return GEOMETRIC[operation](image, boxes, np.random.default_rng(seed))


def corners(mask: Image, least: int = INK) -> tuple[int, int, int, int] | None:
    """The tight box of the pixels of `mask` that are at least so bright."""
    rows, columns = np.nonzero(mask[..., 0] >= least)
    return (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else None


def one_box(xyxy: tuple[int, int, int, int]) -> Boxes:
    left, top, right, bottom = map(float, xyxy)
    return make_boxes([((left, top, right - left, bottom - top), 1, False)])


def noise(height: int, width: int, seed: int) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@st.composite
def rectangles(draw: st.DrawFn, height: int, width: int) -> tuple[int, int, int, int]:
    """Whole corners inside the image."""
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))


@st.composite
def blobs(draw: st.DrawFn) -> Image:
    """A mask of any form, in pieces too, that is not empty and leaves most of the image free."""
    height, width = draw(SIZES)
    mask = np.zeros((height, width, 3), np.uint8)
    left, top, right, bottom = draw(rectangles(height, width))
    picked = np.random.default_rng(draw(SEEDS)).random((bottom - top, right - left)) < draw(st.floats(0.05, 1))
    picked.flat[draw(st.integers(0, picked.size - 1))] = True
    mask[top:bottom, left:right][picked] = INK
    return mask


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Image, Boxes]:
    """An image with up to five boxes inside it, fractions of pixels and crowds among them."""
    height, width = draw(SIZES)
    rows = []
    for _ in range(draw(st.integers(0, 5))):
        x, y = draw(st.floats(0, width - 1)), draw(st.floats(0, height - 1))
        size = draw(st.floats(MIN_SIDE, max(width - x, MIN_SIDE))), draw(st.floats(MIN_SIDE, max(height - y, MIN_SIDE)))
        rows.append(((x, y, *size), draw(st.integers(1, 3)), draw(st.booleans())))
    return noise(height, width, draw(SEEDS)), make_boxes(rows).clipped(width, height)


@pytest.mark.parametrize("operation", FLIPS)
@on_any_machine
@given(scene=scenes())
def test_flips_are_involutions(operation: Op, scene: tuple[Image, Boxes]) -> None:
    """Twice is never: every pixel, and every box to the rounding of its numbers."""
    image, boxes = scene
    again, moved = move(operation, *move(operation, image, boxes))
    assert (again == image).all()
    assert np.allclose(moved.xyxy, boxes.xyxy, atol=1e-3)


@pytest.mark.parametrize("operation", TURNS)
@on_any_machine
@given(scene=scenes())
def test_four_quarter_turns_are_none(operation: Op, scene: tuple[Image, Boxes]) -> None:
    """And two are the half turn."""
    half = move(operation, *move(operation, *scene))
    expected = move(Op.ROTATE_180, *scene)
    assert (half[0] == expected[0]).all()
    assert np.allclose(half[1].xyxy, expected[1].xyxy, atol=1e-3)
    whole = move(operation, *move(operation, *half))
    assert (whole[0] == scene[0]).all()
    assert np.allclose(whole[1].xyxy, scene[1].xyxy, atol=1e-3)


@on_any_machine
@given(scene=scenes())
def test_turns_and_flips_compose(scene: tuple[Image, Boxes]) -> None:
    """Left undoes right; both flips are the half turn."""
    for first, second, expected in (
        (move(Op.ROTATE_90, *scene), Op.ROTATE_270, scene),
        (move(Op.HOR_FLIPE, *scene), Op.VER_FLIPE, move(Op.ROTATE_180, *scene)),
    ):
        image, boxes = move(second, *first)
        assert (image == expected[0]).all()
        assert np.allclose(boxes.xyxy, expected[1].xyxy, atol=1e-3)


@pytest.mark.parametrize("operation", EXACT)
@on_any_machine
@given(mask=blobs(), seed=SEEDS)
def test_boxes_stay_tight_around_any_form(operation: Op, mask: Image, seed: int) -> None:
    """What no window cuts off has, to the pixel, the tight box of what was drawn."""
    before = corners(mask)
    assert before is not None
    assume(not mask.all())  # or the mean colour around it is that of the object
    moved, boxes = move(operation, mask, one_box(before), seed)
    painted = (mask == INK).all(axis=2).sum()
    if (moved == INK).all(axis=2).sum() == painted:
        assert [tuple(box) for box in boxes.xyxy.tolist()] == [corners(moved)]
    else:
        assert operation in WINDOWS


@pytest.mark.parametrize("operation", EXACT)
@on_any_machine
@given(data=st.data(), size=SIZES, seed=SEEDS)
def test_boxes_of_rectangles_are_tight_around_what_is_visible(
    operation: Op, data: st.DataObject, size: tuple[int, int], seed: int
) -> None:
    """Cut off or not, the box of a rectangle is that of the part still seen; with too little of it there is none.

    An object alone in its image is never lost: then the image stays as it is.
    """
    left, top, right, bottom = box = data.draw(rectangles(*size))
    # The mean colour around the image must not be the object's: it is not, as long as there is anything else.
    assume((right - left, bottom - top) != size[::-1])
    image = np.zeros((*size, 3), np.uint8)
    image[..., 1] = INK
    image[top:bottom, left:right] = (INK, 0, 0)
    # A second object, everywhere, is always seen: it lets the first one be lost.
    alone = data.draw(st.booleans())
    boxes = one_box(box) if alone else make_boxes([((0, 0, size[1], size[0]), 2, False), *_rows(one_box(box))])
    moved, shown = move(operation, image, boxes, seed)
    seen = (moved == (INK, 0, 0)).all(axis=2)
    rows, columns = np.nonzero(seen)
    kept = shown.xyxy[shown.class_ids == 1].tolist()
    if seen.sum() >= MIN_VISIBLE * (right - left) * (bottom - top):
        assert kept == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
    else:
        assert kept == []
        assert not alone


def _rows(boxes: Boxes) -> list[tuple[tuple[float, float, float, float], int, bool]]:
    return [((x, y, r - x, b - y), 1, False) for x, y, r, b in boxes.xyxy.tolist()]


def ellipse(height: int, width: int, middle: tuple[float, float], halves: tuple[float, float]) -> Image:
    """A filled ellipse, its border smooth to a quarter of a pixel: each pixel is as bright as much of it is covered."""
    parts = 8
    y, x = (np.mgrid[: height * parts, : width * parts] + 0.5) / parts
    inside = ((x - middle[0]) / halves[0]) ** 2 + ((y - middle[1]) / halves[1]) ** 2 <= 1
    cover = inside.reshape(height, parts, width, parts).mean(axis=(1, 3))
    return np.repeat(np.rint(INK * cover).astype(np.uint8)[..., None], 3, axis=2)


@on_any_machine
@given(data=st.data(), seed=SEEDS)
def test_small_rotations_are_tight_around_round_objects(data: st.DataObject, seed: int) -> None:
    """The box of an ellipse that is turned and still wholly seen is its tight box to a pixel."""
    height, width = data.draw(st.integers(60, 110)), data.draw(st.integers(60, 110))
    halves = data.draw(st.tuples(st.floats(4, 16), st.floats(4, 16)))
    middle = data.draw(st.tuples(st.floats(halves[0], width - halves[0]), st.floats(halves[1], height - halves[1])))
    mask = ellipse(height, width, middle, halves)
    box = make_boxes([((middle[0] - halves[0], middle[1] - halves[1], 2 * halves[0], 2 * halves[1]), 1, False)])
    moved, boxes = move(Op.ROTATE_SMALL, mask, box, seed)
    assert moved.shape == mask.shape
    painted = corners(moved, INK // 2)
    assert painted is not None
    for found in boxes.xyxy.tolist():
        limits = (width, height, width, height)
        cut = [side in (0, limit) for side, limit in zip(found, limits, strict=True)]
        if not any(cut):
            assert np.allclose(found, painted, atol=1)
        # What the border cuts off a round form is not known from a box: the box holds all that is seen.
        assert all(a <= b + 1 for a, b in zip(found[:2], painted[:2], strict=True))
        assert all(a >= b - 1 for a, b in zip(found[2:], painted[2:], strict=True))


@on_any_machine
@given(seed=SEEDS)
def test_small_rotations_of_a_square_are_off_by_what_the_shape_leaves_open(seed: int) -> None:
    """The box of a turned square is at most 14 % a side too small, and its middle is right: never off, never loose."""
    mask = np.zeros((120, 120, 3), np.uint8)
    mask[40:80, 30:70] = INK
    moved, boxes = move(Op.ROTATE_SMALL, mask, one_box((30, 40, 70, 80)), seed)
    painted, found = np.array(corners(moved, INK // 2)), boxes.xyxy[0]
    assert np.allclose((painted[:2] + painted[2:]) / 2, (found[:2] + found[2:]) / 2, atol=1)
    assert ((found[2:] - found[:2]) <= (painted[2:] - painted[:2]) + 1).all()
    assert ((found[2:] - found[:2]) >= 0.86 * (painted[2:] - painted[:2]) - 1).all()


@on_any_machine
@given(seed=SEEDS)
def test_the_box_of_a_turned_crowd_holds_its_corners(seed: int) -> None:
    """What lies in them must not become background."""
    mask = np.zeros((120, 120, 3), np.uint8)
    mask[40:80, 30:70] = INK
    moved, boxes = move(Op.ROTATE_SMALL, mask, make_boxes([((30, 40, 40, 40), 1, True)]), seed)
    assert np.allclose(boxes.xyxy[0], corners(moved, INK // 2), atol=1)


@pytest.mark.parametrize("operation", EVERY)
@on_any_machine
@given(scene=scenes(), seed=SEEDS)
def test_boxes_lie_inside_and_have_an_area(operation: Op, scene: tuple[Image, Boxes], seed: int) -> None:
    """On any image, one pixel large or 300 times as long as wide; and an image with objects keeps one of them."""
    image, boxes = move(operation, *scene, seed)
    height, width = image.shape[:2]
    assert image.dtype == np.uint8
    assert min(height, width) >= 1
    assert (boxes.xyxy[:, :2] >= -1e-4).all()
    assert (boxes.xyxy[:, 2:] <= np.array([width, height]) + 1e-4).all()
    assert (boxes.xyxy[:, 2:] > boxes.xyxy[:, :2]).all()
    assert scene[1].crowd.all() == boxes.crowd.all()


@pytest.mark.parametrize("operation", EVERY)
@on_any_machine
@given(scene=scenes(), seed=SEEDS)
def test_the_random_state_decides_and_nothing_is_written_into_the_image(
    operation: Op, scene: tuple[Image, Boxes], seed: int
) -> None:
    """The same state gives the same; the image is shared by the threads that make batches, and stays as it is."""
    image, boxes = scene[0].copy(), scene[1].moved(scene[1].xyxy.copy())
    first, again = (move(operation, image, boxes, seed) for _ in range(2))
    assert first[0].tobytes() == again[0].tobytes()
    assert first[1].xyxy.tobytes() == again[1].xyxy.tobytes()
    assert (image == scene[0]).all()
    assert (boxes.xyxy == scene[1].xyxy).all()


@pytest.mark.parametrize("operation", EVERY)
@on_any_machine
@given(scene=scenes(), seed=SEEDS)
def test_class_and_crowd_go_with_the_box(operation: Op, scene: tuple[Image, Boxes], seed: int) -> None:
    """Each box that comes out is one that went in, in the same order; flips and turns lose none."""
    image, boxes = scene
    named = Boxes(boxes.xyxy, np.arange(1, len(boxes) + 1), boxes.crowd, boxes.difficult)
    _, moved = move(operation, image, named, seed)
    assert (np.diff(moved.class_ids) > 0).all()
    assert (moved.crowd == boxes.crowd[moved.class_ids - 1]).all()
    if operation in (*FLIPS, *TURNS):
        assert len(moved) == len(boxes)


@pytest.mark.parametrize("operation", WINDOWS)
@on_any_machine
@given(seed=SEEDS)
def test_a_crowd_is_cut_but_never_dropped_for_being_mostly_hidden(operation: Op, seed: int) -> None:
    """It says where nothing is to be learnt; without it what is left of it would be trained as background."""
    image = np.zeros((60, 80, 3), np.uint8)
    image[..., 1] = INK
    image[:, :70] = (INK, 0, 0)
    boxes = make_boxes([((0, 0, 70, 60), 1, True), ((72, 20, 8, 20), 2, False)])
    moved, shown = move(operation, image, boxes, seed)
    rows, columns = np.nonzero((moved == (INK, 0, 0)).all(axis=2))
    expected = [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]] if len(rows) else []
    assert shown.xyxy[shown.crowd].tolist() == expected


@on_any_machine
@given(size=SIZES, seed=SEEDS)
@example(size=(1, 1), seed=0)
def test_a_crop_shows_nothing_but_image(size: tuple[int, int], seed: int) -> None:
    """Half to all of each side, and no border of another colour."""
    # Each pixel carries its number, so that the mean colour shows wherever it is.
    marked = np.arange(size[0] * size[1]).reshape(size)
    image = np.stack([marked // 256, marked % 256, marked % 256], axis=2).astype(np.uint8)
    cropped, _ = move(Op.RANDOM_CROP, image, make_boxes([]), seed)
    height, width = cropped.shape[:2]
    found = cropped[..., 0].astype(int) * 256 + cropped[..., 1]
    y, x = divmod(int(found[0, 0]), size[1])
    assert found.shape == marked[y : y + height, x : x + width].shape
    assert (found == marked[y : y + height, x : x + width]).all()
    assert height >= max(1, round(size[0] * 0.5 - 0.5))
    assert width >= max(1, round(size[1] * 0.5 - 0.5))


@pytest.mark.parametrize("operation", EVERY)
@pytest.mark.parametrize("size", [(1, 40_000), (40_000, 1)])
def test_very_long_images(operation: Op, size: tuple[int, int]) -> None:
    """No operation fails; one longer than OpenCV 4 turns by small angles stays as it is."""
    image = noise(*size, 0)
    for boxes in (make_boxes([]), make_boxes([((0.0, 0.0, float(size[1]), float(size[0])), 1, False)])):
        moved, shown = move(operation, image, boxes, 1)
        assert len(shown) == len(boxes)
        assert max(moved.shape) > 10_000
        if operation is Op.ROTATE_SMALL:
            assert moved is image


def test_scaling_is_rounded_into_the_image() -> None:
    """720 pixels times 224 / 720 are 224.00002 in float32, and a sliver of a large image is nothing in a small one."""
    image = noise(10, 720, 0)
    sliver = float(np.nextafter(np.float32(56), np.float32(0)))
    boxes = Boxes(
        np.array([[0, 0, 720, 10], [sliver, 0, 56, 10]], np.float32), np.array([1, 2]), *np.zeros((2, 2), bool)
    )
    _, moved = expand(image, boxes, [], np.random.default_rng(0), 224)
    assert moved.xyxy.tolist() == [[0, 0, 224, 224]]
    assert moved.class_ids.tolist() == [1]


@on_any_machine
@given(scene=scenes(), seed=SEEDS, operations=st.lists(st.sampled_from(list(Op))), size=st.sampled_from([1, 7, 64, 97]))
def test_all_together(scene: tuple[Image, Boxes], seed: int, operations: list[Op], size: int) -> None:
    """Whatever is named, for whatever image: a square, boxes strictly inside it with an area, decided by the state."""
    image, boxes = expand(*scene, operations, np.random.default_rng(seed), size)
    assert (image.shape, image.dtype) == ((size, size, 3), np.uint8)
    assert image.flags.c_contiguous
    assert boxes.xyxy.dtype == np.float32
    assert ((boxes.xyxy >= 0) & (boxes.xyxy <= size)).all()
    assert (boxes.xyxy[:, 2:] > boxes.xyxy[:, :2]).all()
    again = expand(*scene, operations[::-1] * 2, np.random.default_rng(seed), size)
    assert image.tobytes() == again[0].tobytes()
    assert boxes.xyxy.tobytes() == again[1].xyxy.tobytes()
    assert boxes.crowd.tobytes() == again[1].crowd.tobytes()


@on_any_machine
@given(data=st.data(), seed=SEEDS)
def test_boxes_of_rectangles_are_tight_after_the_whole_of_it(data: st.DataObject, seed: int) -> None:
    """After several operations and the stretch to the network's input, to a pixel of that input."""
    size = data.draw(st.tuples(st.integers(60, 200), st.integers(60, 200)))
    image = np.zeros((*size, 3), np.uint8)
    left, top = data.draw(st.integers(0, size[1] - 30)), data.draw(st.integers(0, size[0] - 30))
    right, bottom = left + data.draw(st.integers(12, 30)), top + data.draw(st.integers(12, 30))
    image[top:bottom, left:right] = INK
    operations = data.draw(st.lists(st.sampled_from(EXACT)))
    moved, boxes = expand(image, one_box((left, top, right, bottom)), operations, np.random.default_rng(seed), 96)
    assert np.allclose(boxes.xyxy, [corners(moved, INK // 2)], atol=1)
