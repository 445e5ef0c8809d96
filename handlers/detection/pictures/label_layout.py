"""Where the label of a box goes in a crowded picture."""

from collections.abc import Sequence

#: Left, top, right, bottom, in pixels.
Area = tuple[float, float, float, float]


def place(width: float, height: float, box: Area, taken: Sequence[Area], size: tuple[float, float]) -> Area:
    """The area of a `width` x `height` label for `box`, wholly inside a picture of `size` (width, height).

    Of the places at the corners of the box, outside it and inside, the first of those that cover least of the areas
    that are `taken`.
    """
    left, top, right, bottom = box
    corners = [
        (left, top - height),
        (left, top),
        (right - width, top - height),
        (left, bottom),
        (right - width, bottom),
        (left, bottom - height),
        (right - width, bottom - height),
        (right - width, top),
        ((left + right - width) / 2, (top + bottom - height) / 2),
    ]
    areas = []
    for x, y in corners:
        x, y = max(0.0, min(x, size[0] - width)), max(0.0, min(y, size[1] - height))
        areas.append((x, y, x + width, y + height))
    return min(areas, key=lambda area: sum(_overlap(area, other) for other in taken))


def _overlap(a: Area, b: Area) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)
