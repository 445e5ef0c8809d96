"""A test takes the thresholds that stand in DL_MODEL, whatever else somebody put there."""

from typing import Any

import pytest

from handlers.test import _thresholds

NAMES = ["scratch", "pit", "stain"]


def model(per_class: Any) -> dict[str, Any]:
    return {"class_names": NAMES, "metrics": {"per_class": per_class}}


def test_they_are_in_the_order_of_the_classes() -> None:
    """None for a class that has none, or that is not listed."""
    rows = [{"class_id": 3, "threshold": 0.25}, {"class_id": 1, "threshold": 0.5}, {"class_id": 2}]
    assert _thresholds(model(rows)) == (0.5, None, 0.25)
    assert _thresholds(model(rows[:1])) == (None, None, 0.25)


@pytest.mark.parametrize("metrics", [None, {}, 5, {"per_class": None}, {"per_class": [{"class_id": 1, "map": 0.5}]}])
def test_a_model_without_any_has_none(metrics: Any) -> None:
    """One of release 0.1.0, for example."""
    assert _thresholds({"class_names": NAMES, "metrics": metrics}) == ()
    assert _thresholds({"class_names": NAMES}) == ()


@pytest.mark.parametrize("value", ["0.5", None, True, float("nan"), float("inf"), -1, 2, [0.5], {}])
def test_what_is_no_score_is_none(value: Any) -> None:
    rows = [{"class_id": 1, "threshold": value}, {"class_id": 2, "threshold": 0.5}, value, {"class_id": [1]}]
    assert _thresholds(model(rows)) == (None, 0.5, None)
