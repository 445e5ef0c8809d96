"""A child that says what a test tells it to: the lines of a file, byte for byte, where `{out}` is its folder.

The file is named after the task's number, in the folder SCRIPTED_LINES. One with the ending .py is run instead.
"""

import json
import os
import sys
import time
from pathlib import Path


def say(line: str, out: Path) -> None:
    """Say one line."""
    print(line.replace("{out}", str(out)), flush=True)


def main() -> int:
    """Take one job from stdin, as the real child does."""
    line = sys.stdin.readline().strip()
    if not line:
        return 0
    job = json.loads(Path(line).read_text())
    out = Path(job["out"])
    out.joinpath("file").write_bytes(b"made by the child")
    out.joinpath("link").symlink_to(os.environ["SCRIPTED_CANARY"])
    out.joinpath("folder").mkdir()
    say('{"event": "received"}', out)
    script = Path(os.environ["SCRIPTED_LINES"]) / job["task_id"]
    if script.with_suffix(".py").exists():
        # A test's own code.
        exec(script.with_suffix(".py").read_text(), {"say": lambda line: say(line, out), "sys": sys, "time": time})
        return 0
    sys.stdout.buffer.write(script.read_bytes().replace(b"{out}", str(out).encode()))
    sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
