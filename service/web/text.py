"""What stands on a page, made safe in one place: Jinja's escaping, and what escaping leaves as it is."""

import math
import re
import unicodedata
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from service.show import age, duration, iso, printable

#: Characters of one value on a page; a name has at most 160, a message 2,000.
_MOST = 2000


def shown(value: Any) -> str:
    """Any value as text on a page: one bounded line, no control or direction marks, two accents a letter at most."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else str(value)
    text = printable(text[: _MOST + 1])
    if not text.isascii():
        text = _without_towers(text)
    return text if len(text) <= _MOST else f"{text[:_MOST]}…"


def _without_towers(text: str) -> str:
    # Hundreds of accents on one letter are drawn over the lines above.
    kept, marks = [], 0
    for letter in text:
        marks = marks + 1 if unicodedata.category(letter) in ("Mn", "Me") else 0
        if marks <= 2:
            kept.append(letter)
    return "".join(kept)


def clip(value: Any, most: int = 80) -> str:
    """`shown`, and no longer than this."""
    text = shown(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def score(value: Any) -> str:
    """A precision or the like, 0 … 1; a dash for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:.3f}"


def count(value: Any) -> str:
    """`12,345`; anything that is no number as it is."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) < 10**15 else clip(value, 24)
    return clip(value, 24)


def environment(now: Callable[[], datetime]) -> Environment:
    """The templates. Every value in them passes through `shown` and is escaped, unless this program made it Markup."""
    made = Environment(
        loader=PackageLoader("service.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else shown(value),
    )
    made.filters |= {"clip": clip, "score": score, "count": count, "ago": lambda time: age(time, now())}
    made.filters |= {"iso": iso, "duration": duration, "slug": _slug}
    made.tests["time"] = lambda value: isinstance(value, datetime)
    return made


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()[:80] or "none"
