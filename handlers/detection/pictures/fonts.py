"""Class names as matplotlib's font can draw them."""

import functools
import unicodedata

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

_LONGEST = 24


@functools.cache
def _characters() -> frozenset[int]:
    """The characters of the font that comes with matplotlib, which is what it draws with."""
    return frozenset(FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap())


def drawable(name: str, otherwise: str) -> str:
    """`name` in one line of at most 24 characters, or `otherwise` where the font lacks a character of it.

    A missing character would be drawn as a box, with a warning for each.
    """
    line = " ".join(
        "".join(c if c.isprintable() or c.isspace() else " " for c in unicodedata.normalize("NFC", name)).split()
    )
    if len(line) > _LONGEST:
        # In the middle: names that begin alike often end with a number.
        line = f"{line[: _LONGEST - 10]}…{line[-9:]}"
    if not line or any(ord(character) not in _characters() for character in line):
        return otherwise
    return line
