"""The workers: real `dltask serve` processes, restarted when they end, as Kubernetes restarts a container."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.processes import children_of, resident_mb, send, start, wait_until
from tests.helpers import STANDIN

#: Seconds from a worker's end to its next start.
_RESTART_SECONDS = 0.5
#: Each worker's disk: images, folders of attempts, snapshots.
_DISK_MB = 64

_FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


@dataclass(frozen=True)
class Death:
    """A worker process that was there and is gone."""

    owner: str
    at: float
    exit_code: int


@dataclass
class Worker:
    """One place for a worker; the process in it changes."""

    number: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    #: Of the service itself, which is not the started process when that is `unshare`.
    pid: int = 0
    #: Its settings for the next start.
    clock: str | None = None
    twin: bool = False
    #: Not restarted while somebody stops it on purpose.
    held: bool = False
    starts: int = 0
    log: Path = Path()
    peak_mb: float = 0
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def disk(self) -> Path:
        """Its cache directory."""
        return self.folder / "cache"

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self.process is not None and self.process.poll() is None

    @property
    def ready(self) -> bool:
        """Whether it has said that it serves."""
        return self.alive and self.log.exists() and '"service ready"' in self.log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> bool:
        """Send the service a signal."""
        return self.pid != 0 and send(self.pid, number)

    def owner(self) -> str:
        """The name under which it claims; empty before it has said anything."""
        for line in self.log.read_text(errors="replace").splitlines()[:5] if self.log.exists() else []:
            try:
                return str(json.loads(line)["owner"])
            except (ValueError, KeyError):
                continue
        return ""


class Fleet:
    """All workers. Made by `fleet`."""

    def __init__(self, folder: Path, size: int, env: dict[str, str]) -> None:
        self._env = env
        self.deaths: list[Death] = []
        self.workers = [Worker(number, folder / f"worker-{number}") for number in range(size)]
        self._stopping = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="keeper")
        self._mounted: list[Path] = []

    def start(self) -> None:
        """Start all, and keep them running."""
        for worker in self.workers:
            worker.disk.mkdir(parents=True)
            if os.geteuid() == 0:
                # A disk of its own, that can be full.
                options = ["-t", "tmpfs", "-o", f"size={_DISK_MB}m", "tmpfs", str(worker.disk)]
                subprocess.run(["mount", *options], check=True)
                self._mounted.append(worker.disk)
        self._keeper.start()
        self.wait_ready()

    @property
    def disks_can_fill(self) -> bool:
        """Whether each worker has a disk of its own."""
        return bool(self._mounted)

    def wait_ready(self, seconds: float = 60) -> None:
        """Wait until all serve."""
        wait_until(lambda: all(worker.ready for worker in self.workers), seconds, "all workers serve")

    def stop(self) -> list[int]:
        """End all with SIGTERM; returns their exit codes."""
        self.wait_ready()
        self._stopping.set()
        self._keeper.join()
        for worker in self.workers:
            worker.signal(signal.SIGCONT)
            worker.signal(signal.SIGTERM)
        return [self._wait(worker) for worker in self.workers]

    def unmount(self) -> None:
        """Give the disks back."""
        for disk in self._mounted:
            subprocess.run(["umount", "-l", str(disk)], check=False)

    def logs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every line of every log: (file name, event). A line that is no JSON is an event of that text."""
        for worker in self.workers:
            for path in sorted(worker.folder.glob("*.log")):
                with path.open(errors="replace") as lines:
                    for line in lines:
                        try:
                            yield path.name, json.loads(line)
                        except ValueError:
                            yield path.name, {"event": line.rstrip(), "level": "no JSON"}

    def kill(self) -> None:
        """SIGKILL to whatever is left."""
        self._stopping.set()
        for worker in self.workers:
            if worker.alive:
                self.kill_one(worker)

    def stop_one(self, worker: Worker) -> int:
        """SIGTERM to one and wait for its end; it is started again as always. Returns its exit code."""
        with worker.lock:
            worker.signal(signal.SIGTERM)
            return self._wait(worker)

    def kill_one(self, worker: Worker) -> None:
        """SIGKILL to one."""
        worker.signal(signal.SIGKILL)
        if worker.process is not None:
            worker.process.wait(10)

    @staticmethod
    def _wait(worker: Worker) -> int:
        assert worker.process is not None
        try:
            return worker.process.wait(60)
        except subprocess.TimeoutExpired:
            worker.signal(signal.SIGKILL)
            return worker.process.wait(10)

    def _keep(self) -> None:
        while not self._stopping.wait(0.1):
            for worker in self.workers:
                worker.peak_mb = max(worker.peak_mb, resident_mb(worker.pid) if worker.alive else 0)
                if not worker.alive and not worker.held and worker.lock.acquire(blocking=False):
                    try:
                        self._restart(worker)
                    finally:
                        worker.lock.release()

    def _restart(self, worker: Worker) -> None:
        if worker.process is not None:
            self.deaths.append(Death(worker.owner(), time.time(), worker.process.poll() or 0))
            time.sleep(_RESTART_SECONDS)
        worker.starts += 1
        worker.log = worker.folder / f"{worker.number}-{worker.starts:03}.log"
        env = self._env | {"DLTASK_CACHE_DIR": str(worker.disk)}
        command = [sys.executable, "-m", "service.cli", "serve"]
        if worker.clock is not None:
            env |= {"LD_PRELOAD": str(_FAKETIME), "FAKETIME": worker.clock, "DONT_FAKE_MONOTONIC": "1"}
            # Not the child: Python's time.sleep fails under the library.
            env["DLTASK_CHILD_COMMAND"] = f"env -u LD_PRELOAD {STANDIN}"
        if worker.twin:
            # Host name and process number as in containers: the same in all of them.
            inside = ["sh", "-c", 'hostname twin; exec "$@"', "sh", *command]
            command = ["unshare", "--uts", "--pid", "--fork", "--kill-child=KILL", *inside]
        with worker.log.open("wb") as log:
            worker.process = start(command, env=env, stderr=log)
        worker.pid = worker.process.pid
        if worker.twin:
            wait_until(lambda: children_of(worker.process.pid) or not worker.alive, 10, "unshare has started sh")
            worker.pid = next(iter(children_of(worker.process.pid)), 0)


def faketime_installed() -> bool:
    """Whether a worker can be started with a wrong clock."""
    return _FAKETIME.exists()


def environment(uri: str, database: str, run: str, **settings: object) -> dict[str, str]:
    """The environment of workers on this database; `run` marks all their processes."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("DLTASK_")}
    env |= {
        "CHAOS_RUN": run,
        "DLTASK_MONGODB_URI": uri,
        "DLTASK_DATABASE": database,
        "DLTASK_CHILD_COMMAND": STANDIN,
        "DLTASK_LOG_FORMAT": "json",
        "DLTASK_GPU_DEVICES": "0",
        "DLTASK_HTTP_PORT": "off",
    }
    return env | {f"DLTASK_{name.upper()}": str(value) for name, value in settings.items()}


@contextmanager
def fleet(folder: Path, size: int, env: dict[str, str]) -> Iterator[Fleet]:
    """`size` workers with their disks and logs in `folder`, all serving; ended with the context."""
    made = Fleet(folder, size, env)
    try:
        made.start()
        yield made
    finally:
        if not made._stopping.is_set():
            with suppress(TimeoutError):
                made.stop()
            made.kill()
        made.unmount()
