"""What the service costs while it has nothing to do: seconds until it is ready, memory, and CPU time.

    python benchmarks/idle.py [--rounds 5] [--seconds 15]

Prints the seconds from the start of `dltask serve` until it says that it is ready, with its page and its metrics on;
its resident memory after a while, and the share of a core that it then needs; the floor is a bare Python that has
imported pymongo. The database has its indexes, as after any first start. The child that waits, warm, is a process of
its own, whose memory is printed beside it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anyio
from figures import figure

from service.embedded import embedded_mongo

_BARE = "import pymongo, sys; print('ready', flush=True); sys.stdin.read()"


def resident_mb(pid: int) -> float:
    """Resident memory of a process, in 10^6 bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def started(command: list[str], env: dict[str, str]) -> tuple[subprocess.Popen[bytes], float]:
    """A process that says "ready", and the seconds that it took."""
    began = time.monotonic()
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    while b"ready" not in (line := process.stdout.readline()):
        assert line, "it ended"
    return process, time.monotonic() - began


def ours(uri: str, seconds: float) -> tuple[float, float, float, float]:
    """Seconds to ready, MB, per cent of a core over `seconds`, MB of the waiting child."""
    with tempfile.TemporaryDirectory(prefix="dltask-idle-") as cache:
        env = {key: value for key, value in os.environ.items() if not key.startswith("DLTASK_")}
        env |= {"DLTASK_MONGODB_URI": uri, "DLTASK_CACHE_DIR": cache, "DLTASK_HTTP_PORT": "0"}
        process, ready = started([sys.executable, "-m", "service.cli", "serve"], env)
        try:
            child = children_of(process.pid)[0]
            # It has imported torch once it needs no more CPU time.
            used = -1.0
            while cpu_seconds(child) > used:
                used = cpu_seconds(child)
                time.sleep(1)
            before = cpu_seconds(process.pid)
            time.sleep(seconds)
            share = 100 * (cpu_seconds(process.pid) - before) / seconds
            return ready, resident_mb(process.pid), share, resident_mb(child)
        finally:
            process.terminate()
            process.communicate()


def bare() -> tuple[float, float]:
    """The seconds to ready and the MB of a bare Python."""
    process, ready = started([sys.executable, "-c", _BARE], dict(os.environ))
    megabytes = resident_mb(process.pid)
    process.communicate()
    return ready, megabytes


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15, help="for which it is watched, idle")
    arguments = parser.parse_args()
    async with embedded_mongo() as uri:
        ours(uri, 0.1)  # makes the indexes, and reads all files from disk
        pairs = [(ours(uri, arguments.seconds), bare()) for _ in range(arguments.rounds)]
    services, floors = [list(zip(*rows, strict=True)) for rows in zip(*pairs, strict=True)]
    floor_is = "bare Python, pymongo imported"
    figure("start to ready", "s", services[0], floor=floors[0], floor_is=floor_is, reach="<= 1.5 s")
    figure("service idle, memory", "MB", services[1], floor=floors[1], floor_is=floor_is, reach="<= 120 MB")
    figure("service idle, CPU", "% of a core", services[2], reach="< 1 %")
    print(f"  the warm child beside it: {statistics.median(services[3]):.0f} MB")


if __name__ == "__main__":
    anyio.run(main)
