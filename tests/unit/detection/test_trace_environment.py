"""The real child takes the client's trace into its environment before it does anything of its job."""

import json
import subprocess
import sys
from pathlib import Path

_RUN = """
import os, sys, threading
from pathlib import Path
from handlers.detection.attempt import run
run(Path(sys.argv[1]), lambda event: print(event.event), threading.Event())
print(os.environ["TRACEPARENT"])
"""


def test_the_child_goes_on_with_the_trace(tmp_path: Path) -> None:
    """What it starts, and any instrumentation in it, finds TRACEPARENT."""
    job = {
        "task_id": "1",
        "attempt": 1,
        "kind": "TRAIN",
        "params": {},
        "devices": ["cpu"],
        "message": str(tmp_path / "missing.json"),
        "images": str(tmp_path / "missing.jsonl"),
        "out": str(tmp_path / "out"),
        "environment": {"TRACEPARENT": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"},
    }
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(path)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["failed", job["environment"]["TRACEPARENT"]]  # type: ignore[index]
