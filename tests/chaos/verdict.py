"""The invariants, checked once nothing happens any more."""

import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from bson import ObjectId
from pymongo.database import Database

from handlers.store import connect_store
from service.janitor import remove_orphans
from tests.chaos.client import SCRIPTS, Client
from tests.chaos.faults import Interval
from tests.chaos.fleet import Death, Fleet
from tests.chaos.history import END_STATES, History, Record
from tests.chaos.processes import with_variable

_BUCKETS = ("models", "messages", "reports")

#: Seconds that a worker may take from the end of a task to the storing of its last log lines, the database being away.
_UNSAID_SECONDS = 30.0

_TAKEN = "task taken back"

#: Log lines that are no fault of a task, a worker or the database, but ours.
_BUGS = ("bug in", "Traceback", "no task any more")


@dataclass(frozen=True)
class Takeover:
    """A task that lost its worker: seconds until its next state, and for how many of them the database had a fault."""

    task_id: Any
    owner: str
    died: datetime
    seconds: float
    excused: float


def lost(client: Client, history: History) -> list[str]:
    """Documents that the server has acknowledged and that came to no end."""
    found = []
    for request in client.requests.values():
        record = history.records.get(request.key)
        if record is None:
            if request.acknowledged:
                found.append(f"task {request.task_id} ({request.script}): its insert was never seen")
        elif not record.dropped and not record.ends:
            found.append(f"task {request.task_id} ({request.script}): {record.status}, attempt {record.attempt}")
    return found


def doubled(history: History, db: Database[dict[str, Any]]) -> list[str]:
    """Tasks that ended more than once, or whose trainings and models do not go one to one."""
    found = []
    models: dict[Any, list[dict[str, Any]]] = {}
    for model in db.DL_MODEL.find():
        models.setdefault(model["task_id"], []).append(model)
    for record in history.records.values():
        if len(record.ends) > 1:
            found.append(f"task {record.task_id} ended as {record.ends}")
        made = [model["attempt"] for model in models.pop(record.task_id, [])]
        trained = record.task_type == "TRAIN" and record.ends == ["SUCCEEDED"]
        if made != ([record.attempt] if trained else []):
            found.append(f"task {record.task_id} ({record.status}, attempt {record.attempt}) has models of {made}")
    found += [f"a model of task {task_id}, which nobody inserted" for task_id in models]
    for name in db.DL_MODEL.distinct("model_name"):
        versions = sorted(model["version"] for model in db.DL_MODEL.find({"model_name": name}))
        if versions != list(range(1, len(versions) + 1)):
            found.append(f"model {name} has versions {versions}")
    return found


def unexpected(client: Client, history: History) -> list[str]:
    """Tasks that ended otherwise than their kind should, faults of workers and database or not."""
    found = []
    for request in client.requests.values():
        record, script = history.records.get(request.key), SCRIPTS[request.script]
        if record is None or record.dropped or not record.ends:
            continue
        if record.ends[0] not in script.ends or (record.ends[0] == "FAILED" and record.kind not in script.kinds):
            found.append(f"task {request.task_id} ({request.script}): {record.ends[0]} {record.kind}")
    return found


def takeovers(deaths: Iterable[Death], history: History, faults: Iterable[Interval], *, after: float) -> list[Takeover]:
    """What became of the tasks of workers that died.

    `after`: seconds after a fault of the database in which no lease is judged.
    """
    spans = _joined((fault.begin, fault.end + after) for fault in faults if fault.lane == "database")
    found = []
    for death in deaths:
        for record in history.records.values():
            for change, following in zip(record.changes, record.changes[1:], strict=False):
                until = following.at.timestamp()
                if change.owner != death.owner or change.status != "RUNNING" or until < death.at:
                    continue
                died = datetime.fromtimestamp(death.at, UTC)
                excused = sum(max(0.0, min(end, until) - max(begin, death.at)) for begin, end in spans)
                found.append(Takeover(record.task_id, death.owner, died, until - death.at, excused))
    return found


def _joined(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time, in spans that do not overlap."""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def untold(history: History, db: Database[dict[str, Any]], fleet: Fleet) -> list[str]:
    """Tasks that ran and whose stored log does not say how the last attempt ended.

    A worker that was killed right after it had written the end, its own task's or that of one lost before it, could not
    say it any more.
    """
    found = []
    killed = {death.owner: death.at for death in fleet.deaths if death.exit_code != 0}
    took = {
        (event["task_id"], event["attempt"]): str(event["owner"])
        for _, event in fleet.logs()
        if event.get("event") == _TAKEN and {"task_id", "attempt", "owner"} <= event.keys()
    }
    logs = {document["_id"]: document["lines"] for document in db.DL_TASK_LOG.find()}
    for record in history.records.values():
        if record.dropped or not record.attempt or not record.ends:
            continue
        owner = next((change.owner for change in reversed(record.changes) if change.owner), "")
        tellers = (owner, took.get((str(record.task_id), record.attempt), ""))
        end = record.changes[-1].at.timestamp()
        if any(0 <= killed.get(teller, 0) - end <= _UNSAID_SECONDS for teller in tellers):
            continue
        told = [event for event in map(_event, logs.get(record.task_id, [])) if event]
        # Of an attempt that was killed within its first seconds, the one that took the task back tells.
        of_last = [str(event["event"]) for event in told if event.get("attempt") == record.attempt]
        if not any(event.startswith("task ") and event != "task claimed" for event in of_last):
            found.append(f"task {record.task_id} ({record.status}, attempt {record.attempt}): {len(told)} lines")
    return found


def _event(line: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(line))
    except ValueError:
        return None  # cut to its longest


async def orphaned_files(uri: str, name: str, db: Database[dict[str, Any]]) -> list[str]:
    """What the janitor leaves of files that nothing names, and names of files that are not there."""
    async with connect_store(uri, name) as store:
        while await remove_orphans(store, older_than=0):
            pass
    named = {"models": set[Any](), "messages": set[Any](), "reports": set[Any]()}
    for task in db.DL_TASK.find({}, {"snapshot": 1, "json_mongodb_id": 1, "result.reports": 1}):
        named["models"].add((task.get("snapshot") or {}).get("file_id"))
        named["messages"].add(_object_id(task.get("json_mongodb_id")))
        named["reports"] |= {_object_id(i) for i in ((task.get("result") or {}).get("reports") or {}).values()}
    models = list(db.DL_MODEL.find({}, {"file_id": 1, "weights_file_id": 1}))
    registered = {model[name] for model in models for name in ("file_id", "weights_file_id")}
    named["models"] |= registered
    found = []
    for bucket in _BUCKETS:
        files = set(db[f"{bucket}.files"].distinct("_id"))
        chunks = set(db[f"{bucket}.chunks"].distinct("files_id"))
        found += [f"{bucket}: a file that nothing names: {i}" for i in files - named[bucket]]
        found += [f"{bucket}: chunks without a file: {i}" for i in chunks - files]
    missing = registered - set(db["models.files"].distinct("_id"))
    found += [f"models: a registered model without its file: {i}" for i in missing]
    return found


def _object_id(value: object) -> ObjectId | None:
    return ObjectId(value) if isinstance(value, str) and ObjectId.is_valid(value) else None


def orphaned_processes(run: str, seconds: float = 10) -> list[str]:
    """Processes of this run that are still there `seconds` after all workers have ended."""
    deadline = time.monotonic() + seconds
    while (left := with_variable(f"CHAOS_RUN={run}")) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [f"process {pid}" for pid in left]


def bugs(fleet: Fleet) -> list[str]:
    """Log lines that must not be: exceptions nobody has thought of."""
    return [f"{file}: {json.dumps(event)[:1500]}" for file, event in fleet.logs() if _is_bug(event)]


def _is_bug(event: dict[str, Any]) -> bool:
    text = str(event.get("event"))
    if event.get("level") == "no JSON":
        return bool(text) and not text.startswith("unshare:")
    return event.get("level") == "critical" or any(bug in text for bug in _BUGS)


def states(records: Iterable[Record]) -> dict[str, int]:
    """How many tasks ended in each state; `dropped` went with their collection."""
    counted = Counter("dropped" if record.dropped else str(record.status) for record in records)
    return {state: counted[state] for state in (*END_STATES, "dropped") if counted[state]}
