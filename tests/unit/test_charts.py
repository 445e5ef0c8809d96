"""Line charts: within their frame, thinned, named, and safe whatever the numbers and names are."""

import math
import random
import re
from xml.etree import ElementTree

import pytest

from service.web.charts import MOST_LINES, MOST_POINTS, Chart, Line, line_chart, thinned


def drawn(*lines: Line, **options: float) -> Chart:
    chart = line_chart(lines, x="iteration", y="loss", **options)
    assert chart is not None
    ElementTree.fromstring(chart.svg)
    return chart


def numbers(svg: str, name: str) -> list[float]:
    return [float(text) for text in re.findall(rf' {name}="([^"]+)"', svg)]


def test_points_lie_where_their_values_say() -> None:
    """The first at the left below, the last at the right above; the label says so in words."""
    chart = drawn(Line("loss", [(0.0, 0.0), (100.0, 10.0)]))
    path = re.search(r'points="([^"]+)"', chart.svg)
    assert path is not None
    assert path[1] == "46.0,184.0 428.0,10.0"
    assert "loss from 0 at 0 to 10 at 100" in chart.svg
    assert chart.legend == (("line-0", "loss"),)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_drawn_outside(seed: int) -> None:
    """Whatever the values are, tiny, huge, negative or none at all."""
    draw = random.Random(seed)
    values = [math.nan, math.inf, -math.inf, 0.0, -5.0, 1e-300, 1e300, *(draw.lognormvariate(0, 20) for _ in range(20))]
    points = [(draw.choice(values), draw.choice(values)) for _ in range(draw.randint(1, 60))]
    chart = line_chart([Line("a", points), Line("b", points[:1])], x="x", y="y")
    if chart is None:
        assert not any(math.isfinite(x) and math.isfinite(y) for x, y in points)
        return
    ElementTree.fromstring(chart.svg)
    assert "nan" not in chart.svg
    pairs = [pair.split(",") for path in re.findall(r'points="([^"]+)"', chart.svg) for pair in path.split()]
    across = [float(x) for x, _ in pairs] + numbers(chart.svg, "cx") + numbers(chart.svg, "x")
    down = [float(y) for _, y in pairs] + numbers(chart.svg, "cy") + numbers(chart.svg, "y")
    assert all(0 <= x <= 440 for x in across)
    assert all(0 <= y <= 220 for y in down)
    assert len(re.findall("<text", chart.svg)) < 20


def test_nothing_to_draw_is_no_chart() -> None:
    """Nor are numbers that are none."""
    assert line_chart([], x="x", y="y") is None
    assert line_chart([Line("a", []), Line("b", [(1.0, math.nan)])], x="x", y="y") is None


def test_names_cannot_leave_their_place() -> None:
    """A name of a class is text, in the label and in the picture."""
    chart = drawn(Line('"><script>alert(1)</script>', [(1.0, 1.0), (2.0, 2.0)]))
    assert "<script>" not in chart.svg


def test_thinning_keeps_the_course() -> None:
    """Few points stay as they are; many are averaged, in order, the last one as it was."""
    few = [(float(x), float(x)) for x in range(MOST_POINTS)]
    assert thinned(few) == few
    many = [(float(x), float(x % 2)) for x in range(10_001)]
    thin = thinned(many)
    assert len(thin) <= MOST_POINTS
    assert thin[-1] == many[-1]
    assert [x for x, _ in thin] == sorted(x for x, _ in thin)
    assert all(0.4 < y < 0.6 for _, y in thin[:-1])
    for count in range(1, 900, 7):
        assert len(thinned(many[:count])) <= MOST_POINTS
        assert thinned(many[:count])[-1] == many[count - 1]


def test_lines_are_bounded_and_told_apart() -> None:
    """Each has a class of its own, which the style sheet gives a colour and a pattern."""
    chart = drawn(*(Line(f"c{number}", [(0.0, 0.1), (1.0, 1.0)]) for number in range(12)), top=1.0, right=1.0)
    assert len(chart.legend) == MOST_LINES
    assert len({kind for kind, _ in chart.legend}) == MOST_LINES
    assert ">0.2<" in chart.svg
    assert ">1<" in chart.svg
