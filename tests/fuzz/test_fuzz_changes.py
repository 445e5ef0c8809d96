"""Documents are changed by hand while they wait and run: it may harm their own task, and no other."""

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from bson import MaxKey
from hypothesis import strategies as st
from pymongo.database import Database
from pymongo.errors import PyMongoError

from schemas.task import SERVICE_FIELDS
from tests.fuzz.conftest import Fuzz, Platform
from tests.fuzz.hostile import CLIENT_FIELDS, NUMBERS, VALUES, drawn
from tests.fuzz.raw_bson import raw_document
from tests.fuzz.test_fuzz_documents import look
from tests.fuzz.watching import assert_calm
from tests.helpers import END_STATES, Service, ended, train_request, wait_for

Db = Database[dict[str, Any]]

#: What a run reads of its document, or writes into it, below its fields.
INSIDE = (
    *("param_request.device_num", "param_request.device_type", "param_request.model_name", "param_request.batch_size"),
    *("param_request.max_num_iters", "progress.iteration", "progress.max_num_iters", "progress.loss"),
    *("snapshot.file_id", "snapshot.iteration", "snapshot.sha256", "history.0", "history.0.at", "error.kind"),
)

#: Two of three victims do more than to succeed.
BEHAVIOURS = ("ok", "once-crash", "memory", "crash", "data", "ok")


@st.composite
def changes(draw: st.DrawFn) -> dict[str, Any]:
    """An update of one field, or of a few."""
    # A higher schema_version is no damage but an order: to leave the document alone.
    services = [name for name in SERVICE_FIELDS if name != "schema_version"]
    names = st.sampled_from([*services, *services, *CLIENT_FIELDS, *INSIDE])
    values = VALUES | st.sampled_from([*NUMBERS, "PENDING", "RUNNING", "SUCCEEDED", True, "yes", MaxKey()])
    if draw(st.integers(0, 3)) == 0:
        return {"$unset": dict.fromkeys(draw(st.lists(names, min_size=1, max_size=3, unique=True)), "")}
    return {"$set": raw_document(draw(st.dictionaries(names, values, min_size=1, max_size=2)))}


def test_changes_of_any_content(
    fuzz: Fuzz, db: Db, platform: Platform, serve: Callable[..., Service], dltask: Callable[..., Any]
) -> None:
    """Random updates of waiting and running documents, and replacements of them. The service lives, has no exception in
    its log, runs all tasks that nobody touches, and ends in peace; what was changed into no task ends with a reason."""
    began, chance = time.monotonic(), random.Random(fuzz.seed)
    count = max(300, fuzz.documents // 5)
    updates = drawn(changes(), count, fuzz.seed)
    numbers = itertools.count(1)
    service = serve(cpu_devices=4, lease_seconds=3)
    victims: list[Any] = []
    bystanders: list[int] = []
    refused = matched = 0

    def insert() -> None:
        """Three to be changed, in front of the queue, and one that nobody touches."""
        for behaviour in chance.sample(BEHAVIOURS, 3):
            fields = {"iterations": 15, "max_attempts": 2, "priority": 5}
            victims.append(
                db.DL_TASK.insert_one(train_request(next(numbers), model_name=behaviour, **fields)).inserted_id
            )
        bystanders.append(next(numbers))
        db.DL_TASK.insert_one(train_request(bystanders[-1], iterations=2))

    insert()
    for place, update in enumerate(updates):
        if place % 12 == 0:
            insert()
        # Mostly one that waits or runs: among the newest.
        key = chance.choice(victims[-9:])
        try:
            if place % 40 == 39:
                matched += db.DL_TASK.replace_one({"_id": key}, train_request(next(numbers))).matched_count
            else:
                matched += db.DL_TASK.update_one({"_id": key}, update).matched_count
        except PyMongoError:
            refused += 1
        time.sleep(0.01)  # so that it meets tasks in all their states
        assert service.process.poll() is None, service.log.read_text()[-5000:]

    # Behind everything that can still run, whatever its priority has become.
    bystanders.append(next(numbers))
    db.DL_TASK.insert_one(train_request(bystanders[-1], priority=-(2**31)))

    untouched = {"task_id": {"$in": bystanders}}

    def all_ended() -> bool:
        # What was changed into a run of years is cancelled.
        long = [{name: {"$gt": 100}} for name in ("param_request.max_num_iters", "progress.iteration")]
        unfinished = {"status": {"$in": ["PENDING", "RUNNING"]}, "$or": long}
        db.DL_TASK.update_many(unfinished, {"$set": {"cancel_requested": True}})
        time.sleep(0.5)
        return db.DL_TASK.count_documents({**untouched, "status": {"$in": END_STATES}}) == len(bystanders)

    wait_for(all_ended, 120 + count / 5)
    assert db.DL_TASK.count_documents({**untouched, "status": "SUCCEEDED"}) == len(bystanders)
    dltask("status")
    dltask("status", "--json")
    assert service.stop() == 0
    assert_calm(service)
    known = (*END_STATES, "PENDING", "RUNNING", "NEW")
    states = Counter(one.state if one.state in known else "other" for one in look(db).values())
    fuzz.say(
        fuzz="changes",
        seed=fuzz.seed,
        changes=count,
        made=matched,
        refused_by_server=refused,
        untouched=len(bystanders),
        states=dict(states),
        seconds=round(time.monotonic() - began),
    )


@pytest.mark.parametrize(
    "hostile", [{"attempt": [1]}, {"param_request.device_num": [1, 5]}, {"not_before": "x"}], ids=str
)
def test_a_worker_of_several_devices_looks_past_it(
    serve: Callable[..., Service], db: Db, platform: Platform, hostile: dict[str, Any]
) -> None:
    """The first of the queue is none that can be counted or compared, while a device is free and another busy."""
    service = serve(cpu_devices=2)
    db.DL_TASK.insert_one(train_request(1, iterations=100))
    first = train_request(2, model_name="ok", priority=9)
    key = db.DL_TASK.insert_one(first).inserted_id
    db.DL_TASK.update_one({"_id": key}, {"$set": hostile})
    db.DL_TASK.insert_one(train_request(3))
    assert ended(db, 3)["status"] == "SUCCEEDED"
    assert service.stop() == 0
    assert_calm(service)
