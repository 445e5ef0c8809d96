"""Admission on the real server: every document gets one answer, whatever is in it, and keeps it."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import anyio
import bson
import pytest
from bson import Code, DatetimeMS, DBRef, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from bson.raw_bson import RawBSONDocument
from gridfs import GridFSBucket
from pymongo.database import Database

from handlers.admission import admit
from handlers.store import Store, connect_store
from handlers.store.tasks import Rejection
from schemas.enums import TaskErrorCode, TaskStatus
from schemas.task import MAX_DOCUMENT_BYTES, SERVICE_FIELDS, Task
from service.logs import Story
from service.metrics import Metrics
from service.sweeper import Sweeper
from tests.fuzz.raw_bson import Pairs, db_pointer, old_binary, raw_document, symbol, text
from tests.helpers import train_request

Db = Database[dict[str, Any]]


@pytest.fixture
async def late_store(mongo_uri: str, database_name: str) -> AsyncIterator[Store]:
    """Another worker's store, on a connection of its own."""
    async with connect_store(mongo_uri, database_name) as store:
        yield store


def sweeper_of(store: Store) -> Sweeper:
    return Sweeper(
        store, owner="w", every_seconds=60, wake=lambda: None, describe=dict, story=Story(), metrics=Metrics()
    )


async def answer(store: Store, db: Db, document: dict[str, Any]) -> dict[str, Any]:
    """Insert a document as any client does, have it admitted, and return it."""
    key = db.DL_TASK.insert_one(document).inserted_id
    await sweeper_of(store).admit(key)
    found = db.DL_TASK.find_one({"_id": key})
    assert found is not None
    return found


def assert_answered(document: dict[str, Any]) -> None:
    """PENDING and OK, or REJECTED with a code, a message and an end_time; and admitted under its own id."""
    assert document["admitted_id"] == document["_id"]
    assert document["create_time"]
    assert (document["attempt"], document["failures"]) == (0, 0)
    assert [change["status"] for change in document["history"]] == [document["status"]]
    if document["status"] == "PENDING":
        assert document["error_code"] == 0
        assert "end_time" not in document
        assert "error" not in document
    else:
        assert document["status"] == "REJECTED"
        assert document["error_code"] in (1, 2, 3, 4, 5, 7, 8)
        assert document["error"]["kind"] == TaskErrorCode(document["error_code"]).name
        assert document["error"]["message"]
        assert document["end_time"] == document["create_time"]


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"task_id": -1}, 4, "task_id"),
    ({"task_id": None}, 4, "task_id"),
    ({"task_type": "PREDICT"}, 1, "task_type"),
    ({"param_request": {"model_name": "m", "batch_size": 0}}, 7, "param_request.batch_size"),
    ({"param_request": {"model_name": "m", "net_model": "NoNet"}}, 8, "param_request.net_model"),
    ({"task_type": "TEST", "param_request": {"model_name": "none"}}, 8, "param_request.model_name"),
    ({"json_mongodb_id": "0" * 24}, 2, "json_mongodb_id"),
    ({"img_mongodb_ids": ["0" * 24]}, 3, "img_mongodb_ids"),
]


async def test_each_code_from_a_raw_insert(store: Store, db: Db, image_ids: list[ObjectId]) -> None:
    """A bad document is answered in the document: REJECTED, code, field, message, end_time, and never a run."""
    for number, (change, code, field) in enumerate(BAD):
        document = await answer(store, db, {**train_request(number), **change})
        assert_answered(document)
        assert (document["status"], document["error_code"], document["error"]["field"]) == ("REJECTED", code, field)
    assert await store.tasks.claim("w", {"CPU": 8, "GPU": 8}) is None


async def test_empty_tables(store: Store, db: Db) -> None:
    """Code 5 names the table: IMG_INFO, then for a training IMG_LAB_INFO."""
    assert (await answer(store, db, train_request(1)))["error"]["field"] == "IMG_INFO"
    db.IMG_INFO.insert_one({"dataset": "toy"})
    document = await answer(store, db, train_request(2))
    assert (document["error_code"], document["error"]["field"]) == (5, "IMG_LAB_INFO")


async def test_documents_without_a_usable_id_can_each_be_inserted_and_a_taken_number_cannot(
    store: Store, db: Db, image_ids: list[ObjectId]
) -> None:
    """The unique index is partial: no, negative and textual ids come in twice; a valid one is E11000 in any form."""
    from pymongo.errors import DuplicateKeyError

    for task_id in (None, None, -5, -5, "x", "x", False, False):
        document = await answer(store, db, train_request(task_id))
        assert document["error_code"] == 4
    for _ in range(2):
        request = train_request(0)
        del request["task_id"]
        assert (await answer(store, db, request))["error_code"] == 4
    assert (await answer(store, db, train_request(7.0)))["task_id"] == 7
    for same in (7, Int64(7), 7.0, Decimal128("7.00")):
        with pytest.raises(DuplicateKeyError):
            db.DL_TASK.insert_one(train_request(same))


async def test_missing_images_are_named_up_to_ten_and_counted(store: Store, db: Db, image_ids: list[ObjectId]) -> None:
    """The message has the first ten bad ids in the client's order, and how many there are."""
    bad = [str(ObjectId()) for _ in range(12)]
    document = await answer(store, db, train_request(1, img_mongodb_ids=[image_ids[0], *bad, str(image_ids[1])]))
    message = document["error"]["message"]
    assert document["error_code"] == 3
    assert all(value in message for value in bad[:10])
    assert not any(value in message for value in bad[10:])
    assert "12 of 14" in message


async def test_image_ids_in_every_form(store: Store, db: Db, image_ids: list[ObjectId]) -> None:
    """ObjectIds, hex strings in either case, and images that are themselves stored under a hex string."""
    text = str(ObjectId())
    db.IMG_INFO.insert_one({"_id": text, "dataset": "toy"})
    ids = [image_ids[0], str(image_ids[1]), str(image_ids[2]).upper(), text, ObjectId(text)]
    assert (await answer(store, db, train_request(1, img_mongodb_ids=ids)))["status"] == "PENDING"
    for number, bad in enumerate(([None], [[]], [{"$oid": text}], [5], ["x"], [""], {"0": text}, text, 5)):
        document = await answer(store, db, train_request(10 + number, img_mongodb_ids=bad))
        assert document["error_code"] == 3, bad


async def test_half_a_million_images_are_accepted(store: Store, db: Db) -> None:
    """500,000 ObjectIds are 9.9 MB: admitted, claimed without the list, and read back whole."""
    # Made by the server, which is quicker than sending them.
    number = {"$substrCP": [{"$toString": {"$add": [1_000_000, "$n"]}}, 1, 6]}
    db.aggregate(
        [
            {"$documents": [{"n": {"$range": [0, 500_000]}}]},
            {"$unwind": "$n"},
            {"$project": {"_id": {"$toObjectId": {"$concat": ["0" * 18, number]}}}},
            {"$out": "IMG_INFO"},
        ]
    )
    db.IMG_LAB_INFO.insert_one({})
    ids = [ObjectId(f"{number:024}") for number in range(500_000)]
    document = await answer(store, db, train_request(1, img_mongodb_ids=ids))
    assert document["status"] == "PENDING", document.get("error")
    claimed = await store.tasks.claim("w", {"CPU": 1})
    assert claimed is not None
    assert "img_mongodb_ids" not in claimed
    assert await store.tasks.image_ids(claimed["_id"], "img_mongodb_ids") == ids


def padded(request: dict[str, Any], field: str, size: int) -> dict[str, Any]:
    """`request` with `field` filled up so that the document has `size` bytes once the driver has added its `_id`."""
    document = {"_id": ObjectId(), **request, field: ""}
    document[field] = "x" * (size - len(bson.encode(document)))
    assert len(bson.encode(document)) == size
    return document


BIGGEST = 16 * 1024 * 1024


@pytest.mark.usefixtures("roomy")
async def test_a_document_too_large_for_its_answer_loses_its_id_list(
    store: Store, db: Db, image_ids: list[ObjectId]
) -> None:
    """12 to 16 MB: REJECTED with the size in the message, the list unset in the same write."""
    for number, size in enumerate((MAX_DOCUMENT_BYTES + 1, BIGGEST - 100)):
        ids = ["x" * 1000] * ((size - 10_000) // 1012)
        document = await answer(store, db, padded(train_request(number, img_mongodb_ids=ids), "note", size))
        assert_answered(document)
        assert (document["status"], document["error_code"]) == ("REJECTED", 3)
        assert str(size) in document["error"]["message"]
        assert "img_mongodb_ids" not in document
        assert document["task_id"] == number
    at_the_limit = padded(train_request(7), "note", MAX_DOCUMENT_BYTES)
    assert (await answer(store, db, at_the_limit))["status"] == "PENDING"


@pytest.mark.usefixtures("roomy")
async def test_a_document_full_of_something_else_is_answered_too(
    store: Store, db: Db, image_ids: list[ObjectId]
) -> None:
    """16 MB in any one field: REJECTED, and what had to go is gone."""
    for number, field in enumerate(("note", "param_request", "task_id", "task_type", "status")):
        document = await answer(store, db, padded(train_request(number), field, BIGGEST - 20))
        assert_answered(document)
        assert document["status"] == "REJECTED"
        assert field == "task_id" or document["task_id"] == number


@pytest.mark.usefixtures("roomy")
async def test_one_document_that_cannot_be_answered_does_not_stop_the_sweep(
    store: Store, db: Db, image_ids: list[ObjectId]
) -> None:
    """An `_id` of 8 MB leaves room for no answer; those after it get theirs, and the cancelled ones end."""
    db.DL_TASK.insert_one({"_id": "x" * (8 * 1024 * 1024 - 200), **train_request(1)})
    db.DL_TASK.insert_one(train_request(2))
    waiting = await answer(store, db, train_request(3, cancel_requested=True))
    await sweeper_of(store).sweep()
    found = {d["task_id"]: d.get("status") for d in db.DL_TASK.find({}, {"task_id": 1, "status": 1, "_id": 0})}
    assert (found[2], found[3]) == ("PENDING", "CANCELLED"), waiting


DEEP: Any = "x"
for _ in range(90):
    DEEP = {"d": DEEP}

HOSTILE: list[Any] = [
    "$status",
    "$$oops",
    "$$NOW",
    {"$literal": 1},
    {"$gt": ""},
    {"a.b": 1, "$c": {"$d": 2}},
    [],
    [[]],
    [None],
    {},
    None,
    "",
    "\x00",
    "\u202e",
    b"bytes",
    float("nan"),
    float("-inf"),
    -0.0,
    True,
    2**62,
    Decimal128("NaN"),
    Decimal128("1E+6000"),
    DatetimeMS(2**60),
    DatetimeMS(-(2**60)),
    datetime.now(UTC),
    Regex("^(a+)+$"),
    Code("while (true) {}"),
    Code("f", {"x": 1}),
    MinKey(),
    MaxKey(),
    Timestamp(1, 1),
    DBRef("DL_TASK", 1),
    ObjectId(),
    DEEP,
]

#: Fields of the service's that a newly admitted document has.
ADMITTED_FIELDS = {"admitted_id", "status", "error_code", "attempt", "failures", "create_time", "history"}
ADMITTED_FIELDS |= {"schema_version"}

CLIENT_FIELDS = (
    "task_id",
    "task_type",
    "param_request",
    "img_mongodb_ids",
    "val_img_mongodb_ids",
    "dataset",
    "split",
    "json_mongodb_id",
    "priority",
    "max_attempts",
    "patience",
    "mirror",
    "cancel_requested",
    "unknown",
)


AUTO = bson.CodecOptions(tz_aware=True, datetime_conversion=bson.DatetimeConversion.DATETIME_AUTO)


async def admit_all(store: Store, db: Db, documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Insert and admit documents, several at once; as they are then, in their order."""
    keys = db.DL_TASK.insert_many(documents).inserted_ids
    sweeper, limiter = sweeper_of(store), anyio.CapacityLimiter(8)

    async def one(key: Any) -> None:
        async with limiter:
            await sweeper.admit(key)

    async with anyio.create_task_group() as group:
        for key in keys:
            group.start_soon(one, key)
    # A date that no datetime can hold must not break the reader of the test.
    tasks = db.get_collection("DL_TASK", codec_options=AUTO)
    found = {document["_id"]: document for document in tasks.find()}
    return [found[key] for key in keys]


async def test_hostile_values_in_the_fields_of_a_client(store: Store, db: Db, image_ids: list[ObjectId]) -> None:
    """Whatever stands in a field, the document is answered; one that is accepted can be run."""
    cases = [(field, value) for field in CLIENT_FIELDS for value in HOSTILE]
    # Numbers far from those among the hostile values, which are task ids too.
    documents = [{**train_request(1000 + number), field: value} for number, (field, value) in enumerate(cases)]
    for (field, value), document in zip(cases, await admit_all(store, db, documents), strict=True):
        assert_answered(document)
        if field == "unknown":
            assert document["status"] == "PENDING", (value, document["error"])
        if document["status"] == "PENDING":
            Task.from_document({**document, "owner": "w", "attempt": 1})


async def test_hostile_values_in_the_fields_of_the_service(store: Store, db: Db, image_ids: list[ObjectId]) -> None:
    """None is believed, none is kept, and none keeps a good document from being accepted."""
    values = [HOSTILE[0], HOSTILE[1], {"a.b": 1, "$c": 1}, [1], float("nan"), DatetimeMS(2**60), DEEP, None, MinKey()]
    cases = [(field, value) for field in SERVICE_FIELDS for value in values]
    documents = [{**train_request(number), field: value} for number, (field, value) in enumerate(cases)]
    for (field, value), document in zip(cases, await admit_all(store, db, documents), strict=True):
        assert_answered(document)
        assert document["status"] == "PENDING", (field, value)
        assert set(document) & set(SERVICE_FIELDS) == ADMITTED_FIELDS


async def test_hostile_values_in_the_parameters(store: Store, db: Db, image_ids: list[ObjectId]) -> None:
    """The same for each kind of parameter; an unknown one is PARAM_INVALID with its name."""
    names = ("model_name", "dataset_expansion_lst", "net_model", "device_type", "batch_size", "$set", "a.b")
    cases = [(name, value) for name in names for value in HOSTILE]
    documents = []
    for number, (name, value) in enumerate(cases):
        documents.append({**train_request(number), "param_request": {"model_name": "ok", name: value}})
    for (name, _), document in zip(cases, await admit_all(store, db, documents), strict=True):
        assert_answered(document)
        if name in ("$set", "a.b"):
            assert document["error_code"] == 7
            assert name in document["error"]["message"]
        if document["status"] == "PENDING":
            Task.from_document({**document, "owner": "w", "attempt": 1})


KEYS: list[Any] = [
    *("text", "$status", "$$oops", 5, 2.5, Decimal128("3"), None, {}, {"a": {"b.c": 1}}, b"12", MinKey(), True),
    *(float("nan"), DatetimeMS(2**60), Timestamp(9, 9), Code("x"), DBRef("DL_TASK", 5)),
]


async def test_documents_under_any_id(store: Store, db: Db, image_ids: list[ObjectId]) -> None:
    """`_id` is the client's to choose; the document is found, answered, claimed and finished under it."""
    db.DL_TASK.insert_many([{"_id": key, **train_request(number)} for number, key in enumerate(KEYS)])
    await sweeper_of(store).sweep()
    for _ in KEYS:
        claimed = await store.tasks.claim("w", {"CPU": 1})
        assert claimed is not None
        task = Task.from_document(claimed)
        assert await store.tasks.renew(task, {"iteration": 1}) is False
        assert await store.tasks.finish(task, TaskStatus.FAILED)
    assert db.DL_TASK.count_documents({"status": "FAILED"}) == len(KEYS)


def not_utf8(task_id: int) -> bytes:
    return bson.encode({"_id": ObjectId(), **train_request(task_id, dataset="t\u00ffy")}).replace(
        b"\xc3\xbf", b"\xff\xff"
    )


async def test_text_that_is_not_utf8(store: Store, db: Db, image_ids: list[ObjectId]) -> None:
    """Read with a replacement character, and answered."""
    db.get_collection("DL_TASK").insert_one(RawBSONDocument(not_utf8(1)))
    await sweeper_of(store).sweep()
    found = db.DL_TASK.find_one({}, {"dataset": False})
    assert found is not None
    assert (found["status"], found["error_code"]) == ("REJECTED", 3)


async def test_forged_service_fields_are_not_believed(store: Store, db: Db, image_ids: list[ObjectId]) -> None:
    """A new document that says it is finished, or running elsewhere, is a new document."""
    forged = {
        "admitted_id": ObjectId(),
        "status": "SUCCEEDED",
        "error_code": 3,
        "error": {"kind": "x"},
        "attempt": 9,
        "failures": 9,
        "failed_at": 9,
        "runs_alone": True,
        "owner": "me",
        "lease_renewed_at": datetime(2000, 1, 1, tzinfo=UTC),
        "not_before": datetime(2100, 1, 1, tzinfo=UTC),
        "create_time": datetime(2000, 1, 1, tzinfo=UTC),
        "start_time": datetime(2000, 1, 1, tzinfo=UTC),
        "end_time": datetime(2000, 1, 1, tzinfo=UTC),
        "progress": {"iteration": 5},
        "snapshot": {"file_id": ObjectId(), "iteration": 5, "sha256": "0"},
        "result": {"version": 1},
        "history": [{"status": "RUNNING"}],
        "batch_size_limit": 1,
        "schema_version": 99,
    }
    assert set(forged) == set(SERVICE_FIELDS)
    document = await answer(store, db, train_request(1, **forged))
    assert_answered(document)
    assert document["status"] == "PENDING"
    assert document["create_time"].year > 2000
    assert set(document) & set(SERVICE_FIELDS) == ADMITTED_FIELDS


async def test_a_copy_of_a_finished_task_is_admitted_once_by_two_admitters_one_of_them_late(
    store: Store, late_store: Store, db: Db, image_ids: list[ObjectId]
) -> None:
    """Two watchers see the copy; the late one changes nothing: not while it waits, runs, or when it has ended."""
    await answer(store, db, train_request(1))
    first = Task.from_document(await store.tasks.claim("w", {"CPU": 1}) or {})
    await store.tasks.finish(first, TaskStatus.SUCCEEDED, result={"version": 1})
    copy = db.DL_TASK.find_one({"task_id": 1})
    assert copy is not None
    copy |= {"_id": ObjectId(), "task_id": 2}
    db.DL_TASK.insert_one(copy)

    # The late one has read the document, and not yet written.
    read_early = await late_store.tasks.unadmitted(copy["_id"])
    assert read_early is not None
    async with anyio.create_task_group() as group:
        for one in (store, late_store, store, late_store):
            group.start_soon(admit, one, copy["_id"])
    admitted = db.DL_TASK.find_one({"_id": copy["_id"]})
    assert admitted is not None
    assert_answered(admitted)
    assert admitted["create_time"] > copy["end_time"]
    assert "result" not in admitted

    second = Task.from_document(await store.tasks.claim("w2", {"CPU": 1}) or {})
    assert (second.key, second.attempt) == (copy["_id"], 1)
    running = db.DL_TASK.find_one({"_id": copy["_id"]})
    fields = {"task_id": Int64(2), "task_type": "TRAIN", "param_request": {}, "priority": 9, "max_attempts": 1}
    assert not await late_store.tasks.admit(copy["_id"], fields)
    assert not await late_store.tasks.reject(copy["_id"], Rejection(TaskErrorCode.PARAM_INVALID, "x", "late"))
    assert db.DL_TASK.find_one({"_id": copy["_id"]}) == running
    await store.tasks.finish(second, TaskStatus.SUCCEEDED, result={"version": 2})
    finished = db.DL_TASK.find_one({"_id": copy["_id"]})
    assert not await late_store.tasks.admit(copy["_id"], fields)
    await admit(late_store, copy["_id"])
    assert db.DL_TASK.find_one({"_id": copy["_id"]}) == finished
    assert await late_store.tasks.unadmitted(copy["_id"]) is None


async def test_a_document_that_is_gone_is_no_fault(store: Store) -> None:
    """Inserted, seen, and deleted before anybody looked."""
    await admit(store, ObjectId())


async def test_a_number_whose_task_was_deleted_stays_used(store: Store, db: Db, image_ids: list[ObjectId]) -> None:
    """A training that made a model leaves its number used, though its document is gone."""
    db.DL_MODEL.insert_one({"model_name": "m", "version": 1, "task_id": Int64(5)})
    document = await answer(store, db, train_request(5))
    assert document["error_code"] == 4
    assert "m:1" in document["error"]["message"]


async def test_a_given_message_is_taken_by_its_id(store: Store, db: Db) -> None:
    """The message's id as an ObjectId or hex digits; stored as hex digits."""
    db.IMG_INFO.insert_one({})
    db.IMG_LAB_INFO.insert_one({})
    message = GridFSBucket(db, "messages").upload_from_stream("m.json", b"{}")
    for number, form in enumerate((message, str(message), str(message).upper())):
        request = train_request(number, json_mongodb_id=form)
        del request["dataset"]
        document = await answer(store, db, request)
        assert (document["status"], document["json_mongodb_id"]) == ("PENDING", str(message))


async def test_unknown_fields_are_kept(store: Store, db: Db, image_ids: list[ObjectId]) -> None:
    """What the client wrote for itself stays as it was."""
    document = await answer(store, db, train_request(1, comment={"by": "me", "$x": [1, 2.5]}))
    assert document["comment"] == {"by": "me", "$x": [1, 2.5]}
    assert document["status"] == "PENDING"


async def test_a_test_without_a_split_takes_the_one_kept_for_tests(store: Store, db: Database[dict[str, Any]]) -> None:
    """`split` becomes `test` where the data set has one, and stays open where it has none."""
    for dataset, split in (("parted", "train"), ("parted", "test"), ("whole", None)):
        db.IMG_INFO.insert_one({"file_name": "a.jpg", "dataset": dataset, "split": split, "width": 1, "height": 1})
    db.DL_MODEL.insert_one({"model_name": "there", "version": 1, "task_id": 99})
    for task_id, dataset in enumerate(("parted", "whole")):
        request = {"task_id": task_id, "task_type": "TEST", "dataset": dataset}
        key = db.DL_TASK.insert_one({**request, "param_request": {"model_name": "there"}}).inserted_id
        await admit(store, key)
    found = {task["dataset"]: (task["status"], task.get("split")) for task in db.DL_TASK.find()}
    assert found == {"parted": ("PENDING", "test"), "whole": ("PENDING", None)}


async def test_lists_where_single_values_belong_are_answered_with_a_code(
    store: Store, db: Database[dict[str, Any]]
) -> None:
    """No index refuses the insert, although MongoDB cannot index two lists of one document together."""
    params = {"model_name": "m", "device_type": ["CPU", "GPU"], "device_num": [1, 2]}
    request = {"task_id": 1, "task_type": "TRAIN", "priority": [1, 2], "status": ["PENDING"], "param_request": params}
    key = db.DL_TASK.insert_one(request).inserted_id
    assert await store.tasks.new_keys(10) == [key]
    await admit(store, key)
    answered = db.DL_TASK.find_one({"_id": key})
    assert answered is not None
    assert (answered["status"], answered["error_code"]) == ("REJECTED", 7)


@pytest.mark.parametrize("forged", [False, True], ids=["new", "forged"])
async def test_a_field_that_comes_twice(store: Store, db: Db, image_ids: list[ObjectId], forged: bool) -> None:
    """Drivers disagree about which one counts, and an update by a pipeline that changed it would abort the server.

    So the document is rejected by a replacement, also one that says of itself that it has been admitted. What it was
    is kept where it is beyond doubt.
    """
    keys = []
    names = (*SERVICE_FIELDS, *CLIENT_FIELDS, "error.x", "history.x", *(() if forged else ("comment.x",)))
    for number, name in enumerate(names):
        key = ObjectId()
        document = {"_id": key, **train_request(number), "pad": "x" * 2000}
        if forged:
            # Whatever takes it up, be it a claim, a cancel or the end of its lease.
            state = {
                "admitted_id": key,
                "error_code": 0,
                "attempt": 1,
                "failures": 0,
                "cancel_requested": bool(number % 3),
            }
            document |= {**state, "status": "RUNNING" if number % 2 else "PENDING", "create_time": datetime.now(UTC)}
            document |= {"lease_renewed_at": datetime(2000, 1, 1, tzinfo=UTC)}
        field, _, nested = name.partition(".")
        twice = Pairs((("x", 1), ("x", 2))) if nested else document.get(field, 1)
        value = [twice] * 60 if field == "history" and nested else twice
        pairs = (*((other, held) for other, held in document.items() if other != field), (field, value))
        db.get_collection("DL_TASK").insert_one(raw_document(Pairs(pairs if nested else (*pairs, (field, value)))))
        keys.append((key, name, number))
    assert len(await store.tasks.cancel_waiting()) == 0
    assert await store.tasks.claim("w", {"CPU": 8}) is None
    assert await store.tasks.expired() == []
    for key, _, number in keys:
        await sweeper_of(store).admit(key)
        found = db.DL_TASK.find_one({"_id": key})
        assert found is not None
        assert_answered(found)
        assert found["error_code"] == 7
        assert "comes twice" in found["error"]["message"]
        assert found.get("task_id", number) == number
        assert "pad" not in found


async def test_keys_that_no_driver_can_write(store: Store, db: Db, image_ids: list[ObjectId]) -> None:
    """An `_id` that is not UTF-8, or lies about its length, is found by its bytes, and its document rejected.

    A thousand of them in front would hide all others from the sweep, which knows them only by name.
    """
    keys = [text(b"\xff"), text(b"\xed\xa0\x80"), old_binary(9, b"ab"), db_pointer(b"x"), symbol(b"x")]
    keys += [Pairs((("a", 1), ("a", 2))), Pairs((("\udcff", 1),))]
    for number, key in enumerate(keys):
        db.get_collection("DL_TASK").insert_one(raw_document({"_id": key, **train_request(number)}))
    db.DL_TASK.insert_one(train_request(99))
    await sweeper_of(store).sweep()
    assert await store.tasks.new_keys(10) == []
    found = await store.overview.listed(100)
    assert {(one["status"], one["error_code"]) for one in found if one["task_id"] != 99} == {("REJECTED", 7)}
    assert sorted(one["task_id"] for one in found) == [*range(len(keys)), 99]
    assert db.DL_TASK.count_documents({"status": "PENDING"}) == 1


async def test_a_binary_that_lies_about_its_length(store: Store, db: Db, image_ids: list[ObjectId]) -> None:
    """No driver can read a document with one: it is rejected, and everybody can read what is left of it."""
    for number, name in enumerate(("comment", "task_type", "param_request", "history")):
        document = {"_id": ObjectId(), **train_request(number), name: old_binary(99, b"ab")}
        db.get_collection("DL_TASK").insert_one(raw_document(document))
    assert [one["_id"] for one in await store.overview.listed(10)]
    await sweeper_of(store).sweep()
    for found in db.DL_TASK.find():
        assert_answered(found)
        assert found["error_code"] == 7
        assert "no valid BSON" in found["error"]["message"]


async def test_parameters_by_the_hundred_thousand(store: Store, db: Db, image_ids: list[ObjectId]) -> None:
    """Are counted and not looked at one by one, which would take a minute of the worker's time."""
    many = {"model_name": "m", **{f"p{number}": number for number in range(300_000)}}
    document = await answer(store, db, train_request(1, param_request=many))
    assert (document["error_code"], "300001 members" in document["error"]["message"]) == (7, True)
    params = {"model_name": "m", "dataset_expansion_lst": ["x"] * 300_000}
    assert (await answer(store, db, train_request(2, param_request=params)))["error_code"] == 7
