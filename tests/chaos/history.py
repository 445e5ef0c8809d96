"""What happened to every task, from a change stream of the checker's own, and whether it was right."""

import threading
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pymongo import MongoClient
from pymongo.errors import PyMongoError

END_STATES = ("SUCCEEDED", "FAILED", "CANCELLED", "REJECTED")

#: What an owner writes; only while the task runs.
_OWNERS = ("progress", "snapshot", "json_mongodb_id", "lease_renewed_at")


@dataclass(frozen=True)
class Change:
    """A change of state, by the server's clock."""

    at: datetime
    status: str
    attempt: int
    owner: str | None


@dataclass
class Record:
    """One document of DL_TASK, as its events tell of it."""

    key: Any
    task_id: Any
    status: str | None = None
    attempt: int = 0
    owner: str | None = None
    kind: str | None = None
    task_type: str | None = None
    changes: list[Change] = field(default_factory=list)
    #: The collection was dropped or renamed before it ended: nobody has to answer it any more.
    dropped: bool = False

    @property
    def ends(self) -> list[str]:
        """The end states that it was in, one after the other."""
        return [change.status for change in self.changes if change.status in END_STATES]


class History:
    """Follows DL_TASK from now until it is stopped, through every fault."""

    def __init__(self, uri: str, database: str) -> None:
        self.records: dict[Any, Record] = {}
        #: What must not be, with the document that it befell.
        self.violations: list[str] = []
        self.events = 0
        self._by_key: dict[Any, Record] = {}
        self._uri, self._database = uri, database
        self._opened, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._follow, name="history")

    def start(self) -> None:
        """Begin; nothing that happens after this returns is missed."""
        self._thread.start()
        if not self._opened.wait(60):
            raise TimeoutError("the checker's change stream does not open")

    def stop(self) -> None:
        """Take in what has happened by now, and end."""
        self._stop.set()
        self._thread.join()

    def states(self) -> Counter[str]:
        """How many documents are in each state."""
        return Counter(str(record.status) for record in list(self.records.values()) if not record.dropped)

    def open(self) -> list[Record]:
        """The documents that have not ended."""
        return [r for r in list(self.records.values()) if not r.ends and not r.dropped]

    def _follow(self) -> None:
        pipeline = [{"$match": {"$or": [{"ns.coll": "DL_TASK"}, {"operationType": "dropDatabase"}]}}]
        token = None
        with MongoClient[dict[str, Any]](self._uri, tz_aware=True, appname="checker") as client:
            while True:
                try:
                    with client[self._database].watch(pipeline, resume_after=token, max_await_time_ms=200) as stream:
                        self._opened.set()
                        while True:
                            event = stream.try_next()
                            token = stream.resume_token
                            if event is not None:
                                self.events += 1
                                self._take_in(event)
                            elif self._stop.is_set():
                                return
                except PyMongoError as error:
                    if getattr(error, "code", None) in (280, 286):
                        self.violations.append(f"the checker itself lost history: {error}")
                        return

    def _take_in(self, event: dict[str, Any]) -> None:
        match event["operationType"]:
            case "insert" | "replace":
                document = event["fullDocument"]
                key = document["_id"]
                # What stands there as a state was copied or forged: it counts from the answer on.
                self.records[key] = Record(key, document.get("task_id"), task_type=document.get("task_type"))
            case "update":
                self._update(self.records[event["documentKey"]["_id"]], event)
            case "drop" | "rename" | "dropDatabase":
                for record in self.records.values():
                    record.dropped = record.dropped or not record.ends

    def _update(self, record: Record, event: dict[str, Any]) -> None:
        fields: dict[str, Any] = event["updateDescription"]["updatedFields"]
        removed: list[str] = event["updateDescription"]["removedFields"]
        if set(fields) == {"cancel_requested"}:
            return
        wrong = self.violations.append
        name = f"task {record.task_id}"
        if record.ends:
            wrong(f"{name} was changed after its end {record.ends}: {sorted(fields)} {removed}")
        answered = "admitted_id" in fields
        if answered:
            record.attempt = 0
        elif "attempt" in fields:
            if fields["attempt"] != record.attempt + 1 or fields.get("status") != "RUNNING":
                wrong(f"{name} went from attempt {record.attempt} to {fields['attempt']}, {fields.get('status')}")
            record.attempt = fields["attempt"]
        if "owner" in removed:
            record.owner = None
        record.owner = fields.get("owner", record.owner)
        record.kind = (fields.get("error") or {}).get("kind", record.kind)
        if "status" in fields:
            record.status = str(fields["status"])
            record.changes.append(Change(event["wallTime"], record.status, record.attempt, record.owner))
            ended = record.status in END_STATES
            if ended != ("end_time" in fields):
                wrong(f"{name} became {record.status} {'without' if ended else 'with'} an end_time")
        else:
            if "end_time" in fields:
                wrong(f"{name} got an end_time while {record.status}")
            if record.status != "RUNNING" and any(field.split(".")[0] in _OWNERS for field in (*fields, *removed)):
                wrong(f"{name} was written to by an owner while {record.status}: {sorted(fields)}")
        # The whole part of the stand-in child's loss is its attempt.
        loss = fields.get("progress.loss", (fields.get("progress") or {}).get("loss"))
        if loss is not None and int(loss) != record.attempt and not answered:
            wrong(f"{name} has progress of attempt {int(loss)} during attempt {record.attempt}")
