"""`python -m tests.chaos --seconds 3600 --seed 1`: workers, a client and a replica set under faults, for that long.

The last line is one JSON object; the exit code is 0 if nothing was lost, doubled, orphaned or otherwise wrong.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.run import run


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="how long faults go on (default: 600)")
    parser.add_argument("--seed", type=int, default=1, help="what the faults and tasks are drawn by (default: 1)")
    parser.add_argument("--workers", type=int, default=4, help="worker processes (default: 4)")
    parser.add_argument(
        "--folder", type=Path, help="for data and logs, kept (default: a new one, kept if all is not well)"
    )
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="dltask-chaos-"))
    report = run(folder, seconds=arguments.seconds, seed=arguments.seed, workers=arguments.workers)
    if arguments.folder is None:
        # The logs say what was wrong, if anything was; the data of the servers would fill the disk.
        shutil.rmtree(folder if report["good"] else folder / "mongo")
    if not report["good"]:
        print(f"the logs of the workers are in {folder}", file=sys.stderr)
    print(json.dumps(report))
    return 0 if report["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
