"""Log lines: one JSON object each; of a task they are stored, in so many characters and still JSON where that cuts."""

import json
from collections.abc import Mapping
from typing import Any

#: Never cut: what a reader finds and orders lines by.
_WHOLE = frozenset({"event", "level", "timestamp", "task_id", "attempt", "owner", "trace_id", "span_id"})

#: Characters that a cut text keeps at least, if there is room for so many.
_LEAST = 20

#: What JSON leaves as it is and many a reader (Python's too) takes for the end of a line.
_LINE_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})


def json_line(value: Any, **options: Any) -> str:
    """`value` as JSON on one line, whoever reads it; `options` are those of `json.dumps`."""
    return json.dumps(value, ensure_ascii=False, **options).translate(_LINE_ENDS)


def stored_line(event: Mapping[str, Any], limit: int) -> str:
    """`event` as JSON of at most `limit` characters: its longest texts are cut, and of what is no text is left out."""
    line = _json(event)
    if len(line) <= limit:
        return line
    # Other values than texts first become texts, which can be cut.
    cut = {key: value if key in _WHOLE or isinstance(value, str) else _json(value) for key, value in event.items()}
    while len(line) > limit:
        longest = max((key for key in cut if key not in _WHOLE), key=lambda key: len(cut[key]), default=None)
        if longest is None or len(cut[longest]) <= _LEAST:
            # Of very many fields, or with an event of a library that is a whole page.
            return _json({key: str(cut[key])[:80] for key in cut if key in _WHOLE})
        # An escaped character takes up to six in JSON, so one step may not be enough, and each is at least a tenth.
        excess = max(len(line) - limit + 1, len(cut[longest]) // 10)
        keep = max(_LEAST, len(cut[longest]) - excess)
        # What a traceback says stands in its last lines.
        text = cut[longest]
        cut[longest] = f"…{text[len(text) - keep + 1 :]}" if longest == "exception" else f"{text[: keep - 1]}…"
        line = _json(cut)
    return line


def _json(value: Any) -> str:
    # Names of files may hold what is no UTF-8, and MongoDB takes nothing else.
    return json_line(value, default=str).encode(errors="replace").decode()
