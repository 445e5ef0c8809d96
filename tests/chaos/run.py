"""One run: everything started, tasks and faults for a while, then quiet, then the verdict."""

import random
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import structlog
from pymongo import MongoClient

from tests.chaos import verdict
from tests.chaos.client import Client
from tests.chaos.cluster import Cluster, cluster
from tests.chaos.faults import Fault, Faults
from tests.chaos.fleet import Fleet, environment, fleet
from tests.chaos.history import History
from tests.chaos.processes import wait_until
from tests.chaos.pulse import Pulse

log: structlog.stdlib.BoundLogger = structlog.get_logger()

DATABASE = "dl"
LEASE_SECONDS = 12.0
SWEEP_SECONDS = 1.0
#: Seconds without progress until a child is taken for hung.
SILENCE_SECONDS = 6.0
#: Tasks a second that the client inserts, on average; it waits while so many have not ended.
_RATE = 3.0
_BACKLOG = 60
#: Mean seconds between two faults of a lane.
_WORKER_GAP, _DATABASE_GAP = 3.0, 8.0
#: Seconds without a fault of the database, before each round of them.
_CALM_SECONDS = 60.0
#: Seconds that what has not ended may take once the faults are over: a task tried again often waits five minutes.
_QUIET_SECONDS = 420.0
#: Seconds after a fault of the database in which leases may not be judged: an operation's time-out, two renewals.
_UNJUDGED_SECONDS = 26.0
#: What a loaded machine may add to the time until a task is taken over.
_NOISE_SECONDS = 4.0


def run(folder: Path, *, seconds: float, seed: int, workers: int) -> dict[str, Any]:
    """Run for `seconds` with faults, and until all is quiet; returns the report (see `_report`)."""
    mark = uuid.uuid4().hex
    with cluster(folder / "mongo") as mongo:
        env = environment(
            mongo.uri,
            DATABASE,
            mark,
            lease_seconds=LEASE_SECONDS,
            sweep_seconds=SWEEP_SECONDS,
            child_silence_seconds=SILENCE_SECONDS,
            grace_seconds=3,
            cpu_devices=2,
        )
        history = History(mongo.uri, DATABASE)
        history.start()
        try:
            with (
                MongoClient[dict[str, Any]](mongo.uri, tz_aware=True, appname="client", timeoutMS=30_000) as connection,
                fleet(folder / "workers", workers, env) as crew,
            ):
                return _run(mongo, crew, history, connection[DATABASE], mark, seconds=seconds, seed=seed)
        finally:
            history.stop()


def _run(
    mongo: Cluster, crew: Fleet, history: History, db: Any, mark: str, *, seconds: float, seed: int
) -> dict[str, Any]:
    client = Client(db, seed)
    client.prepare()
    client.train_first()
    pulse = Pulse(mongo.uri)
    pulse.start()
    wait_until(lambda: history.records and not history.open(), 60, "the first training has ended")
    faults = Faults(crew, mongo, db, client, seed=seed, lease_seconds=LEASE_SECONDS, silence_seconds=SILENCE_SECONDS)
    for line in faults.left_out:
        log.warning("fault left out", what=line)
    until = time.time() + seconds

    def insert() -> None:
        pause = random.Random(f"pauses {seed}")
        while time.time() < until:
            if len(history.open()) < _BACKLOG:
                client.insert_some()
            time.sleep(pause.expovariate(_RATE))

    def lane(name: str, of: dict[str, Fault], **pauses: float) -> threading.Thread:
        return threading.Thread(target=faults.run_lane, args=(name, of), kwargs={"until": until, **pauses}, name=name)

    lanes = [
        threading.Thread(target=insert, name="client"),
        lane("workers", faults.on_workers, gap=_WORKER_GAP),
        lane("database", faults.on_database, gap=_DATABASE_GAP, calm=min(_CALM_SECONDS, seconds / 10)),
    ]
    for thread in lanes:
        thread.start()
    while any(thread.is_alive() for thread in lanes):
        time.sleep(min(30, seconds))
        log.info("chaos", left=round(until - time.time()), states=dict(history.states()), faults=faults.counts.total())
    mongo.heal()
    client.ask_for_cancels()
    try:
        wait_until(lambda: not history.open(), _QUIET_SECONDS, "every task has ended")
    except TimeoutError as error:
        log.error("chaos", reason=str(error), open=[str(record) for record in history.open()[:5]])  # noqa: TRY400
    exits = crew.stop()
    history.stop()
    pulse.stop()
    return _report(mongo, crew, history, client, faults, pulse, db, mark, exits, seconds=seconds, seed=seed)


def _report(
    mongo: Cluster,
    crew: Fleet,
    history: History,
    client: Client,
    faults: Faults,
    pulse: Pulse,
    db: Any,
    mark: str,
    exits: list[int],
    *,
    seconds: float,
    seed: int,
) -> dict[str, Any]:
    """The counts, and under `problems` what they count."""
    troubles = [*faults.intervals, *pulse.silences]
    taken = verdict.takeovers(crew.deaths, history, troubles, after=_UNJUDGED_SECONDS)
    undisturbed = [takeover.seconds for takeover in taken if not takeover.excused]
    allowed = LEASE_SECONDS + SWEEP_SECONDS + _NOISE_SECONDS
    problems = {
        "lost": verdict.lost(client, history),
        "doubled": verdict.doubled(history, db),
        "orphans": verdict.orphaned_processes(mark) + anyio.run(verdict.orphaned_files, mongo.uri, DATABASE, db),
        "violations": history.violations,
        "unexpected": verdict.unexpected(client, history),
        "late": [str(takeover) for takeover in taken if takeover.seconds > allowed + takeover.excused],
        "untold": verdict.untold(history, db, crew),
        "bugs": verdict.bugs(crew),
        "exits": [f"a worker ended with {code} at the end" for code in exits if code != 0],
    }
    for kind, found in problems.items():
        for line in found[:10]:
            log.error("problem", kind=kind, what=line)
    for line in faults.failed:
        log.warning("fault not done", what=line)
    scripts = Counter(request.script for request in client.requests.values() if request.key in history.records)
    ended = verdict.states(history.records.values())
    counts = {kind: len(found) for kind, found in problems.items()}
    return {
        "seconds": seconds,
        "seed": seed,
        "workers": len(crew.workers),
        "tasks": len(history.records),
        **counts,
        "ended": ended,
        "attempts": sum(record.attempt for record in history.records.values()),
        "worker_deaths": len(crew.deaths),
        "takeovers": len(taken),
        "takeovers_undisturbed": len(undisturbed),
        "longest_undisturbed_seconds": round(max(undisturbed, default=0), 1),
        "database_silent_seconds": round(sum(silence.end - silence.begin for silence in pulse.silences)),
        "worker_mb": round(max(worker.peak_mb for worker in crew.workers)),
        "faults": dict(sorted(faults.counts.items())),
        "faults_not_done": len(faults.failed),
        "faults_left_out": faults.left_out,
        "scripts": dict(sorted(scripts.items())),
        "good": not any(counts.values()),
    }
