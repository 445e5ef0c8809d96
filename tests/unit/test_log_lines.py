"""A stored log line is JSON of bounded length, whatever was logged."""

import io
import json
from typing import Any

import pytest
import structlog

from service import logs
from service.log_lines import json_line, stored_line

LINE = {"event": "child output", "level": "info", "timestamp": "2026-01-02T03:04:05Z", "task_id": "1", "attempt": 1}


@pytest.mark.parametrize(
    "fields",
    [
        {"line": "x" * 5000},
        {"line": '"' * 5000},
        {"line": "\x00\x1b" * 3000},
        {"line": "ü" * 999, "reason": "y" * 999},
        {"reason": ["word"] * 2000},
        {"line": "\udce4" * 3000},
        {f"field{number}": "z" * 30 for number in range(200)},
        {"nested": {"deep": {"deeper": "x" * 3000}}},
    ],
)
def test_a_long_line_is_cut_and_stays_json(fields: dict[str, Any]) -> None:
    """What readers go by is whole, and MongoDB can take it."""
    line = stored_line({**LINE, **fields}, 1000)
    assert len(line) <= 1000
    read = json.loads(line)
    assert {key: str(read[key]) for key in LINE} == {key: str(value) for key, value in LINE.items()}
    line.encode()


def test_a_line_is_one_line() -> None:
    """To every reader: Unicode has more ends of lines than JSON escapes."""
    hostile = "a\nb\rc\x0bd\x0ce\x1cf\x1dg\x1eh\x85i\u2028j\u2029k ü"
    for line in (json_line({**LINE, "owner": hostile}), stored_line({**LINE, "owner": hostile}, 1000)):
        assert len(line.splitlines()) == 1
        assert json.loads(line)["owner"] == hostile
        assert "ü" in line


def test_no_more_is_cut_than_must_be() -> None:
    """Only the longest text loses its end, and nearly all of the length is used."""
    line = stored_line({**LINE, "line": "x" * 5000, "reason": "short"}, 1000)
    assert len(line) > 950
    read = json.loads(line)
    assert read["reason"] == "short"
    assert read["line"].endswith("x…")


def test_a_traceback_keeps_its_end() -> None:
    """Its last line says what happened."""
    line = stored_line({**LINE, "exception": "Traceback\n" + "  File\n" * 500 + "ValueError: no"}, 1000)
    assert json.loads(line)["exception"].endswith("ValueError: no")


def test_an_event_that_is_a_page_is_cut_too() -> None:
    """A library's own message can be of any length."""
    read = json.loads(stored_line({**LINE, "event": "e" * 5000}, 1000))
    assert read["event"] == "e" * 80


def test_a_short_line_is_untouched() -> None:
    """As it was logged, types and all."""
    assert json.loads(stored_line({**LINE, "map": 0.5, "devices": ["cpu"]}, 1000)) == {
        **LINE,
        "map": 0.5,
        "devices": ["cpu"],
    }


class _Full(io.StringIO):
    """As stderr is on a full disk, or where its reader is gone."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_stream_that_fails_ends_nobody() -> None:
    """What says something to it goes on; what is said about a task is kept for the database all the same."""
    story = logs.Story()
    before = structlog.get_config()
    try:
        logs.configure("json", "info", mask=str, story=story, stream=_Full())
        story.open("1")
        structlog.get_logger().info("task claimed", task_id="1")
        assert "task claimed" in story.close("1")[0]
    finally:
        structlog.configure(**before)
