"""What a newer version of the service has written is left alone: no claim, no sweep, no janitor touches it."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from bson import Decimal128, ObjectId
from pymongo.database import Database

from handlers.store import Store
from schemas.version import SCHEMA_VERSION
from service.janitor import remove_orphans
from service.show import why_waiting
from tests.helpers import Service, ended, train_request, wait_for

pytestmark = pytest.mark.anyio

Db = Database[dict[str, Any]]
NEWER = SCHEMA_VERSION + 1


def newer(db: Db, number: int, **fields: Any) -> dict[str, Any]:
    """Make a task, as a newer version might have written it."""
    key = ObjectId()
    written = {"admitted_id": key, "error_code": 0, "attempt": 0, "failures": 0, "create_time": datetime.now(UTC)}
    document = {"_id": key, **train_request(number), **written, "schema_version": NEWER, **fields}
    document["param_request"]["device_num"] = 1
    db.DL_TASK.insert_one(document)
    return document


async def test_no_worker_of_this_version_touches_it(store: Store, db: Db, image_ids: list[ObjectId]) -> None:
    """Waiting, asked to be cancelled, or with a lease that is over; nor are devices kept free for it."""
    for schema in (NEWER, float(NEWER), Decimal128(str(NEWER)), 2**40):
        db.DL_TASK.delete_many({})
        newer(db, 1, status="PENDING", schema_version=schema)
        newer(db, 2, status="PENDING", cancel_requested=True, schema_version=schema)
        dead = {"owner": "dead", "attempt": 1, "lease_renewed_at": datetime(2000, 1, 1, tzinfo=UTC)}
        newer(db, 3, status="RUNNING", schema_version=schema, **dead)
        before = list(db.DL_TASK.find())
        assert await store.tasks.claim("w", {"CPU": 8}) is None
        assert await store.tasks.head("CPU", 8, 0) is None
        assert await store.tasks.cancel_waiting() == []
        assert await store.tasks.expired() == []
        assert await store.tasks.not_understood() == 3
        assert list(db.DL_TASK.find()) == before


async def test_what_says_no_higher_number_is_ours(store: Store, db: Db, image_ids: list[ObjectId]) -> None:
    """Documents of version 0.1.0 say none, and somebody may have written anything there."""
    for number, schema in enumerate((None, 1, SCHEMA_VERSION, "3", float("nan"), True, {"a": 9}, -5)):
        newer(db, number, status="PENDING", schema_version=schema)
    newer(db, 8, status="PENDING")
    db.DL_TASK.update_one({"task_id": 8}, {"$unset": {"schema_version": ""}})
    claimed = {document["task_id"] for _ in range(9) if (document := await store.tasks.claim("w", {"CPU": 1}))}
    assert claimed == set(range(9))
    assert await store.tasks.not_understood() == 0


async def test_the_janitor_keeps_its_files(store: Store, db: Db) -> None:
    """They may be named in fields that this version does not know; those of our tasks that nothing names go."""
    files = db["reports.files"]
    for number, status in ((1, "RUNNING"), (2, "SUCCEEDED")):
        newer(db, number, status=status)
        files.insert_one({"metadata": {"task_id": number}, "length": 0, "chunkSize": 1, "filename": "kept"})
    newer(db, 3, status="SUCCEEDED", schema_version=SCHEMA_VERSION)
    files.insert_one({"metadata": {"task_id": 3}, "length": 0, "chunkSize": 1, "filename": "orphan"})
    for _ in range(2):  # first they are noted, then removed
        await remove_orphans(store, older_than=0)
    assert files.distinct("filename") == ["kept"]


async def test_why_it_waits(db: Db) -> None:
    """`dltask status` says so, until a worker of that version is alive."""
    document = newer(db, 1, status="PENDING")
    ours: dict[str, Any] = {"_id": "w", "devices": {"CPU": 8}, "schema_version": SCHEMA_VERSION}
    old = {"_id": "v", "devices": {"CPU": 8}}
    now = datetime.now(UTC)
    expected = f"written by a newer version (schema {NEWER}); no live worker understands it"
    assert why_waiting(document, [document], [old, ours], now, waiting=1) == expected
    newest = {**ours, "schema_version": NEWER}
    assert why_waiting(document, [document], [old, ours, newest], now, waiting=1) == "position 1 of 1 in the queue"
    document["schema_version"] = "x"
    assert why_waiting(document, [document], [old], now, waiting=1) == "position 1 of 1 in the queue"


async def test_a_worker_says_it_and_goes_on(serve: Callable[..., Service], db: Db, image_ids: list[ObjectId]) -> None:
    """One line at its start; what it understands runs, and a test of a model that it does not is tried elsewhere."""
    newer(db, 1, status="PENDING")
    service = serve()
    db.DL_TASK.insert_one(train_request(2))
    assert ended(db, 2)["schema_version"] == SCHEMA_VERSION
    model = db.DL_MODEL.find_one({"task_id": 2})
    assert model is not None
    assert model["schema_version"] == SCHEMA_VERSION
    db.DL_MODEL.update_one({"task_id": 2}, {"$set": {"schema_version": NEWER}})
    test = {"task_type": "TEST", "dataset": "toy", "split": "train"}
    db.DL_TASK.insert_one({**train_request(3, model_name="ok:1"), **test})
    document = wait_for(lambda: db.DL_TASK.find_one({"task_id": 3, "failures": 1}))
    assert (document["status"], document["error"]["kind"]) == ("PENDING", "version")
    assert "upgrade it" in document["error"]["message"]
    untouched = db.DL_TASK.find_one({"task_id": 1})
    assert untouched is not None
    assert (untouched["status"], untouched["attempt"]) == ("PENDING", 0)
    said = [json.loads(line) for line in service.log.read_text().splitlines() if "newer version left alone" in line]
    assert [(line["level"], line["tasks"], line["schema_version"]) for line in said] == [("warning", 1, SCHEMA_VERSION)]
    worker = db.DL_WORKER.find_one({})
    assert worker is not None
    assert (worker["schema_version"], worker["lease_seconds"]) == (SCHEMA_VERSION, 45)
