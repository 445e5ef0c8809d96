"""What every script that measures speed does with what it has measured: ours, the floor and a peer, in one run.

Each script prints one line for each figure, and writes it as a row of `benchmarks/results.json`; `python
benchmarks/figures.py` puts the rows into the table of `docs/performance.md`.

What is compared is run in turn, round after round, so that whatever else the machine does falls on all alike. The value
of a figure is the median over the rounds; a ratio is the median of the ratios within each round, with the smallest and
the largest of them.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
_BEGIN, _END = "<!-- The table: python benchmarks/figures.py -->", "<!-- End of the table -->"

Row = dict[str, Any]
OURS, FLOOR, PEER = "ours", "floor", "peer"


def in_turn(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each of `runs` gives in each of `rounds`; the order changes from round to round."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(runs[name]())
    return found


def figure(
    name: str,
    unit: str,
    ours: Sequence[float],
    *,
    floor: Sequence[float] = (),
    peer: Sequence[float] = (),
    floor_is: str = "",
    peer_is: str = "",
    reach: str = "",
) -> None:
    """Print a figure and put it among the results. A value for each round; `reach` is what was aimed at, in words."""
    row: Row = {"name": name, "unit": unit, "ours": _rounded(statistics.median(ours))}
    row["ours_spread"] = [_rounded(min(ours)), _rounded(max(ours))]
    for kind, values, words in ((FLOOR, floor, floor_is), (PEER, peer, peer_is)):
        # Nothing can be told beside a zero: a clock that ticks too rarely.
        values = values if all(values) else ()
        row[kind] = _rounded(statistics.median(values)) if values else None
        ratios = [mine / theirs for mine, theirs in zip(ours, values, strict=True)] if values else []
        row[f"ratio_{kind}"] = _rounded(statistics.median(ratios)) if ratios else None
        row[f"ratio_{kind}_spread"] = [_rounded(min(ratios)), _rounded(max(ratios))] if ratios else None
        row[f"{kind}_is"] = words
    row |= {"rounds": len(ours), "reach": reach}
    print(line(row), flush=True)
    rows = [one for one in read() if one["name"] != name]
    RESULTS.write_text("[\n" + ",\n".join(f"  {json.dumps(one)}" for one in [*rows, row]) + "\n]\n")


def read() -> list[Row]:
    """The rows of the last runs."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def line(row: Row) -> str:
    """A figure on one line."""
    parts = [f"{row['name']}: {row['ours']:g} {row['unit']}"]
    for kind in (FLOOR, PEER):
        if row[kind] is not None:
            low, high = row[f"ratio_{kind}_spread"]
            parts.append(f"{kind} {row[kind]:g}, ratio {row[f'ratio_{kind}']:g} ({low:g} … {high:g})")
    return "; ".join(parts)


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| what | unit | ours | floor | ratio | peer | ratio | aimed at |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["name"], row["unit"], f"{row['ours']:g}"]
        for kind in (FLOOR, PEER):
            if row[kind] is None:
                cells += ["", ""]
                continue
            low, high = row[f"ratio_{kind}_spread"]
            cells += [f"{row[kind]:g} ({row[f'{kind}_is']})", f"**{row[f'ratio_{kind}']:g}** ({low:g} … {high:g})"]
        lines.append("| " + " | ".join([*cells, row["reach"]]) + " |")
    return "\n".join(lines)


def _rounded(value: float) -> float:
    """Three figures: more is noise."""
    return float(f"{value:.3g}")


def main() -> None:
    """Renew the table of the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    before, _, rest = PAGE.read_text().partition(_BEGIN)
    after = rest.partition(_END)[2]
    PAGE.write_text(f"{before}{_BEGIN}\n\n{table(read())}\n\n{_END}{after}")


if __name__ == "__main__":
    main()
