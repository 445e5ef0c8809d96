"""Processes that end with the one that started them, and looks into them through /proc."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any


@cache
def _starter() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "starter")


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process that the kernel kills when this one dies, however it dies.

    The kernel goes by the thread that started it, so all are started by one that lives as long as we do.
    """
    command = ["setpriv", "--pdeathsig", "KILL", *command]  # part of util-linux
    return _starter().submit(subprocess.Popen, command, **options).result()


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; False if there is no such process any more."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def children_of(pid: int) -> list[int]:
    """The processes that `pid` has started and that live."""
    try:
        return [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return []


def resident_mb(pid: int) -> float:
    """The resident memory of a process, MB; 0 if it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def with_variable(assignment: str) -> list[int]:
    """The processes whose environment holds this `NAME=value`, this one apart."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # gone, or not ours
        if assignment.encode() in environment and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def end(process: subprocess.Popen[bytes], *, seconds: float = 20) -> int:
    """SIGTERM, then SIGKILL if that is not enough; returns the exit code."""
    process.terminate()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(10)


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll until `condition()` is true. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s in vain until {what}")
        time.sleep(0.05)
