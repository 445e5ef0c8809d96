"""The calibration error says how far scores are from the share that is right."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.detection.calibration import BINS, FROM_SCORE, calibration
from handlers.detection.scores import ClassScores


def scores(pairs: list[tuple[float, bool]]) -> ClassScores:
    pairs = sorted(pairs, key=lambda pair: -pair[0])
    values = np.array([score for score, _ in pairs], np.float32)
    return ClassScores(values, np.array([right for _, right in pairs], np.bool_), len(pairs))


def test_by_hand() -> None:
    """Four at 0.85 of which two are right, four at 0.55 of which three are; what is below 0.3 is shown, not counted."""
    pairs = [(0.85, True), (0.85, False)] * 2 + [(0.55, True)] * 3 + [(0.55, False)] + [(0.05, False)] * 100
    found = calibration([scores(pairs)])
    assert [(one.score, one.precision, one.count) for one in found.bins] == [
        (pytest.approx(0.05), 0, 100),
        (pytest.approx(0.55), 0.75, 4),
        (pytest.approx(0.85), 0.5, 4),
    ]
    assert found.ece == pytest.approx((0.2 + 0.35) / 2)
    assert found.from_score == FROM_SCORE


def test_an_honest_detector_has_none() -> None:
    pairs = [(0.75, number % 4 != 0) for number in range(400)] + [(1.0, True)] * 50
    assert calibration([scores(pairs)]).ece == pytest.approx(0, abs=1e-6)


def test_without_detections_there_is_no_error() -> None:
    """Nor where all are below the score from which on they count."""
    assert calibration([]).model_dump() == {"ece": None, "from_score": FROM_SCORE, "bins": ()}
    assert calibration([scores([(0.1, False)])]).ece is None


def test_the_edges_of_the_bins() -> None:
    """0.3 counts, in single precision as it comes; 1.0 is in the last bin."""
    found = calibration([scores([(0.3, True), (1.0, True), (0.0, False)])])
    assert [one.count for one in found.bins] == [1, 1, 1]
    assert found.ece == pytest.approx(0.35)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 1000), st.booleans()), max_size=30), max_size=4))
def test_as_defined(classes: list[list[tuple[int, bool]]]) -> None:
    """Every detection of every class in one table."""
    pairs = [(score / 1000, right) for one in classes for score, right in one]
    found = calibration([scores([(score / 1000, right) for score, right in one]) for one in classes])
    table: dict[int, list[tuple[float, bool]]] = {}
    for score, right in pairs:
        table.setdefault(min(round(score * 1000) * BINS // 1000, BINS - 1), []).append((score, right))
    assert [one.count for one in found.bins] == [len(table[at]) for at in sorted(table)]
    counted = [rows for at, rows in table.items() if at >= 3]
    if not counted:
        assert found.ece is None
        return
    off = [abs(sum(right for _, right in rows) - sum(score for score, _ in rows)) for rows in counted]
    assert found.ece == pytest.approx(sum(off) / sum(map(len, counted)), abs=1e-5)
