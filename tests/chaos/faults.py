"""What befalls the workers and the database, drawn by a seed: two lanes of faults, side by side."""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from pymongo.database import Database
from pymongo.errors import PyMongoError

from tests.chaos.client import Client
from tests.chaos.cluster import Cluster
from tests.chaos.fleet import Fleet, Worker, faketime_installed
from tests.chaos.processes import children_of, send

log: structlog.stdlib.BoundLogger = structlog.get_logger()

#: A member that is frozen for longer than an election takes.
_FROZEN_SECONDS = 14
#: Seconds that a worker's disk is full.
_FULL_SECONDS = 4
#: Tasks inserted at once.
_STORM = 300

Fault = Callable[[random.Random], object]


@dataclass(frozen=True)
class Interval:
    """A fault from its beginning until all is well again, by the wall clock."""

    lane: str
    fault: str
    begin: float
    end: float


class Faults:
    """The faults, each a method that returns when it is over, and the lanes that draw them."""

    def __init__(
        self,
        fleet: Fleet,
        cluster: Cluster,
        db: Database[dict[str, Any]],
        client: Client,
        *,
        seed: int,
        lease_seconds: float,
        silence_seconds: float,
    ) -> None:
        self._fleet, self._cluster, self._db, self._client = fleet, cluster, db, client
        self._seed = seed
        self._lease_seconds = lease_seconds
        self._silence_seconds = silence_seconds
        self.counts: Counter[str] = Counter()
        self.intervals: list[Interval] = []
        #: What the harness itself could not do.
        self.failed: list[str] = []

    @property
    def on_workers(self) -> dict[str, Fault]:
        """Faults of processes, by name."""
        faults = {
            "worker SIGKILL": self.kill_worker,
            "worker SIGTERM": self.stop_worker,
            "worker SIGSTOP for longer than the lease": self.freeze_worker,
            "child SIGKILL": self.kill_child,
            "child SIGSTOP": self.freeze_child,
            "two workers of one identity": self.twins,
        }
        if faketime_installed():
            faults["worker's clock hours off"] = self.wrong_clock
        if self._fleet.disks_can_fill:
            faults["worker's disk full"] = self.fill_disk
        return faults

    @property
    def left_out(self) -> list[str]:
        """Faults that this machine cannot make, with what it lacks."""
        left = []
        if not faketime_installed():
            left.append("worker's clock hours off: Debian's package faketime is not installed")
        if not self._fleet.disks_can_fill:
            left.append("worker's disk full: needs root")
        return left

    @property
    def on_database(self) -> dict[str, Fault]:
        """Faults of the database, by name."""
        return {
            "primary SIGKILL": lambda rng: self._cluster.kill_primary(),
            "primary steps down": lambda rng: self._cluster.step_down(),
            "all members restarted": lambda rng: self._cluster.restart_all(),
            "a member frozen": lambda rng: self._cluster.freeze(self._cluster.some_member(rng), _FROZEN_SECONDS),
            "the primary frozen": lambda rng: self._cluster.freeze(self._cluster.primary(), _FROZEN_SECONDS),
            "connections cut mid-operation": self.cut,
            "change stream's history lost": lambda rng: self._cluster.lose_history(2 * len(self._fleet.workers)),
            "change streams killed by the server": lambda rng: self._cluster.kill_streams(),
            "collection dropped": lambda rng: self._db.drop_collection("DL_TASK"),
            "collection renamed": lambda rng: self._db.DL_TASK.rename(f"DL_TASK_{time.time_ns()}"),
            "snapshot damaged in GridFS": self.damage_snapshot,
            "insert storm": self.storm,
        }

    def run_lane(self, name: str, faults: dict[str, Fault], *, until: float, gap: float, calm: float = 0) -> None:
        """Draw from `faults` until that time: every one once, in a new order, and again.

        `gap` is the mean pause between two, `calm` the pause before each round, in seconds.
        """
        rng = random.Random(f"{name} {self._seed}")
        order: list[str] = []
        while time.time() < until:
            if not order:
                # Calm between two rounds: only then is it seen how soon a lost worker's tasks run elsewhere.
                time.sleep(min(calm, max(0, until - time.time())))
                order = rng.sample(sorted(faults), len(faults))
                continue
            fault = order.pop()
            begin = time.time()
            log.info("fault", lane=name, fault=fault)
            try:
                faults[fault](rng)
                self.counts[fault] += 1
            except (TimeoutError, PyMongoError, OSError) as error:
                # Two faults at once can keep one of them from being done.
                self.failed.append(f"{fault}: {error!r:.200}")
            self.intervals.append(Interval(name, fault, begin, time.time()))
            time.sleep(rng.uniform(0.2 * gap, 1.8 * gap))

    # ---- faults of processes

    def kill_worker(self, rng: random.Random) -> None:
        """As the kernel does it for want of memory, or a node that is gone."""
        self._fleet.kill_one(self._some(rng))

    def stop_worker(self, rng: random.Random) -> None:
        """As Kubernetes does it for a new version or a smaller fleet."""
        code = self._fleet.stop_one(self._some(rng))
        if code != 0:
            raise OSError(f"a worker ended with {code} after SIGTERM")

    def freeze_worker(self, rng: random.Random) -> None:
        """Until another has taken its tasks; then it goes on, as if nothing had happened."""
        worker = self._some(rng)
        worker.signal(signal.SIGSTOP)
        time.sleep(self._lease_seconds + 4)
        worker.signal(signal.SIGCONT)

    def kill_child(self, rng: random.Random) -> None:
        """SIGKILL to a child, at work or warm."""
        if (child := self._some_child(rng)) is not None:
            send(child, signal.SIGKILL)

    def freeze_child(self, rng: random.Random) -> None:
        """Until the watchdog takes it for hung."""
        if (child := self._some_child(rng)) is not None:
            send(child, signal.SIGSTOP)
            time.sleep(self._silence_seconds + 2)
            # One that was caught between its fork and its exec asks nobody yet to be ended with its worker.
            send(child, signal.SIGCONT)

    def wrong_clock(self, rng: random.Random) -> None:
        """Start a worker anew with a clock that is hours off; the next fault of this kind puts it right."""
        worker = self._some(rng)
        worker.clock = None if worker.clock else rng.choice(["-30h", "-5h", "+3h", "+30h"])
        self._fleet.stop_one(worker)

    def twins(self, rng: random.Random) -> None:
        """Start two workers anew that have the same host name and the same process number."""
        for worker in rng.sample(self._fleet.workers, 2):
            worker.twin = True
            self._fleet.stop_one(worker)
        self._fleet.wait_ready(60)
        time.sleep(rng.uniform(1, 4))
        for worker in self._fleet.workers:
            worker.twin = False  # from its next start on

    def fill_disk(self, rng: random.Random) -> None:
        """Leave no block free on a worker's disk for some seconds."""
        ballast = self._some(rng).disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * (1 << 18))
            except OSError:
                pass
        time.sleep(_FULL_SECONDS)
        ballast.unlink()

    def _some(self, rng: random.Random) -> Worker:
        ready = [worker for worker in self._fleet.workers if worker.ready]
        if not ready:
            raise TimeoutError("no worker serves")
        return rng.choice(ready)

    def _some_child(self, rng: random.Random) -> int | None:
        children = [child for worker in self._fleet.workers if worker.ready for child in children_of(worker.pid)]
        return rng.choice(children) if children else None

    # ---- faults of the database

    def cut(self, rng: random.Random) -> None:
        """Cut the workers' connections a few times in a row."""
        for _ in range(3):
            self._cluster.cut()
            time.sleep(rng.uniform(0.1, 1))

    def damage_snapshot(self, rng: random.Random) -> None:
        """Overwrite the snapshot of a running task, whose worker is killed, so that the next one has to read it."""
        deadline = time.monotonic() + 30
        while (found := self._db.DL_TASK.find_one({"status": "RUNNING", "snapshot": {"$exists": True}})) is None:
            if time.monotonic() > deadline:
                raise TimeoutError("no task runs that has a snapshot")
            time.sleep(0.2)
        chunk = {"files_id": found["snapshot"]["file_id"]}
        self._db["models.chunks"].update_many(chunk, {"$set": {"data": b"damaged"}})
        for worker in self._fleet.workers:
            if worker.owner() == found["owner"]:
                self._fleet.kill_one(worker)

    def storm(self, rng: random.Random) -> None:
        """Many tasks at once."""
        for _ in range(_STORM):
            self._client.insert_some(rng.choice(["ok", "rejected"]))
