"""Versions of a model beside each other, as templates show them. Every value may be anything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.show import number
from service.web.charts import Chart, Line, line_chart
from service.web.outcome import MOST_CLASSES, score_of
from service.web.view import rows_of

#: Differences below this are shown as none.
_SAME = 0.0005


@dataclass(frozen=True)
class Compared:
    """The average precision of one class in two versions; None is unknown, or a class of one of them only."""

    name: Any
    before: float | None
    after: float | None
    before_50: float | None
    after_50: float | None

    @property
    def change(self) -> float | None:
        """How much better the newer one is."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def direction(self) -> str:
        """`up`, `down` or `same`; empty where it is unknown."""
        if self.change is None:
            return ""
        return "same" if abs(self.change) < _SAME else "up" if self.change > 0 else "down"


def compared(before: Any, after: Any) -> list[Compared]:
    """The classes of both, by name, what changed most first. Each is `metrics.per_class` of a version."""
    old, new = _by_name(before), _by_name(after)
    rows = []
    for name in dict.fromkeys([*new, *old]):
        one, other = old.get(name, {}), new.get(name, {})
        scores = (score_of(entry.get(field)) for field in ("map", "map_50") for entry in (one, other))
        rows.append(Compared(name, *scores))
    return sorted(rows, key=lambda row: -abs(row.change or 0))


def _by_name(per_class: Any) -> dict[str, Mapping[str, Any]]:
    return {str(entry.get("class_name"))[:200]: entry for entry in rows_of(per_class, MOST_CLASSES)}


def versions_chart(versions: Sequence[Mapping[str, Any]]) -> Chart | None:
    """The average precision over the versions, of which the newest come first; None for a single one."""
    if len(versions) < 2:
        return None
    numbered = [(number(row.get("version")), row) for row in versions]
    rows = sorted(((at, row) for at, row in numbered if at > 0), key=lambda pair: pair[0])
    lines = [
        Line(name, [(at, value) for at, row in rows if (value := score_of(row.get(field))) is not None])
        for name, field in (("mAP@.5", "map_50"), ("mAP", "map"))
    ]
    return line_chart(lines, x="version", y="mAP", top=1.0)
