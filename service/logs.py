"""Logging: key-values, one line an event, JSON in a container and readable on a terminal.

`task_id`, `attempt` and `owner` are bound by context where there is a task. What is said about a task is also kept
for `dltask logs` (see `Story`).
"""

import logging
import sys
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from handlers.store.traces import LINE_LENGTH
from service.log_lines import json_line, stored_line

#: Lines about one task that wait to be stored; the oldest fall off while the database is away.
_PENDING_LINES = 1000


class Story:
    """Collects the log lines of running tasks, until the attempt stores them. A structlog processor."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[str]] = {}
        #: How many have it open: the sweep can take back a task that this very worker still runs.
        self._open: Counter[str] = Counter()
        #: Last lines of attempts that are over, which nobody has stored yet: (its task's stored id, lines).
        self.left: deque[tuple[Any, list[str]]] = deque(maxlen=_PENDING_LINES)

    def open(self, task_id: str) -> None:
        """Begin to keep lines that carry this `task_id`."""
        self._open[task_id] += 1
        self._lines.setdefault(task_id, deque(maxlen=_PENDING_LINES))

    def take(self, task_id: str) -> list[str]:
        """The lines kept since the last call, oldest first."""
        lines = self._lines.get(task_id, deque())
        taken = list(lines)
        lines.clear()
        return taken

    def put_back(self, task_id: str, lines: list[str]) -> None:
        """Keep lines, once taken, that could not be stored."""
        if task_id in self._lines:
            self._lines[task_id] = deque([*lines, *self._lines[task_id]], maxlen=_PENDING_LINES)

    def close(self, task_id: str) -> list[str]:
        """The last lines; no more are kept."""
        taken = self.take(task_id)
        self._open[task_id] -= 1
        if self._open[task_id] <= 0:
            del self._open[task_id], self._lines[task_id]
        return taken

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        """Keep the line, and pass it on."""
        lines = self._lines.get(event.get("task_id", ""))
        if lines is not None:
            lines.append(stored_line(event, LINE_LENGTH))
        return event


class _Enduring:
    """A stream whose faults end nobody: a full disk, or a reader that is gone, must not take a worker's tasks down."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def configure(
    form: Literal["auto", "json", "text"],
    level: str,
    *,
    mask: Callable[[str], str],
    story: Story | None = None,
    stream: TextIO = sys.stderr,
) -> None:
    """Set up structlog and the standard library's logging, both onto `stream`.

    `mask` takes secrets out of a text; every value and every traceback passes through it.
    """

    def without_secrets(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        return {key: mask(value) if isinstance(value, str) else value for key, value in event.items()}

    readable = form == "text" or (form == "auto" and stream.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        structlog.processors.UnicodeDecoder(),
        without_secrets,
    ]
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=stream.isatty())
        if readable
        else structlog.processors.JSONRenderer(json_line)
    )
    structlog.configure(
        processors=[*shared, *([story] if story else []), renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Enduring(stream))),
        # Tests configure more than once; a cached logger would keep the first stream.
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
