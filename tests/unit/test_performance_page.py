"""The page on speed shows what the scripts have measured."""

import importlib.util
from pathlib import Path

FIGURES = Path(__file__).parents[2] / "benchmarks" / "figures.py"


def test_the_table_is_that_of_the_results() -> None:
    """Whoever measures again runs `benchmarks/figures.py` too."""
    spec = importlib.util.spec_from_file_location("figures", FIGURES)
    assert spec is not None
    assert spec.loader is not None
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    assert figures.table(figures.read()) in figures.PAGE.read_text()
