"""docs/logs.md names every event of the log: level, fields, meaning and what to do, as they are in the code."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("debug", "info", "warning", "error", "exception", "critical")
#: What modules call their loggers.
LOGGERS = ("log", "_log", "logger")


@dataclass(frozen=True)
class Call:
    """One call of a logger."""

    where: str
    level: str
    event: str | None
    #: None for `**fields`, which nobody can look up.
    fields: tuple[str | None, ...]


@dataclass(frozen=True)
class Row:
    """One row of the tables."""

    level: str
    fields: frozenset[str]
    meaning: str
    remedy: str


def _logger(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return getattr(node.func, "attr", getattr(node.func, "id", "")) in ("get_logger", "getLogger", "bind", "new")
    return getattr(node, "id", getattr(node, "attr", "")) in LOGGERS


def calls_in(source: str, where: str) -> Iterator[Call]:
    """Every call of a logger in a module."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not _logger(node.func.value):
            continue
        if node.func.attr not in LEVELS:
            continue
        first = node.args[0] if node.args else None
        event = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None
        # An exception is an error with its traceback.
        level = "error" if node.func.attr == "exception" else node.func.attr
        yield Call(f"{where}:{node.lineno}", level, event, tuple(keyword.arg for keyword in node.keywords))


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    """Those of the service and its handlers; the child's own log is passed on as `child output`."""
    found = []
    for folder in ("service", "handlers"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found += calls_in(path.read_text(), str(path.relative_to(ROOT)))
    return found


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    """The tables of docs/logs.md, by event."""
    found: dict[str, Row] = {}
    for line in (ROOT / "docs" / "logs.md").read_text().splitlines():
        cells = re.split(r"\s*\|\s*", line.strip().strip("|").strip())
        if not re.fullmatch(r"`[^`]+`", cells[0]) or len(cells) != 5 or cells[1] not in LEVELS:
            continue
        event = cells[0].strip("`")
        assert event not in found, f"{event!r} is in two rows"
        found[event] = Row(cells[1], frozenset(re.findall(r"`(\w+)`", cells[2])), cells[3], cells[4])
    return found


def test_every_event_is_a_plain_text(calls: list[Call]) -> None:
    """A made-up event, or fields that are not named, cannot be found by anybody."""
    assert len(calls) > 50
    assert [call.where for call in calls if call.event is None or None in call.fields] == []


def test_events_are_named_alike(calls: list[Call]) -> None:
    """Short and in lower case, of words alone; one level for each."""
    levels: dict[str, str] = {}
    for call in calls:
        assert re.fullmatch(r"[a-z][a-z0-9-]*( [a-z0-9-]+)*", call.event or ""), call
        assert len(call.event or "") <= 40, call
        assert levels.setdefault(str(call.event), call.level) == call.level, call


def test_the_tables_are_what_the_code_logs(calls: list[Call], rows: dict[str, Row]) -> None:
    """Neither has an event, a level or a field that the other has not."""
    code: dict[str, tuple[str, set[str]]] = {}
    for call in calls:
        code.setdefault(str(call.event), (call.level, set()))[1].update(map(str, call.fields))
    told = {event: (row.level, set(row.fields)) for event, row in rows.items()}
    assert told == code


def test_every_event_says_what_to_do(rows: dict[str, Row]) -> None:
    """Also where that is nothing."""
    assert [event for event, row in rows.items() if len(row.meaning) < 10 or len(row.remedy) < 5] == []


@pytest.mark.parametrize(
    "source",
    [
        'log.info(f"task {task_id} done")',
        "log.warning(text)",
        'log.info("task " + name)',
        "self._log.error()",
        'structlog.get_logger().info(f"{x}")',
        'log.info("task done", **fields)',
    ],
)
def test_the_check_sees_what_it_must(source: str) -> None:
    """Events that are put together do not pass unseen."""
    [call] = calls_in(source, "x.py")
    assert call.event is None or None in call.fields
