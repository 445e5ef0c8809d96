"""Text on a page: one bounded line without control characters, and escaped wherever a template puts it."""

import unicodedata
from datetime import UTC, datetime

from markupsafe import Markup

from service.web.text import clip, count, environment, score, shown


def test_what_controls_is_not_shown() -> None:
    """Directions, controls, lone surrogates; towers of accents; more than two thousand letters."""
    assert shown("a\u202eb\u2066c\x00\x1b[0m\ud800\nd") == "a?b?c??[0m? d"
    tower = shown("Z" + "\u0310" * 500 + "x")
    assert len(tower) == 4
    assert shown("e\u0301\u0323") == "e\u0301\u0323"
    assert len(shown("x" * 10_000)) == 2001
    assert shown(None) == ""
    assert shown({"a": 1}) == "{'a': 1}"
    assert clip("x" * 100, 10) == "x" * 9 + "…"


def test_numbers_of_any_kind() -> None:
    """Scores and counts, and what stands there instead of one."""
    values = (0.5, 1, None, "x", float("nan"), True)
    assert [score(value) for value in values] == ["0.500", "1.000", "–", "–", "–", "–"]
    assert [count(value) for value in (1234567, None, "x", 2**70)] == ["1,234,567", "", "x", str(2**70)]


def test_templates_escape_and_clean_all_values() -> None:
    """No template can forget it: what is no Markup of ours is escaped, in text and in attributes."""
    made = environment(lambda: datetime.now(UTC))
    evil = "<b>\u202e\"'"
    html = made.from_string('<a title="{{ x }}">{{ x }}</a>{{ y }}').render(x=evil, y=Markup("<i></i>"))
    assert html == '<a title="&lt;b&gt;?&#34;&#39;">&lt;b&gt;?&#34;&#39;</a><i></i>'
    assert not any(unicodedata.category(letter) in ("Cc", "Cf") for letter in html)
