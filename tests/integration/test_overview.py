"""What people read of DL_TASK: every document is reachable, by an index, and no document makes a page large."""

import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from bson import Decimal128, Int64, ObjectId
from pymongo.database import Database

from handlers.store import Store, connect_store, overview
from handlers.store.database import LOOK_SECONDS, StoreError
from handlers.store.expressions import TOO_LARGE
from handlers.store.overview import PAGE_ROWS, Row
from service.show import state
from tests.fuzz.raw_bson import Pairs, db_pointer, old_binary, raw_document, symbol, text

Db = Database[dict[str, Any]]
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def in_state(number: Any, status: str, **fields: Any) -> dict[str, Any]:
    """A document that was admitted, and is in this state."""
    key = ObjectId()
    return {
        "_id": key,
        "admitted_id": key,
        "task_id": number,
        "task_type": "TRAIN",
        "status": status,
        "error_code": 0,
        "priority": 0,
        "create_time": NOW,
        "param_request": {"model_name": "m", "device_type": "CPU", "device_num": 1},
        **fields,
    }


async def all_pages(store: Store, state: str | None = None) -> list[Row]:
    rows: list[Row] = []
    for number in range(1, 1000):
        page = await store.overview.page(state, number)
        assert len(page.rows) <= PAGE_ROWS
        rows += page.rows
        if not page.more:
            return rows
    raise AssertionError("the pages do not end")


@pytest.fixture
async def examined(db: Db) -> AsyncIterator[Any]:
    """Documents that each read of DL_TASK fetched, and bytes of its answer, once it is called."""
    db.create_collection("system.profile", capped=True, size=64_000_000)
    db.command("profile", 2)

    def read() -> list[tuple[int, int]]:
        found = db["system.profile"].find({"ns": f"{db.name}.DL_TASK", "op": {"$in": ["command", "query"]}})
        return [(entry.get("docsExamined", 0), entry["responseLength"]) for entry in found]

    yield read
    db.command("profile", 0)


async def test_the_list_is_as_people_look_for_it(store: Store, db: Db, examined: Any) -> None:
    """What runs, what is new, what waits, as it is claimed, what has ended; no more is read than was asked for."""
    for number, status in enumerate(("SUCCEEDED", "RUNNING", "PENDING", "PENDING", "PENDING", "FAILED")):
        more = {"priority": int(number == 4), "create_time": NOW.replace(hour=10 + number), "history": [1]}
        db.DL_TASK.insert_one(in_state(number, status, **more))
    db.DL_TASK.insert_one({"task_id": Int64(9)})
    found = await store.overview.listed(10)
    assert [document["task_id"] for document in found] == [1, 9, 4, 2, 3, 5, 0]
    assert not any("history" in document for document in found)
    assert [document["task_id"] for document in await store.overview.listed(3)] == [1, 9, 4]
    first, waiting = await store.overview.queue()
    assert ([document["_id"] for document in first], waiting) == ([found[place]["_id"] for place in (2, 3, 4)], 3)
    db.DL_TASK.insert_many([in_state(number, "CANCELLED") for number in range(100, 2000)])
    before = len(examined())
    assert len(await store.overview.listed(20)) == 20
    assert sum(documents for documents, _ in examined()[before:]) <= 20


async def test_pages_reach_every_task_and_fetch_no_other(store: Store, db: Db, examined: Any) -> None:
    """Two thousand tasks: each on one page of all and on one of its state, and each page fetches its own only."""
    states = ["SUCCEEDED", "FAILED", "PENDING", "CANCELLED"]
    db.DL_TASK.insert_many([in_state(number, states[number % 4]) for number in range(2000)])
    assert [row.document["task_id"] for row in await all_pages(store)] == list(range(1999, -1, -1))
    failed = await all_pages(store, "FAILED")
    assert [row.document["task_id"] for row in failed] == list(range(1997, 0, -4))
    assert max(documents for documents, _ in examined()) == PAGE_ROWS + 1
    assert max(length for _, length in examined()) < 100_000
    beyond = await store.overview.page(None, 99)
    assert (beyond.rows, beyond.more) == ((), False)


async def test_counts_come_from_indexes(store: Store, db: Db, examined: Any) -> None:
    """Each state's number, whatever else stands in `status`; no document is fetched for it but new ones."""
    states = ["SUCCEEDED"] * 300 + ["PENDING"] * 20 + ["REJECTED"] * 7
    db.DL_TASK.insert_many([in_state(number, status) for number, status in enumerate(states)])
    strange: list[Any] = [["RUNNING", "x"], {"a": 1}, None, 5]
    db.DL_TASK.insert_many([{"task_id": 1000 + place, "status": value} for place, value in enumerate(strange)])
    counts = await store.overview.counts()
    assert counts["NEW"] == 4
    assert (counts["SUCCEEDED"], counts["PENDING"], counts["REJECTED"]) == (300, 20, 7)
    assert counts["FAILED"] == 0
    assert sum(documents for documents, _ in examined()) <= 6
    assert await store.overview.total() == 331


async def test_the_queue_and_what_runs(store: Store, db: Db) -> None:
    """The waiting in the order of claims, as many as asked for; the running ones newest first."""
    for number, priority in enumerate((0, 5, 0, 9)):
        db.DL_TASK.insert_one(in_state(number, "PENDING", priority=priority, create_time=NOW.replace(minute=number)))
    db.DL_TASK.insert_many([in_state(number, "RUNNING") for number in (10, 11)])
    waiting = await store.overview.next_waiting(3)
    assert [row.document["task_id"] for row in waiting] == [3, 1, 0]
    assert [row.reference for row in await store.overview.running(5)] == ["11", "10"]
    numbered = await store.overview.numbered([1, 11, 99])
    assert sorted(row.reference for row in numbered) == ["1", "11"]


KEYS: list[Any] = [
    text(b"\xff\x00\xfe"),
    "x" * 100,
    {"a": {"b": "$status"}},
    {"b": [1, 2]},
    None,
    5,
    5.5,
    True,
    Decimal128("1E+6000"),
    NOW,
    b"bytes",
    Pairs((("a", 1), ("a", 2))),
    symbol(b"x"),
    db_pointer(b"x"),
    "y" * 100_000,
]


async def test_whatever_the_id_is_each_task_can_be_opened(store: Store, db: Db) -> None:
    """Ids of all types are on the list, and lead to their own document; a very long one is listed without a page."""
    for place, key in enumerate(KEYS):
        db.get_collection("DL_TASK").insert_one(raw_document({"_id": key, "task_id": f"number {place}"}))
    rows = await all_pages(store)
    assert len(rows) == len(KEYS)
    assert sorted(row.document["task_id"] for row in rows) == sorted(f"number {place}" for place in range(len(KEYS)))
    for row in rows:
        assert state(row.document) == "NEW"
        if row.document["task_id"] == f"number {len(KEYS) - 1}":
            assert row.reference == ""
            continue
        assert row.reference.startswith("~")
        found = await store.overview.task(row.reference)
        assert found is not None
        assert found.document["task_id"] == row.document["task_id"]


async def test_numbers_lead_to_their_task(store: Store, db: Db) -> None:
    """The whole range, and whichever type of number it was stored as."""
    numbers: list[Any] = [0, 5.0, Int64(2**63 - 1), Decimal128(str(2**64 - 1))]
    db.DL_TASK.insert_many([in_state(number, "FAILED", img_mongodb_ids=[1, 2, 3]) for number in numbers])
    for word in ("0", "5", str(2**63 - 1), str(2**64 - 1)):
        found = await store.overview.task(word)
        assert found is not None
        assert (found.reference, state(found.document)) == (word, "FAILED")
        assert (found.document["images"], found.document["val_images"]) == (3, None)
    for word in ("1", "", "-1", str(2**64), "1e3", "٣", "~", "~!!", "~AAAA", "~" + "A" * 5000, "x"):
        assert await store.overview.task(word) is None


@pytest.mark.parametrize("question", [{"$gt": ""}, {"$regex": "."}, {"$where": "1"}, {"$ne": None}])
async def test_a_reference_asks_no_question(store: Store, db: Db, question: dict[str, Any]) -> None:
    """What somebody put into an address is compared as a value, never taken for an operator."""
    from base64 import urlsafe_b64encode

    import bson

    db.DL_TASK.insert_one({"_id": "secret", "task_id": "x"})
    word = urlsafe_b64encode(b"\x03" + bson.encode(question)).decode().rstrip("=")
    assert await store.overview.task(f"~{word}") is None
    hidden = urlsafe_b64encode(b"\x08\x01" + b"\x08_id\x00\x00").decode().rstrip("=")
    assert await store.overview.task(f"~{hidden}") is None


async def test_no_document_makes_an_answer_large(store: Store, db: Db, examined: Any, roomy: None) -> None:
    """Megabytes in any field, written by hand, are replaced by a text on the server; a list in place of a document
    does not multiply what stands beside it."""
    huge = "x" * 3_000_000
    fields = ("owner", "error", "progress", "create_time", "result", "history", "dataset")
    for place, name in enumerate(fields):
        db.DL_TASK.insert_one(in_state(place, "FAILED", **{name: huge if name != "history" else [huge]}))
    db.DL_TASK.insert_one(in_state(20, "FAILED", result={"model_name": huge, "version": huge, "reports": {"a": huge}}))
    db.DL_TASK.insert_one(in_state(21, "FAILED", param_request=[{"model_name": "x" * 90} for _ in range(30_000)]))
    db.DL_TASK.insert_one({"_id": "z" * 3_000_000, "task_id": "long", "img_mongodb_ids": [huge]})
    rows = {row.document["task_id"]: row for row in (await store.overview.page(None, 1)).rows}
    assert len(rows) == len(fields) + 3
    assert rows[1].document["error"] == TOO_LARGE
    assert rows[21].document["param_request"]["model_name"] == TOO_LARGE
    for row in rows.values():
        if row.reference:
            assert await store.overview.task(row.reference) is not None
    whole = await store.overview.task("4")
    assert whole is not None
    assert whole.document["result"] == huge  # of a result, four megabytes are read
    assert max(length for _, length in examined() if length > 0) < 4_100_000


async def test_a_document_that_is_no_bson_is_listed(store: Store, db: Db) -> None:
    """A binary that lies about its length is in what is shown: the line is there, without what cannot be read."""
    db.get_collection("DL_TASK").insert_one(
        raw_document({"_id": ObjectId(), "task_id": 1, "owner": old_binary(99, b"ab")})
    )
    page = await store.overview.page(None, 1)
    assert len(page.rows) == 1
    assert state(page.rows[0].document) == "NEW"


async def test_curves_and_log_lines_are_bounded(store: Store, db: Db) -> None:
    """Numbers only, in order, at most as many as are drawn; the last lines, and how many are kept."""
    await store.traces.put_measurements(1, [(number, {"loss": number / 10}) for number in range(1, 3001)])
    junk = {"_id": {"task": 1, "iteration": 0}, "loss": "x" * 1_000_000, "map": Int64(1)}
    db.DL_TASK_METRIC.insert_many([junk, {"_id": {"task": 2, "iteration": 1}, "loss": 1.0}])
    rows = await store.traces.curves(1)
    assert rows[0] == {"iteration": 0, "map": 1}
    assert [row["iteration"] for row in rows] == list(range(2000))
    await store.traces.append_log(1, [f"line {number}" for number in range(50)])
    assert await store.traces.last_lines(1, 2) == (["line 48", "line 49"], 50)
    assert await store.traces.last_lines(9, 2) == ([], 0)
    for number, lines in enumerate(({"a": 1}, "x", [5, "y"], ["x" * 9_000_000]), 10):
        db.DL_TASK_LOG.insert_one({"_id": number, "lines": lines})
    assert await store.traces.last_lines(10, 2) == ([], 0)
    assert await store.traces.last_lines(11, 2) == ([], 0)
    assert await store.traces.last_lines(12, 2) == (["y"], 2)
    assert await store.traces.last_lines(13, 2) == ([], 1)


async def test_models_by_name_and_version(store: Store, db: Db) -> None:
    """The newest of each name, by name and in pages; the versions of one; classes of one; the model of a task."""
    metrics = {"map": 0.5, "map_50": 0.8, "on": "val", "per_class": [{"class_name": "a", "map": 0.5}]}
    models = [
        {
            "model_name": name,
            "version": version,
            "task_id": 10 * place + version,
            "class_names": ["a"],
            "metrics": metrics,
        }
        for place, name in enumerate(("a", "b", "c"))
        for version in (1, 2, 3)
    ]
    db.DL_MODEL.insert_many([*models, {"model_name": {"odd": 1}, "version": "x" * 1_000_000, "task_id": 99}])
    found = await store.models.newest_of_each(0, 10)
    assert [(one["model_name"], one["version"]) for one in found] == [
        *(("a", 3), ("b", 3), ("c", 3)),
        ({"odd": 1}, TOO_LARGE),
    ]
    assert (found[0]["map"], found[0]["classes"]) == (0.5, 1)
    assert [one["model_name"] for one in await store.models.newest_of_each(1, 2)] == ["b", "c"]
    assert [one["version"] for one in await store.models.versions("b", 2)] == [3, 2]
    assert await store.models.per_class("b", 2) == metrics["per_class"]
    assert await store.models.per_class("b", 9) is None
    assert await store.models.version_of(12) == ("b", 2)
    assert await store.models.version_of(7) is None


async def test_workers_as_they_are_shown(store: Store, db: Db) -> None:
    """Of a worker that somebody wrote, no more than is shown."""
    await store.workers.renew("w", {"host": "h", "devices": {"CPU": 1}, "running": ["1"]})
    db.DL_WORKER.insert_one({"_id": "v", "running": "x" * 1_000_000, "renewed_at": NOW, "other": 1})
    hostile, real = await store.workers.shown(10)
    assert hostile == {"_id": "v", "running": TOO_LARGE, "renewed_at": NOW}
    assert (real["host"], real["devices"], real["running"]) == ("h", {"CPU": 1}, ["1"])


async def test_a_look_at_a_server_that_says_nothing_ends(database_name: str) -> None:
    """Whoever only looks is told so after seconds, and does not wait as long as the work does."""
    assert LOOK_SECONDS < 20
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"mongodb://127.0.0.1:{silent.getsockname()[1]}/?directConnection=true"
        async with connect_store(uri, database_name) as store:
            with pytest.raises(StoreError):
                await store.overview.total()
            with store.database.looking(), pytest.raises(StoreError):
                await store.workers.shown(1)


def test_what_is_shown_of_a_list_is_shown_of_a_task() -> None:
    """A field that the list shows is not missing on the task's own page."""
    whole = set(overview._DETAIL)
    assert {name.partition(".")[0] for name in overview._ROW} <= whole
