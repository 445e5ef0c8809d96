"""The child: `python -m handlers.detection`. Waits, warm, for one job; runs it; ends.

It reads one line from stdin, the path of a `job.json`, and writes events to stdout as JSON lines; its own log goes to
stderr. End of stdin without a job is the end. SIGTERM asks a training to snapshot and stop. Exit code 0 after Trained,
Tested or Stopped, 1 after Failed.
"""

import os
import signal
import sys
import threading
from pathlib import Path

# Before torch loads OpenMP, which reads it once: by default a thread that waits for its peers spins, and takes the core
# from our own readers of images and from another child (`benchmarks/environment.py` shows what that costs).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from handlers.detection.attempt import die_with_parent, run, write_event
from handlers.detection.job import Received


def main() -> int:
    """Run one job. Returns the exit code."""
    die_with_parent()
    # Libraries print, and what they print must not end up among the events.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the worker decides.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    line = sys.stdin.readline().strip()
    if not line:
        return 0
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    write_event(events.write, Received())
    return run(Path(line), lambda event: write_event(events.write, event), stop)


if __name__ == "__main__":
    sys.exit(main())
