"""The pictures show what they claim, inside their frame, whatever the classes are called and whatever is missing."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from handlers.detection.boxes import Boxes, Detections, make_boxes
from handlers.detection.fonts import drawable
from handlers.detection.job import Measured
from handlers.detection.label_layout import place
from handlers.detection.plots import SHEET_SAMPLES, sample_sheet, training_curve

#: No grey, which the edges of letters have too.
GROUND = (110, 120, 130)
NAMES = ("scratch", "pit", "stain")
NO_BOXES = make_boxes([])
#: Characters that the font lacks, formulas, control characters, and names that matplotlib would leave out.
HOSTILE = [
    "红细胞",
    "🧫🔬",
    "दोष",
    "$\\frac{$",
    "_hidden",
    "a\nb\tc\x00d\x1b[31m",
    "\u202egnp.exe",
    "w" * 5000,
    "",
    " ",
    "\ud800",
]


def detections(rows: Sequence[tuple[tuple[float, float, float, float], int, float]]) -> Detections:
    boxes = make_boxes([(box, class_id, False) for box, class_id, _ in rows])
    return Detections(boxes.xyxy, boxes.class_ids, np.array([score for _, _, score in rows], np.float32))


def image(width: int = 520, height: int = 390) -> np.ndarray:
    return np.full((height, width, 3), GROUND, np.uint8)


def drawn(path: Path) -> np.ndarray:
    """The PNG, RGB."""
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB).astype(int)


def sheet(
    path: Path, samples: Sequence[tuple[np.ndarray, Boxes, Detections]], names: Sequence[str] = NAMES
) -> np.ndarray:
    sample_sheet(samples, names, path / "sheet.png")
    return drawn(path / "sheet.png")


def coloured(picture: np.ndarray) -> np.ndarray:
    """Where something is drawn in a class's colour."""
    return picture.max(axis=2) - picture.min(axis=2) > 60


# --- the sheet -------------------------------------------------------------------------------------------------------


def test_ten_thousand_labels_do_not_take_hours(tmp_path: Path) -> None:
    """Each label is placed around all others, so only the first few hundred are drawn; all of them are counted."""
    rows = [((float(n % 500), float(n // 500 * 15), 9.0, 9.0), 1, False) for n in range(10_000)]
    picture = sheet(tmp_path, [(image(), make_boxes(rows), detections([]))])
    assert min(picture.shape[:2]) > 300


def test_a_detection_is_drawn_where_it_is(tmp_path: Path) -> None:
    """Its four sides are in the class's colour; the picture within is left as it is."""
    picture = sheet(tmp_path, [(image(), NO_BOXES, detections([((100, 150, 200, 100), 2, 0.87)]))])
    # An image of this width is not scaled.
    top, left = np.argwhere((picture == GROUND).all(axis=2)).min(axis=0)
    marked = coloured(picture)[top:, left:]
    for y, x in ((150, 200), (250, 200), (200, 100), (200, 300)):
        assert marked[y - 2 : y + 3, x - 2 : x + 3].any()
    assert (picture[top + 155 : top + 245, left + 105 : left + 295] == GROUND).all()


@pytest.mark.parametrize(("score", "visible"), [(0.29, False), (0.31, True)])
def test_doubtful_detections_are_left_out(tmp_path: Path, score: float, visible: bool) -> None:
    """The legend says below which score."""
    picture = sheet(tmp_path, [(image(), NO_BOXES, detections([((100, 100, 200, 100), 1, score)]))])
    assert coloured(picture).any() == visible


def test_labelled_boxes_are_dashed_and_missed_ones_marked(tmp_path: Path) -> None:
    """A label on white says so: only where no detection of that class is near."""
    truths = make_boxes([((100, 150, 200, 100), 1, False)])
    area = 0
    for found, missed in (((100, 150, 200, 100), False), ((400, 20, 50, 50), True)):
        picture = sheet(tmp_path, [(image(), truths, detections([(found, 1, 0.9)]))])
        inside = (picture == GROUND).all(axis=2)
        top, left = np.argwhere(inside).min(axis=0)
        side = picture[top + 150 - 2 : top + 150 + 3, left + 180 : left + 290]
        white = (side > 180).all(axis=2).any(axis=0)
        assert 10 < white.sum() < 100
        label = (picture[top + 130 : top + 148, left + 100 : left + 180] > 250).all(axis=2).sum()
        assert (label > area + 300) == missed
        area = label


@pytest.mark.parametrize("count", [1, 2, 3, 4, SHEET_SAMPLES, SHEET_SAMPLES + 5])
def test_every_picture_is_whole(tmp_path: Path, count: int) -> None:
    """At most twelve, in rows of three, none cut off and none over another."""
    picture = sheet(tmp_path, [(image(), NO_BOXES, detections([]))] * count)
    whole = (picture == GROUND).all(axis=2)
    assert whole.sum() == pytest.approx(min(count, SHEET_SAMPLES) * 520 * 390, rel=0.001)


@pytest.mark.parametrize(("width", "height"), [(2000, 10), (10, 2000), (1, 1), (4000, 3000)])
def test_odd_shapes_are_drawn(tmp_path: Path, width: int, height: int) -> None:
    box = (0.0, 0.0, float(width), float(height))
    picture = sheet(tmp_path, [(image(width, height), make_boxes([(box, 1, False)]), detections([(box, 1, 0.9)]))])
    assert coloured(picture).any()


def test_no_samples_are_an_empty_sheet(tmp_path: Path) -> None:
    assert sheet(tmp_path, []).shape[2] == 3


@pytest.mark.filterwarnings("error")
def test_any_class_name_is_drawn_without_a_warning(tmp_path: Path) -> None:
    found = detections([((20 + 30 * i, 40 + 25 * i, 120, 60), i + 1, 0.9) for i in range(len(HOSTILE))])
    truths = make_boxes([((300, 10 + 30 * i, 60, 20), i + 1, False) for i in range(len(HOSTILE))])
    sparse = [(image(), truths.select(np.arange(i, i + 1)), found) for i in range(2)]
    assert coloured(sheet(tmp_path, [(image(), truths, found), *sparse], HOSTILE)).any()


def test_a_hundred_classes_have_colours_and_a_bounded_legend(tmp_path: Path) -> None:
    found = detections([((5 * i, 3 * i, 20, 20), i + 1, 0.9) for i in range(100)])
    picture = sheet(tmp_path, [(image(), NO_BOXES, found)], [f"class number {i}" for i in range(100)])
    top = np.argwhere((picture == GROUND).all(axis=2)).min(axis=0)[0]
    assert top < 250


def test_equal_samples_give_equal_files(tmp_path: Path) -> None:
    files = []
    for _ in range(2):
        sheet(tmp_path, [(image(), NO_BOXES, detections([((10, 10, 90, 90), 1, 0.9)]))])
        files.append((tmp_path / "sheet.png").read_bytes())
    assert files[0] == files[1]


# --- class names and labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RBC", "Größe 5 µm", "царапина", "ρωγμή", "a $ b"])
def test_names_that_the_font_has_are_kept(name: str) -> None:
    assert drawable(name, "class 1") == name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("红细胞", "class 1"),
        ("", "class 1"),
        ("a\n b\x00c", "a b c"),
        ("w" * 30, "w" * 23 + "…"),
        ("\ud800", "class 1"),
    ],
)
def test_other_names_are_replaced(name: str, shown: str) -> None:
    assert drawable(name, "class 1") == shown


@pytest.mark.parametrize(
    "box", [(0, 0, 20, 20), (90, 90, 100, 100), (-50, 40, 300, 60), (40, 40, 41, 41), (0, 0, 100, 100)]
)
def test_a_label_is_inside_the_picture(box: tuple[float, float, float, float]) -> None:
    left, top, right, bottom = place(30, 10, box, [], (100, 100))
    assert 0 <= left < right <= 100
    assert 0 <= top < bottom <= 100
    assert (right - left, bottom - top) == (30, 10)


def test_labels_of_boxes_in_one_place_avoid_each_other() -> None:
    """Five labels for one box have no pixel in common."""
    taken: list[tuple[float, float, float, float]] = []
    for _ in range(5):
        taken.append(place(30, 10, (100, 100, 180, 160), taken, (400, 400)))
    covered = np.zeros((400, 400), int)
    for left, top, right, bottom in taken:
        covered[int(top) : int(bottom), int(left) : int(right)] += 1
    assert covered.max() == 1


# --- the curve -------------------------------------------------------------------------------------------------------


def curve(path: Path, measurements: Sequence[Measured]) -> np.ndarray:
    training_curve(measurements, path / "curve.png")
    return drawn(path / "curve.png")


def has_colour(picture: np.ndarray, colour: str) -> bool:
    """Whether a pixel has that colour, near enough for the edges of a thin line."""
    wanted = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)])
    return bool((np.abs(picture - wanted).max(axis=2) < 12).any())


LOSS, SMOOTHED, RATE, MAP, MAP_50 = "#9ecae1", "#08519c", "#a63603", "#006d2c", "#74c476"


def test_loss_rate_and_validation_are_drawn(tmp_path: Path) -> None:
    measurements = [
        Measured(iteration=i, values={"loss": 20 / i, "learning_rate": 0.001 * i}) for i in range(1, 101)
    ] + [Measured(iteration=i, values={"map": i / 200, "map_50": i / 110}) for i in (50, 100)]
    picture = curve(tmp_path, measurements)
    assert all(has_colour(picture, colour) for colour in (LOSS, SMOOTHED, RATE, MAP, MAP_50))


def test_without_validation_there_is_no_panel_for_it(tmp_path: Path) -> None:
    measurements = [Measured(iteration=i, values={"loss": 1.0, "learning_rate": 0.001}) for i in range(1, 30)]
    with_it = curve(tmp_path, [*measurements, Measured(iteration=29, values={"map": 0.5, "map_50": 0.7})])
    without = curve(tmp_path, measurements)
    assert without.shape[0] < with_it.shape[0]
    assert not has_colour(without, MAP)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "values",
    [
        [],
        [{"loss": 3.0, "learning_rate": 1e-3}],
        [{"loss": 0.0}, {"loss": 5.0}],
        [{"loss": -1.0}, {"loss": 5.0}],
        [{"map": 0.4, "map_50": 0.5}],
        [{"loss": 1e-30}, {"loss": 1e30}],
    ],
    ids=["nothing", "one", "zero", "negative", "validation only", "huge range"],
)
def test_odd_measurements_are_drawn_without_a_warning(tmp_path: Path, values: list[dict[str, float]]) -> None:
    picture = curve(tmp_path, [Measured(iteration=i, values=row) for i, row in enumerate(values, 1)])
    assert min(picture.shape[:2]) > 300


def test_a_repeated_iteration_is_no_step_back(tmp_path: Path) -> None:
    """A resumed run may repeat what the one before had measured; order does not matter."""
    rows = [Measured(iteration=i, values={"loss": 20 / i}) for i in range(1, 40)]
    first = curve(tmp_path, rows)
    assert (curve(tmp_path, rows[::-1]) == first).all()
