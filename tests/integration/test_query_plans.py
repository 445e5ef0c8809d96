"""Claim, sweep and admission examine no more documents than they return plus a constant, however many there are.

The queries are those that a real worker sends, as the server's profiler saw them; what it says of each is what
`explain("executionStats")` counts, of the very execution.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import pytest
from pymongo.database import Database

from handlers.store import connect_store
from handlers.store.indexes import INDEXES
from tests.helpers import Service, ended, train_request, wait_for
from tests.many_tasks import fill, literal, params

Db = Database[dict[str, Any]]
Entry = dict[str, Any]

#: Task documents, of which a tenth wait. With DLTASK_PLAN_TASKS=1000000 half a minute goes into making them.
TASKS = int(os.environ.get("DLTASK_PLAN_TASKS", "100000"))
WAITING = TASKS // 10
#: What stands before all others in the queue: tasks for another device, and tasks whose retry is not due.
UNFIT, BACKING_OFF = TASKS // 10, 20
CANCELLED, LOST, NEW = 5, 8, 12
#: What any query may examine besides what it returns: all that runs, and all whose retry is not due.
CONSTANT = BACKING_OFF + 2 * LOST + 10

#: What stands in the queries of DL_TASK that must have been seen, lest the test pass because nothing was asked.
KINDS = {
    "claim": ("'findAndModify': 'DL_TASK'", "'sort': {'priority'", "'hint': 'claim'"),
    "head of the queue": ("'find': 'DL_TASK'", "'sort': {'priority'", "'hint': 'claim'"),
    "new documents": ("'filter': {'admitted_id': None",),
    "copies": ("'hint': 'admitted'",),
    "waiting, to be cancelled": ("'find': 'DL_TASK'", "'cancel_requested': True"),
    "leases that are over": ("'find': 'DL_TASK'", "'filter': {'status': 'RUNNING'"),
    "take back": ("'findAndModify': 'DL_TASK'", "'owner': {'$eq': 'dead'}"),
    "of a newer version": ("'aggregate': 'DL_TASK'", "'schema_version': {'$gt'"),
    "document to admit": ("'find': 'DL_TASK'", "'filter': {'_id': ObjectId"),
    "answer": ("'q': {'_id': ObjectId", "'admitted_id': '$_id', 'schema_version'"),
    "end": ("'q': {'_id': ObjectId", "'status': 'SUCCEEDED'"),
}


@pytest.fixture
def crowd(db: Db) -> int:
    """TASKS task documents, most of them ended; the number of the first one that waits for a CPU."""
    states = {"$arrayElemAt": [["SUCCEEDED", "FAILED", "CANCELLED"], {"$mod": ["$n", 3]}]}
    ends = {"status": states, "attempt": literal(1), "end_time": "$$NOW", "start_time": "$$NOW"}
    count = TASKS - WAITING - UNFIT - BACKING_OFF - CANCELLED - LOST
    fill(db, 0, count, **ends)
    first = literal(2)
    fill(db, count, UNFIT, priority=first, param_request=literal(params("GPU")))
    later = {"$add": ["$$NOW", 24 * 3600 * 1000]}
    fill(db, count := count + UNFIT, BACKING_OFF, priority=first, not_before=later)
    dead = {"status": literal("RUNNING"), "owner": literal("dead"), "attempt": literal(1)}
    fill(db, count := count + BACKING_OFF, LOST, **dead, lease_renewed_at="$create_time")
    fill(db, count := count + LOST, WAITING)
    fill(db, count + WAITING, CANCELLED, cancel_requested=literal(True))
    # Not left to the worker, whose calls end after 20 s; and faster now than kept up to date from the start.
    db.DL_TASK.create_indexes(list(INDEXES["DL_TASK"]))
    return count


def has(words: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether all the words stand in a text."""
    return lambda text: all(word in text for word in words)


def profiled(db: Db) -> list[Entry]:
    """What the server knows of each command of the worker that examined anything."""
    return list(db["system.profile"].find({"appName": "dltask", "docsExamined": {"$exists": True}}))


def unseen(db: Db) -> list[str]:
    """The KINDS of which no command has come to its end yet."""
    commands = [str(entry["command"]) for entry in profiled(db) if entry["ns"] == f"{db.name}.DL_TASK"]
    return [kind for kind, words in KINDS.items() if not any(map(has(words), commands))]


def examined(entry: Entry) -> tuple[int, int, int]:
    """Documents and keys that a command examined, and how many documents it returned or changed."""
    returned = max(entry.get(name, 0) for name in ("nreturned", "nMatched", "ndeleted"))
    return entry.get("docsExamined", 0), entry.get("keysExamined", 0), returned


async def test_a_claim_for_two_kinds_walks_past_no_other(mongo_uri: str, database_name: str, db: Db) -> None:
    """Of a worker with CPUs and too few GPUs, whether or not it runs anything: the keys of one kind at most."""
    fill(db, 0, 1000, param_request=literal(params("GPU", 8)), priority=literal(2))
    fill(db, 1000, 1000)
    fill(db, 2000, 10, param_request=literal(params("GPU")))
    async with connect_store(mongo_uri, database_name) as store:
        await store.indexes.create()
        db.command("profile", 2)
        for idle in (True, False):
            assert await store.tasks.claim("w", {"CPU": 1, "GPU": 4}, idle=idle) is not None
            assert await store.tasks.claim("w", {"CPU": 1, "GPU": 0}, idle=idle) is not None
        db.command("profile", 0)
    claims = [entry for entry in profiled(db) if has(KINDS["claim"])(str(entry["command"]))]
    # Of the eight-fold tasks each key is passed over; of the others none.
    assert [max(entry["keysExamined"] - 1000, 0) < CONSTANT for entry in claims] == [True] * 4
    assert [entry["docsExamined"] for entry in claims] == [1] * 4
    assert [entry["keysExamined"] for entry in claims if "GPU" not in str(entry["command"])] == [1, 1]


@pytest.mark.usefixtures("image_ids")
def test_no_query_examines_more_than_it_returns(db: Db, crowd: int, serve: Callable[..., Service]) -> None:
    """Through a worker's start, sweeps, admissions by sweep and by stream, claims, trainings, and its end.

    One exception, which examines keys alone: a worker that starts, or has lost the stream's history, reads the index
    `admitted` from end to end (`Tasks.copied_keys`). Not seen here: a claim passes over each key of a task that needs
    more devices of its kind than are free.
    """
    db.create_collection("system.profile", capped=True, size=256 << 20)
    requests = [train_request(2 * TASKS + number, iterations=1) for number in range(NEW)]
    db.DL_TASK.insert_many(requests[: NEW // 2])
    db.command("profile", 2)
    service = serve(cpu_devices=2, gpu_devices=0, lease_seconds=4)
    db.DL_TASK.insert_many([*requests[NEW // 2 :], {"task_id": "none"}])
    for number in range(crowd, crowd + 4):
        assert ended(db, number)["status"] == "SUCCEEDED"
    new = {"task_id": {"$in": [request["task_id"] for request in requests]}, "status": "PENDING"}
    wait_for(lambda: db.DL_TASK.count_documents(new) == NEW)
    lost = {"task_id": {"$gte": crowd - LOST, "$lt": crowd}, "failures": 1}
    wait_for(lambda: db.DL_TASK.count_documents(lost) == LOST)
    for number in range(crowd + WAITING, crowd + WAITING + CANCELLED):
        assert ended(db, number)["status"] == "CANCELLED"
    # The look for copies, and what comes after it, may take longer than all of this.
    with contextlib.suppress(pytest.fail.Exception):
        wait_for(lambda: not unseen(db), 60)
    assert service.stop() == 0
    db.command("profile", 0)
    assert unseen(db) == []
    beyond = []
    for entry in profiled(db):
        documents, keys, returned = examined(entry)
        copies = has(KINDS["copies"])(str(entry["command"]))
        too_many = documents > 0 if copies else max(documents, keys / 2) > returned + CONSTANT
        if too_many or entry.get("hasSortStage"):
            plan = f"{documents} documents and {keys} keys for {returned}, by {entry.get('planSummary')}"
            beyond.append(f"{plan}: {str(entry['command'])[:500]}")
    assert not beyond, "\n".join(beyond)
