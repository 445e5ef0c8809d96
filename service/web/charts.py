"""Line charts as SVG, drawn here, so that the page needs no library and no other server.

They carry no style of their own: `static/page.css` gives the classes their colours in light and dark, and each line a
dash pattern, so that colour is never all that tells two apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

#: Lines of one chart; each has a class `line-0` … in the style sheet.
MOST_LINES = 8

#: Points of one line; more are averaged, a screen has no more.
MOST_POINTS = 300

Point = tuple[float, float]

# Of the drawing's own unit, a CSS pixel where there is room: the whole, and what surrounds the plot.
_WIDTH, _HEIGHT = 440, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 36


@dataclass(frozen=True)
class Line:
    """One line of a chart: its name in the legend, and its points by x."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Chart:
    """An SVG picture, and its legend: (class of the line, name)."""

    svg: Markup
    legend: tuple[tuple[str, str], ...]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """`points`, averaged over runs of equal length so that at most `most` are left; the last one stays as it is."""
    size = math.ceil((len(points) - 1) / max(1, most - 1)) if len(points) > most else 1
    if size == 1:
        return list(points)
    before = points[:-1]
    runs = [before[start : start + size] for start in range(0, len(before), size)]
    means = [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]
    return [*means[: most - 1], points[-1]]


def line_chart(
    lines: Sequence[Line], *, x: str, y: str, top: float | None = None, right: float | None = None
) -> Chart | None:
    """The lines that have a point, over axes from 0 (`x` and `y` say what they show); None if none has.

    `top` and `right` end the axes where the scale is known, as 1 for a precision.
    """
    drawn = [
        Line(line.name, [point for point in line.points if all(map(math.isfinite, point))])
        for line in lines[:MOST_LINES]
    ]
    values = [point for line in drawn for point in line.points]
    if not values:
        return None
    highest = top if top is not None else _round_up(max(value for _, value in values), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8))
    furthest = right if right is not None else max(max(value for value, _ in values), 1.0)
    parts = [_rows(highest), _columns(furthest, x)]
    for place, line in enumerate(drawn):
        parts.append(_drawn(line.points, f"line-{place}", furthest, highest))
    words = "; ".join(_words(line) for line in drawn if line.points)
    label = escape(f"{y} over {x}: {words}"[:1000])
    head = f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="xMinYMin" role="img"'
    svg = f'{head} aria-label="{label}">{"".join(parts)}</svg>'
    legend = tuple((f"line-{place}", line.name) for place, line in enumerate(drawn) if line.points)
    return Chart(Markup(svg), legend)  # noqa: S704 -- of numbers, and of texts that are escaped


def _drawn(points: Sequence[Point], kind: str, furthest: float, highest: float) -> str:
    places = [(_across(x, furthest), _down(y, highest)) for x, y in points]
    if len(places) == 1:
        return f'<circle class="dot {kind}" cx="{places[0][0]}" cy="{places[0][1]}" r="3"/>'
    # A few measurements are shown as such: between them nothing is known.
    dots = [f'<circle class="dot {kind}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in places] if len(places) <= 30 else []
    path = " ".join(f"{x},{y}" for x, y in places)
    return f'<polyline class="line {kind}" points="{path}"/>{"".join(dots)}'


def _across(x: float, furthest: float) -> float:
    return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * min(1.0, max(0.0, x / furthest)), 1)


def _down(y: float, highest: float) -> float:
    return round(_TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - min(1.0, max(0.0, y / highest))), 1)


def _round_up(value: float, steps: Sequence[float]) -> float:
    """The least of `steps` by a power of ten that is no less than `value`."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (*steps, 10 * steps[0]) if step * power >= value * (1 - 1e-9))


def _ticks(end: float, most: int, *, whole: bool) -> list[float]:
    """At most so many round numbers from 0 to `end`."""
    step = _round_up(end / most, (1, 2, 2.5, 5))
    step = max(1.0, math.ceil(step)) if whole else step
    return [step * place for place in range(int(end / step * (1 + 1e-9)) + 1)]


def _rows(end: float) -> str:
    parts = []
    for value in _ticks(end, 4, whole=False):
        at = _down(value, end)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{at}" x2="{_WIDTH - _RIGHT}" y2="{at}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{at + 4}">{_number(value)}</text>')
    return "".join(parts)


def _columns(end: float, name: str) -> str:
    parts = []
    for value in _ticks(end, 6, whole=end > 1):
        at = _across(value, end)
        anchor = "end" if at > _WIDTH - 3 * _RIGHT else "middle"
        parts.append(f'<text class="tick {anchor}" x="{at}" y="{_HEIGHT - _BOTTOM + 15}">{_number(value)}</text>')
    parts.append(f'<text class="axis middle" x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 3}">{escape(name)}</text>')
    return "".join(parts)


def _number(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.1e}"
    return f"{value:,.3f}".rstrip("0").rstrip(".") if value < 1000 else f"{value:,.0f}"


def _words(line: Line) -> str:
    first, last = line.points[0], line.points[-1]
    if len(line.points) == 1:
        return f"{line.name} {_number(first[1])} at {_number(first[0])}"
    return f"{line.name} from {_number(first[1])} at {_number(first[0])} to {_number(last[1])} at {_number(last[0])}"
