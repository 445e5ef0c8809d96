"""How soon the service is itself again after a fault, on a replica set of three real members with real workers.

Prints, in one run: the rate of no-op tasks after repeated worker kills and after a restart of the whole database, as a
share of the undisturbed rate just before; the time from a SIGKILL of the primary to the next task admitted, beside the
floor (the same until a bare client's insert is acknowledged); the time from a worker's SIGKILL and SIGTERM to its task
running elsewhere; and whether a database that is away for minutes costs a healthy worker its running task. Children are
the tests' stand-in. Everything by default takes about 25 minutes; choose with `--only`.
"""

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bson import ObjectId
from pymongo import MongoClient
from pymongo.errors import PyMongoError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the replica set and the workers of the tests

from tests.chaos.client import Client
from tests.chaos.cluster import Cluster, cluster
from tests.chaos.fleet import Fleet, Worker, environment, fleet
from tests.chaos.history import History
from tests.chaos.processes import wait_until
from tests.helpers import train_request

DATABASE = "dl"
_LEASE_SECONDS, _SWEEP_SECONDS = 45.0, 5.0
#: No-op tasks that wait at every moment, and how long a rate is measured.
_BACKLOG, _WINDOW_SECONDS = 60, 30.0
#: Seconds from the end of a fault to the measurement of the rate after it.
_SETTLE_SECONDS = 10.0


@dataclass
class Bench:
    """A running fleet on a running replica set."""

    mongo: Cluster
    crew: Fleet
    history: History
    db: Any
    number: int = 0

    def insert(self, iterations: int = 1, **fields: Any) -> ObjectId:
        """Insert a task, again until the server has it; returns its `_id`."""
        self.number += 1
        key = ObjectId()
        document = train_request(self.number, model_name=f"ok.{self.number % 50}", iterations=iterations, _id=key)
        while True:
            try:
                self.db.DL_TASK.insert_one(document | fields)
            except PyMongoError as error:
                if getattr(error, "code", None) != 11000:
                    continue
            return key

    def first(self, key: ObjectId, status: str, *, attempt: int | None = None, seconds: float = 120) -> float:
        """When the task first was in that state (of that attempt), by the server's clock."""
        found: list[float] = []

        def look() -> bool:
            record = self.history.records.get(key)
            for change in list(record.changes) if record else []:
                if change.status == status and attempt in (None, change.attempt):
                    found.append(change.at.timestamp())
                    return True
            return False

        wait_until(look, seconds, f"{key} is {status}")
        return found[0]

    def worker_of(self, key: ObjectId) -> Worker:
        """The worker that runs the task."""
        owner = self.history.records[key].owner
        return next(worker for worker in self.crew.workers if worker.owner() == owner)


@contextmanager
def running(workers: int) -> Iterator[Bench]:
    """Everything started, one device for each worker."""
    with tempfile.TemporaryDirectory(prefix="dltask-recovery-") as folder, cluster(Path(folder) / "mongo") as mongo:
        settings = {"lease_seconds": _LEASE_SECONDS, "sweep_seconds": _SWEEP_SECONDS, "cpu_devices": 1}
        env = environment(mongo.uri, DATABASE, uuid.uuid4().hex, **settings)
        history = History(mongo.uri, DATABASE)
        history.start()
        with (
            MongoClient[dict[str, Any]](mongo.uri, appname="client", timeoutMS=30_000) as client,
            fleet(Path(folder) / "workers", workers, env) as crew,
        ):
            Client(client[DATABASE], 0).prepare()
            try:
                yield Bench(mongo, crew, history, client[DATABASE])
            finally:
                history.stop()


def spread(name: str, values: list[float], unit: str = "s") -> str:
    """One line: median, least and most."""
    return (
        f"{name}: median {statistics.median(values):.2f} {unit}, "
        f"{min(values):.2f} … {max(values):.2f}, {len(values)} times"
    )


def rates(rounds: int) -> dict[str, Any]:
    """Tasks a second, undisturbed and after faults, in pairs."""
    shares: dict[str, list[float]] = {"worker kills": [], "database restart": []}
    with running(4) as bench:
        stop = threading.Event()

        def feed() -> None:
            while not stop.is_set():
                waiting = bench.history.states()["PENDING"]
                for _ in range(_BACKLOG - waiting):
                    bench.insert()
                time.sleep(0.05)

        def rate() -> float:
            before, began = _ended(bench), time.monotonic()
            time.sleep(_WINDOW_SECONDS)
            return (_ended(bench) - before) / (time.monotonic() - began)

        def kills() -> None:
            rng = random.Random(1)
            for _ in range(12):
                bench.crew.kill_one(rng.choice(bench.crew.workers))
                time.sleep(2)
            bench.crew.wait_ready()

        feeder = threading.Thread(target=feed)
        feeder.start()
        try:
            time.sleep(10)
            faults: dict[str, Callable[[], None]] = {"worker kills": kills, "database restart": bench.mongo.restart_all}
            for _ in range(rounds):
                for name, fault in faults.items():
                    undisturbed = rate()
                    fault()
                    time.sleep(_SETTLE_SECONDS)
                    after = rate()
                    shares[name].append(after / undisturbed)
                    print(f"  {name}: {undisturbed:.1f} tasks/s before, {after:.1f} after", flush=True)
        finally:
            stop.set()
            feeder.join()
    for name, values in shares.items():
        print(spread(f"rate {_SETTLE_SECONDS:g} s after {name}, share of the undisturbed rate", values, ""))
    return {f"share_after_{name.replace(' ', '_')}": round(statistics.median(v), 3) for name, v in shares.items()}


def _ended(bench: Bench) -> int:
    return sum(len(record.ends) for record in list(bench.history.records.values()))


def fail_over(times: int) -> dict[str, Any]:
    """From SIGKILL of the primary to a task inserted after it admitted, and to a bare insert acknowledged."""
    ours, floor = [], []
    with running(1) as bench, MongoClient[dict[str, Any]](bench.mongo.uri, timeoutMS=60_000) as bare:
        for _ in range(times):
            primary = bench.mongo.primary()
            killed = time.time()
            primary.kill()
            bare_insert = threading.Thread(
                target=lambda killed=killed: (
                    bare.other.probe.insert_one({}),
                    floor.append(time.time() - killed),
                )
            )
            bare_insert.start()
            ours.append(bench.first(bench.insert(), "PENDING") - killed)
            bare_insert.join()
            primary.start()
            bench.mongo.heal()
            time.sleep(2)
    print(spread("primary SIGKILL to next task admitted", ours))
    print(spread("  floor: to a bare client's insert acknowledged", floor))
    print(spread("  ratio", [a / b for a, b in zip(ours, floor, strict=True)], "x"))
    return {"failover_median": round(statistics.median(ours), 2), "failover_max": round(max(ours), 2)}


def takeovers(times: int) -> dict[str, Any]:
    """From SIGKILL and SIGTERM of a worker to its task running on another."""
    found: dict[str, list[float]] = {"SIGKILL": [], "SIGTERM": []}
    with running(4) as bench:
        for number in range(times):
            for kind, signal_number in (("SIGTERM", signal.SIGTERM), ("SIGKILL", signal.SIGKILL)):
                # One after the other, since a sweep takes back all at once.
                key = bench.insert(iterations=100_000)
                bench.first(key, "RUNNING")
                time.sleep(random.Random(number).uniform(1, 4))
                at = time.time()
                bench.worker_of(key).signal(signal_number)
                found[kind].append(bench.first(key, "RUNNING", attempt=2) - at)
                bench.db.DL_TASK.update_one({"_id": key}, {"$set": {"cancel_requested": True}})
                bench.first(key, "CANCELLED")
                bench.crew.wait_ready()
    for kind, values in found.items():
        print(spread(f"worker {kind} to its task running elsewhere", values))
    print(f"  lease + sweep: {_LEASE_SECONDS + _SWEEP_SECONDS:g} s")
    return {f"takeover_{kind.lower()}_max": round(max(values), 2) for kind, values in found.items()}


def outage(seconds: float) -> dict[str, Any]:
    """The database is away while every worker runs a task; afterwards each still runs its own, in its first attempt."""
    with running(4) as bench:
        keys = [bench.insert(iterations=100_000) for _ in bench.crew.workers]
        owners = []
        for key in keys:
            bench.first(key, "RUNNING")
            owners.append(bench.history.records[key].owner)
        time.sleep(5)
        bench.mongo.restart_all(away=seconds)
        time.sleep(2 * _LEASE_SECONDS)
        kept = [
            (record.status, record.attempt, record.owner) == ("RUNNING", 1, owner)
            for record, owner in zip((bench.history.records[key] for key in keys), owners, strict=True)
        ]
        bench.db.DL_TASK.update_many({}, {"$set": {"cancel_requested": True}})
        for key in keys:
            bench.first(key, "CANCELLED")
    print(f"database away for {seconds:g} s: {sum(kept)} of {len(kept)} running tasks still with their owners")
    return {"outage_seconds": seconds, "outage_kept": sum(kept), "outage_tasks": len(kept)}


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["rates", "failover", "takeover", "outage"])
    parser.add_argument("--rounds", type=int, default=3, help="of the rates")
    parser.add_argument("--times", type=int, default=20, help="how often the primary is killed")
    parser.add_argument("--takeovers", type=int, default=5, help="how often a worker is killed")
    parser.add_argument("--away", type=float, default=300, help="seconds of the outage")
    arguments = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "rates": lambda: rates(arguments.rounds),
        "failover": lambda: fail_over(arguments.times),
        "takeover": lambda: takeovers(arguments.takeovers),
        "outage": lambda: outage(arguments.away),
    }
    report: dict[str, Any] = {}
    for name, part in parts.items():
        if arguments.only in (None, name):
            report |= part()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
