"""The pictures show what they claim, inside their frame, whatever the classes are called and whatever is missing."""

import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from handlers.detection.boxes import Boxes, Detections, make_boxes
from handlers.detection.evaluate import Evaluation, evaluate
from handlers.detection.job import Measured
from handlers.detection.mistakes import ImageMistakes
from handlers.detection.pictures.calibration import calibration_picture
from handlers.detection.pictures.confusion import MAX_ROWS, confusion_picture, confusion_rows, short
from handlers.detection.pictures.fonts import drawable
from handlers.detection.pictures.label_layout import place
from handlers.detection.pictures.precision_recall import precision_recall_picture
from handlers.detection.pictures.samples import SHEET_SAMPLES, sample_sheet
from handlers.detection.pictures.suspicious import suspicious_sheet
from handlers.detection.pictures.training import training_curve
from handlers.detection.pictures.worst import worst_sheet
from handlers.detection.suspicious import Suspect
from schemas.result import Calibration, CalibrationBin, SuspicionKind

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


@pytest.mark.parametrize(("threshold", "visible"), [(0.9, False), (0.05, True), (None, True)])
def test_detections_are_drawn_from_the_thresholds_of_their_classes_on(
    tmp_path: Path, threshold: float | None, visible: bool
) -> None:
    """Where that of a class is unknown, from 0.3 on."""
    found = detections([((100, 100, 200, 100), 2, 0.31)])
    sample_sheet([(image(), NO_BOXES, found)], NAMES, tmp_path / "sheet.png", (0.99, threshold, 0.99))
    assert coloured(drawn(tmp_path / "sheet.png")).any() == visible


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


# --- the worst images ------------------------------------------------------------------------------------------------

MISSED, FALSE = (240, 228, 66), (213, 94, 0)


def mistakes(missed: bool, false: bool) -> ImageMistakes:
    """An object at (100, 150), a detection at (300, 150), each of 100 x 80 pixels."""
    truths = make_boxes([((100, 150, 100, 80), 1, False)])
    found = detections([((300, 150, 100, 80), 2, 0.9)])
    return ImageMistakes(1, truths, np.array([missed]), found, np.array([false]))


def worst(path: Path, images: Sequence[ImageMistakes], names: Sequence[str] = NAMES) -> np.ndarray:
    worst_sheet(((image(), one, f"{one.image_id:024x}") for one in images), names, 0.5, path / "worst.png")
    return drawn(path / "worst.png")


def pixels_of(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.abs(picture - np.array(colour)).max(axis=2) < 12).sum()


@pytest.mark.parametrize(("missed", "false"), [(False, False), (True, False), (False, True), (True, True)])
def test_mistakes_are_marked_and_told_apart_by_their_form(tmp_path: Path, missed: bool, false: bool) -> None:
    """Missed objects are dashed, false detections crossed out; what is right is neither."""
    picture = worst(tmp_path, [mistakes(missed, false)])
    top, left = np.argwhere((picture == GROUND).all(axis=2)).min(axis=0)
    below = picture[top:]
    # Beside the entries of the legend, there is a mark.
    assert (pixels_of(below, MISSED) > 300) == missed
    assert (pixels_of(below, FALSE) > 300) == false
    middle_of_object, middle_of_detection = (
        picture[top + 185 : top + 196, left + x - 5 : left + x + 6] for x in (150, 350)
    )
    assert (middle_of_object == GROUND).all()
    assert (middle_of_detection == GROUND).all() != false
    lower_side = picture[top + 230 - 1 : top + 230 + 2, left + 104 : left + 197]
    dashes = (np.abs(lower_side - np.array(MISSED)).max(axis=2) < 60).any(axis=0)
    assert (20 < dashes.sum() < 80) == missed


def test_without_mistakes_the_sheet_says_so(tmp_path: Path) -> None:
    picture = worst(tmp_path, [])
    assert (picture < 100).all(axis=2).sum() > 100


def test_an_image_is_let_go_before_the_next_but_one_is_read(tmp_path: Path) -> None:
    """They may be of 100 megapixels each."""
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def reading() -> Iterator[tuple[np.ndarray, ImageMistakes, str]]:
        nonlocal most
        for number in range(5):
            most = max(most, sum(one() is not None for one in alive))
            one = image(1000, 800)
            alive.append(weakref.ref(one))
            yield one, mistakes(True, True), str(number)

    worst_sheet(reading(), NAMES, 0.5, tmp_path / "worst.png")
    sample_sheet(((one, NO_BOXES, detections([])) for one, _, _ in reading()), NAMES, tmp_path / "sheet.png")
    assert len(alive) == 10
    assert most <= 2


def test_ten_thousand_mistakes_do_not_take_hours(tmp_path: Path) -> None:
    boxes = make_boxes([((float(n % 500), float(n // 500 * 15), 9.0, 9.0), 1, False) for n in range(10_000)])
    found = Detections(boxes.xyxy, boxes.class_ids, np.full(10_000, 0.9, np.float32))
    everything = np.ones(10_000, np.bool_)
    picture = worst(tmp_path, [ImageMistakes(1, boxes, everything, found, everything)])
    assert min(picture.shape[:2]) > 300


# --- suspicious labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "colour"),
    [
        ("unlabelled", (86, 180, 233)),
        ("wrong_class", (204, 121, 167)),
        ("poor_box", (230, 159, 0)),
        ("no_object", (213, 94, 0)),
        ("duplicate", (240, 228, 66)),
    ],
)
def test_a_suspicious_label_is_marked_where_it_is(
    tmp_path: Path, kind: SuspicionKind, colour: tuple[int, int, int]
) -> None:
    """In the colour of its kind, and nothing else is; the legend says what it means."""
    box = np.array([100, 150, 300, 250], np.float32)
    suspect = Suspect(1, kind, 1, box, 0.9, detected_as=2 if kind == "wrong_class" else None, score=0.9)
    suspicious_sheet([(image(), [suspect], "x")], NAMES, tmp_path / "suspicious.png")
    picture = drawn(tmp_path / "suspicious.png")
    top, left = np.argwhere((picture == GROUND).all(axis=2)).min(axis=0)
    lower_side = picture[top + 250 - 2 : top + 250 + 3, left + 110 : left + 290]
    assert (np.abs(lower_side - np.array(colour)).max(axis=2) < 60).any(axis=0).sum() > 20
    assert (picture[top + 180 : top + 240, left + 105 : left + 295] == GROUND).all()
    assert (picture[: top - 2] != 255).any()


def test_without_suspicious_labels_the_sheet_says_so(tmp_path: Path) -> None:
    suspicious_sheet([], NAMES, tmp_path / "suspicious.png")
    assert (drawn(tmp_path / "suspicious.png") < 100).all(axis=2).sum() > 100


# --- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", [[], [0.05], [0.95], [0.05, 0.35, 0.95]])
def test_calibration_is_drawn_whatever_there_is(tmp_path: Path, scores: list[float]) -> None:
    """Without a warning; where nothing is detected, there is the line and no mark."""
    bins = tuple(CalibrationBin(score=score, precision=score / 2, count=10) for score in scores)
    calibration_picture(Calibration(ece=None, from_score=0.3, bins=bins), tmp_path / "calibration.png")
    marked = pixels_of(drawn(tmp_path / "calibration.png")[60:], (0, 114, 178))
    # The legend has a mark too, but stands only for what is drawn.
    assert (marked > 100) == bool(scores)


# --- the confusion matrix and the curves -----------------------------------------------------------------------------


def evaluation(names: Sequence[str], images: int = 60) -> Evaluation:
    """Four in five objects are found; some are taken for the next class, some detections are false."""
    rng = np.random.default_rng(1)
    truths, found = {}, {}
    for image_id in range(1, images + 1):
        count = int(rng.integers(1, 9))
        boxes = np.concatenate([rng.uniform(0, 300, (count, 2)), rng.uniform(20, 120, (count, 2))], axis=1)
        class_ids = rng.integers(1, len(names) + 1, count).tolist()
        truths[image_id] = make_boxes([(tuple(box), c, False) for box, c in zip(boxes, class_ids, strict=True)])
        rows = [
            (tuple(box + 2), c % len(names) + 1 if rng.random() < 0.1 else c, float(rng.random()))
            for box, c in zip(boxes, class_ids, strict=True)
            if rng.random() < 0.8
        ]
        rows += [((10, 10, 400, 9), int(rng.integers(1, len(names) + 1)), float(rng.random() / 2))]
        found[image_id] = detections(sorted(rows, key=lambda row: -row[2]))
    return evaluate(list(truths), truths, found, names, "test", {i: f"{i:024x}" for i in truths})


def pictures(path: Path, one: Evaluation) -> dict[str, np.ndarray]:
    names = one.class_names
    confusion_picture(one.confusion, names, one.threshold, path / "confusion.png")
    precision_recall_picture(one.precision, one.scores, names, one.threshold, path / "precision_recall.png")
    worst_sheet(((image(), image_, "x") for image_ in one.worst), names, one.threshold, path / "worst.png")
    suspicious_sheet([(image(), one.suspects.worst[:5], "x")], names, path / "suspicious.png")
    assert one.metrics.calibration is not None
    calibration_picture(one.metrics.calibration, path / "calibration.png")
    return {file.name: drawn(file) for file in sorted(path.glob("*.png"))}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "names",
    [
        ["a"],
        list(NAMES),
        [f"class {n}" for n in range(20)],
        [f"class number {n}" for n in range(100)],
        HOSTILE,
        [f"c{n}" for n in range(300)],
    ],
    ids=["1", "3", "20", "100", "hostile", "300"],
)
def test_any_classes_are_drawn_within_bounds_and_without_a_warning(tmp_path: Path, names: list[str]) -> None:
    made = pictures(tmp_path, evaluation(names))
    assert len(made) == 5
    for name, picture in made.items():
        assert 400 < min(picture.shape[:2]) <= max(picture.shape[:2]) < 2200, name
        assert (tmp_path / name).stat().st_size < 1_000_000
        # Nothing reaches the edge, where it would be cut off.
        frame = np.concatenate([picture[:3].reshape(-1, 3), picture[-3:].reshape(-1, 3)])
        sides = np.concatenate([picture[:, :3].reshape(-1, 3), picture[:, -3:].reshape(-1, 3)])
        assert (frame == 255).all()
        assert (sides == 255).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("found", [False, True])
def test_nothing_found_and_nothing_right_is_drawn(tmp_path: Path, found: bool) -> None:
    truths = {1: make_boxes([((0, 0, 50, 50), 1, False)])}
    one = {1: detections([((200, 200, 50, 50), 2, 0.9)] if found else [])}
    made = pictures(tmp_path, evaluate([1], truths, one, NAMES, "test", {1: "a"}))
    assert all(min(picture.shape[:2]) > 300 for picture in made.values())


def test_equal_evaluations_give_equal_files(tmp_path: Path) -> None:
    files = []
    for _ in range(2):
        pictures(tmp_path, evaluation(NAMES))
        files.append([file.read_bytes() for file in sorted(tmp_path.glob("*.png"))])
    assert files[0] == files[1]


def test_what_is_right_is_blue_and_what_is_wrong_orange(tmp_path: Path) -> None:
    """Everything right: three blue cells, as dark as can be, and not one orange. Everything missed: the reverse."""
    truths = {1: make_boxes([((100 * c, 0, 50, 50), c, False) for c in (1, 2, 3)])}
    right = {1: detections([((100 * c, 0, 50, 50), c, 0.9) for c in (1, 2, 3)])}
    for found, blue_cells, orange_cells in ((right, 3, 0), ({}, 0, 3)):
        one = evaluate([1], truths, found, NAMES, "test", {1: "a"})
        picture = pictures(tmp_path, one)["confusion.png"]
        red, blue = picture[..., 0], picture[..., 2]
        # A cell of this table has 96 x 96 pixels; the number covers some of them.
        assert (blue - red > 80).sum() == pytest.approx(blue_cells * 96 * 96, rel=0.1)
        assert (red - blue > 80).sum() == pytest.approx(orange_cells * 96 * 96, rel=0.1)


def test_of_many_classes_the_worst_have_rows_and_the_others_one() -> None:
    """No count is lost, and those with most mistakes are named."""
    names = [f"class {n}" for n in range(100)]
    one = evaluation(names)
    table, rows, note = confusion_rows(one.confusion, names)
    assert table.shape == (MAX_ROWS + 2, MAX_ROWS + 2)
    assert table.sum() == one.confusion.counts.sum()
    assert (len(rows), rows[-1]) == (MAX_ROWS + 1, "70 others")
    assert note.startswith("the 30 classes with most mistakes of 100")
    whole = one.confusion.table(range(1, 101))
    mistakes = (whole.sum(axis=0) + whole.sum(axis=1) - 2 * whole.diagonal())[:-1]
    named = [int(name.split()[1]) for name in rows[:-1]]
    assert mistakes[named].min() >= np.delete(mistakes, named).max()
    assert (table.diagonal()[:MAX_ROWS] == whole.diagonal()[named]).all()


@pytest.mark.parametrize(
    ("count", "text"), [(1, "1"), (9999, "9999"), (10_000, "10k"), (999_999, "999k"), (1_000_000, "1.0M")]
)
def test_numbers_fit_into_a_cell(count: int, text: str) -> None:
    assert short(count) == text


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
        ("a rather long class name 31", "a rather long …s name 31"),
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
