"""One task's story: states and log lines in the order in which they happened, whatever the clocks said."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from bson import ObjectId

from service.cli.story import entry_text
from service.timeline import STATE, Timeline

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def change(status: str, attempt: int, second: int, **fields: Any) -> dict[str, Any]:
    return {"status": status, "at": NOW + timedelta(seconds=second), "attempt": attempt, **fields}


HISTORY = [
    change("PENDING", 0, 0),
    change("RUNNING", 1, 1, owner="a"),
    change("PENDING", 1, 50, reason="lost_worker: worker 'a' stopped renewing"),
    change("RUNNING", 2, 51, owner="b"),
    change("SUCCEEDED", 2, 60),
]


def task(history: Any, **fields: Any) -> dict[str, Any]:
    key = ObjectId()
    return {"_id": key, "admitted_id": key, "status": history[-1]["status"], "history": history, **fields}


def line(event: str, attempt: int, clock: str = "2026-01-02T03:04:05Z") -> str:
    return json.dumps({"event": event, "level": "info", "timestamp": clock, "attempt": attempt})


#: The second worker's clock is years behind.
LINES = [
    *(line("task claimed", 1), line("child started", 1), line("task taken back", 1)),
    *(line("task claimed", 2, "1999-01-01T00:00:00Z"), line("task succeeded", 2, "1999-01-01T00:00:09Z")),
]


def told(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["status"] if entry["event"] == STATE else entry["event"] for entry in entries]


ORDER = ["PENDING", "RUNNING", "task claimed", "child started", "task taken back", "PENDING"]
ORDER += ["RUNNING", "task claimed", "task succeeded", "SUCCEEDED"]


def test_states_stand_around_the_lines_of_their_attempt() -> None:
    """A claim before them, what ended the attempt after them; a clock that is off moves nothing."""
    assert told(Timeline().feed(task(HISTORY), LINES)) == ORDER


def test_fed_bit_by_bit_nothing_is_told_twice() -> None:
    """Also when old lines and old states have fallen off meanwhile."""
    timeline = Timeline()
    entries = timeline.feed(task(HISTORY[:2]), LINES[:1])
    entries += timeline.feed(task(HISTORY[:2]), LINES[:2])
    entries += timeline.feed(task(HISTORY[:4]), LINES[1:4])
    entries += timeline.feed(task(HISTORY[2:]), LINES[3:])
    entries += timeline.feed(task(HISTORY[2:]), LINES[3:])
    assert sorted(told(entries)) == sorted(ORDER)
    assert told(entries)[:4] == ORDER[:4]


def test_lines_of_an_attempt_whose_state_was_forgotten() -> None:
    """The history is shorter than the log: such lines come first."""
    assert told(Timeline().feed(task(HISTORY[3:]), LINES))[:3] == ["task claimed", "child started", "task taken back"]


def test_why_it_ended_comes_from_the_document() -> None:
    """An end has no reason in the history; the document's error is that of its last state."""
    error = {"kind": "PARAM_INVALID", "message": "param_request.batch_size is 0"}
    [entry] = Timeline().feed(task([change("REJECTED", 0, 0)], error=error), [])
    assert entry_text(entry) == "2026-01-02T03:04:05.000Z REJECTED  PARAM_INVALID: param_request.batch_size is 0"


def test_as_people_read_it() -> None:
    """Worker, attempt and reason are in the line of the state; the line of the log has the rest."""
    texts = [entry_text(entry) for entry in Timeline().feed(task(HISTORY), LINES)]
    assert texts[0] == "2026-01-02T03:04:05.000Z PENDING   accepted"
    assert texts[1] == "2026-01-02T03:04:06.000Z RUNNING   attempt 1 on a"
    assert texts[2] == "2026-01-02T03:04:05Z info      task claimed attempt=1"
    assert texts[5] == "2026-01-02T03:04:55.000Z PENDING   attempt 1: lost_worker: worker 'a' stopped renewing"
    assert texts[-1] == "2026-01-02T03:05:05.000Z SUCCEEDED attempt 2"


def test_documents_and_lines_of_any_form() -> None:
    """Somebody wrote into the history, and a line was cut in the middle by an older version."""
    evil = "\x1b[31m"
    junk: list[Any] = [None, 5, "x", [], {}, {"status": evil, "at": evil, "attempt": evil, "owner": [evil]}]
    lines = ['{"event": "cut o', "[1]", "null", evil, '{"attempt": "1"}']
    for document in (task([*junk, *HISTORY]), {**task(HISTORY), "history": 5}, {"_id": 1}):
        for entry in Timeline().feed(document, lines):
            assert "\x1b" not in entry_text(entry)
    assert entry_text(Timeline().feed({"_id": 1}, lines)[0]) == '{"event": "cut o'


def test_a_document_that_is_not_admitted_has_no_story() -> None:
    """What a client wrote into `history` happened to another task, or never."""
    assert Timeline().feed({**task(HISTORY), "admitted_id": ObjectId()}, []) == []
