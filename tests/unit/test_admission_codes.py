"""Admission's answers: which code when several things are wrong, and messages that name field, value and expectation.

Over mongomock-motor, since the checks only read; the real server is asked in tests/integration/test_admission.py.
"""

import gc
import weakref
from datetime import UTC, datetime
from typing import Any

import pytest
from bson import Code, Decimal128, Int64, ObjectId

from handlers.admission import check
from handlers.store import Store, open_store
from handlers.store.tasks import Rejection
from schemas.enums import TaskErrorCode
from schemas.task import SERVICE_FIELDS, Task
from tests.mock_database import MockDatabase

CODES = TaskErrorCode


@pytest.fixture
def empty() -> Store:
    """A store on an empty database."""
    return open_store(MockDatabase())


@pytest.fixture
async def full(empty: Store) -> Store:
    """A store with one image, one label, one stored message, and registered models: old, new, of another network."""
    db = empty.database.db
    await db.IMG_INFO.insert_one({"_id": IMAGE, "dataset": "toy", "split": "train"})
    await db.IMG_LAB_INFO.insert_one({"img_id": IMAGE})
    old = {"model_name": "known", "version": 3, "task_id": Int64(77), "net_model": "MobileNet"}
    new = {**old, "version": 4, "task_id": Int64(78), "weights_file_id": ObjectId()}
    other = {**new, "model_name": "other", "version": 1, "task_id": Int64(79), "net_model": "OtherNet"}
    await db.DL_MODEL.insert_many([old, new, other])
    await db["messages.files"].insert_one({"_id": MESSAGE})
    return empty


IMAGE, MESSAGE, NOWHERE = ObjectId(), ObjectId(), ObjectId()


def train(**fields: Any) -> dict[str, Any]:
    return {
        "task_id": 1,
        "task_type": "TRAIN",
        "param_request": {"model_name": "new"},
        "img_mongodb_ids": [IMAGE],
        **fields,
    }


#: One fault of each code, in the published order of precedence.
FAULTS: list[tuple[TaskErrorCode, dict[str, Any]]] = [
    (CODES.TASK_ID_INVALID, {"task_id": -1}),
    (CODES.TASK_TYPE_ERROR, {"task_type": "PREDICT"}),
    (CODES.PARAM_INVALID, {"param_request": {"model_name": "new", "net_model": "NoNet", "batch_size": 0}}),
    (CODES.MODEL_INVALID, {"param_request": {"model_name": "new", "net_model": "NoNet"}}),
    (CODES.COLLECTIONS_EMPTY, {}),  # stands in the database
    (CODES.JASON_MONGOID_INVALID, {"json_mongodb_id": str(NOWHERE)}),
    (CODES.IMAG_MONGOID_INVALID, {"img_mongodb_ids": [NOWHERE]}),
]


@pytest.mark.parametrize("first", range(len(FAULTS)))
async def test_the_first_of_several_faults_is_the_answer(empty: Store, full: Store, first: int) -> None:
    """With every fault from the n-th on present, the n-th code is the answer: 4, 1, 7, 8, 5, 2, 3."""
    assert [int(code) for code, _ in FAULTS] == [4, 1, 7, 8, 5, 2, 3]
    document = train()
    for _, fault in reversed(FAULTS[first:]):
        document |= fault
    if FAULTS[first][0] in (CODES.JASON_MONGOID_INVALID, CODES.IMAG_MONGOID_INVALID):
        store = full
    else:
        store = open_store(MockDatabase())
    answer = await check(store, document)
    assert isinstance(answer, Rejection)
    assert answer.code is FAULTS[first][0]


async def test_a_used_number_comes_before_everything_but_the_type(full: Store) -> None:
    """A task id whose earlier task made a model is TASK_ID_INVALID, though the parameters are wrong too."""
    answer = await check(full, train(task_id=77, param_request={"batch_size": 0}))
    assert isinstance(answer, Rejection)
    assert (answer.code, answer.field) == (CODES.TASK_ID_INVALID, "task_id")
    assert "77" in answer.message
    assert "known:3" in answer.message


@pytest.mark.parametrize(
    ("change", "code", "field", "words"),
    [
        ({"task_id": "7"}, CODES.TASK_ID_INVALID, "task_id", ["'7'", "whole number"]),
        ({"task_id": None}, CODES.TASK_ID_INVALID, "task_id", ["None", "0 to 2^64-1"]),
        ({"task_id": 2.5}, CODES.TASK_ID_INVALID, "task_id", ["2.5"]),
        ({"task_id": 2.0**60}, CODES.TASK_ID_INVALID, "task_id", ["2^53"]),
        ({"task_id": Decimal128(str(2**64))}, CODES.TASK_ID_INVALID, "task_id", [str(2**64), "2^64-1"]),
        ({"task_id": True}, CODES.TASK_ID_INVALID, "task_id", ["True"]),
        ({"task_type": 7}, CODES.TASK_TYPE_ERROR, "task_type", ["7", "TRAIN (0)", "TEST (1)"]),
        ({"task_type": "train"}, CODES.TASK_TYPE_ERROR, "task_type", ["'train'"]),
        ({"task_type": Code("while (true) {}")}, CODES.TASK_TYPE_ERROR, "task_type", ["while (true)"]),
        ({"param_request": None}, CODES.PARAM_INVALID, "param_request.model_name", ["missing", "name"]),
        (
            {"param_request": {"model_name": "known:0"}},
            CODES.PARAM_INVALID,
            "param_request.model_name",
            ["'known:0'", "version number from 1"],
        ),
        (
            {"param_request": {"model_name": "known:x"}},
            CODES.PARAM_INVALID,
            "param_request.model_name",
            ["'known:x'", "version number from 1"],
        ),
        (
            {"param_request": {"model_name": "known:9"}},
            CODES.MODEL_INVALID,
            "param_request.model_name",
            ["'known:9'", "registered"],
        ),
        (
            {"param_request": {"model_name": "known:3"}},
            CODES.MODEL_INVALID,
            "param_request.model_name",
            ["'known:3'", "without stored weights", "trained since"],
        ),
        (
            {"param_request": {"model_name": "other:1"}},
            CODES.MODEL_INVALID,
            "param_request.net_model",
            ["'MobileNet'", "'OtherNet'", "network of 'other:1'"],
        ),
        ({"param_request": {"model_name": "../a"}}, CODES.PARAM_INVALID, "param_request.model_name", ["'../a'"]),
        ({"priority": "high"}, CODES.PARAM_INVALID, "priority", ["'high'", "whole number from"]),
        ({"priority": 2**31}, CODES.PARAM_INVALID, "priority", [str(2**31)]),
        ({"max_attempts": 0}, CODES.PARAM_INVALID, "max_attempts", ["0", "from 1 to 100"]),
        ({"patience": 0.5}, CODES.PARAM_INVALID, "patience", ["0.5", "whole number from 1 to"]),
        ({"mirror": "no"}, CODES.PARAM_INVALID, "mirror", ["'no'", "true or false"]),
        ({"dataset": ["toy"]}, CODES.PARAM_INVALID, "dataset", ["['toy']", "text"]),
        ({"split": {"$ne": "test"}}, CODES.PARAM_INVALID, "split", ["$ne", "text"]),
        ({"dataset": "a\u202eb"}, CODES.PARAM_INVALID, "dataset", ["printable"]),
        (
            {"param_request": {"model_name": "m", "net_model": "Big"}},
            CODES.MODEL_INVALID,
            "param_request.net_model",
            ["'Big'", "MobileNet"],
        ),
        (
            {"task_type": "TEST", "param_request": {"model_name": "known:9"}},
            CODES.MODEL_INVALID,
            "param_request.model_name",
            ["'known:9'", "registered"],
        ),
        ({"json_mongodb_id": 5}, CODES.JASON_MONGOID_INVALID, "json_mongodb_id", ["5", "24 hex digits"]),
        ({"json_mongodb_id": str(NOWHERE)}, CODES.JASON_MONGOID_INVALID, "json_mongodb_id", [str(NOWHERE), "messages"]),
        ({"img_mongodb_ids": "x"}, CODES.IMAG_MONGOID_INVALID, "img_mongodb_ids", ["'x'", "list"]),
        ({"img_mongodb_ids": []}, CODES.IMAG_MONGOID_INVALID, "img_mongodb_ids", ["empty", "dataset"]),
        ({"img_mongodb_ids": [NOWHERE]}, CODES.IMAG_MONGOID_INVALID, "img_mongodb_ids", [str(NOWHERE), "1 of 1"]),
        ({"val_img_mongodb_ids": [5]}, CODES.IMAG_MONGOID_INVALID, "val_img_mongodb_ids", ["'5'", "24 hex digits"]),
        ({"img_mongodb_ids": [], "dataset": "none"}, CODES.IMAG_MONGOID_INVALID, "dataset", ["'none'", "IMG_INFO"]),
        (
            {"img_mongodb_ids": [], "dataset": "toy", "split": "dev"},
            CODES.IMAG_MONGOID_INVALID,
            "dataset",
            ["'toy'", "'dev'"],
        ),
    ],
)
async def test_a_message_names_field_value_and_expectation(
    full: Store, change: dict[str, Any], code: TaskErrorCode, field: str, words: list[str]
) -> None:
    """Each answer says which field, what stood there, and what was expected."""
    answer = await check(full, train(**change))
    assert isinstance(answer, Rejection)
    assert (answer.code, answer.field) == (code, field)
    assert field.removeprefix("param_request.") in answer.message
    assert "expected" in answer.message
    for word in words:
        assert word in answer.message


@pytest.mark.parametrize("field", ["task_id", "task_type"])
async def test_a_missing_field_is_said_to_be_missing(full: Store, field: str) -> None:
    """Missing is told apart from null."""
    document = train()
    del document[field]
    answer = await check(full, document)
    assert isinstance(answer, Rejection)
    assert f"{field} is missing" in answer.message


async def test_which_table_is_empty_is_named(empty: Store) -> None:
    """COLLECTIONS_EMPTY looks at IMG_INFO, and for a training also at IMG_LAB_INFO."""
    db = empty.database.db
    answer = await check(empty, train())
    assert isinstance(answer, Rejection)
    assert (answer.code, answer.field) == (CODES.COLLECTIONS_EMPTY, "IMG_INFO")
    await db.IMG_INFO.insert_one({"_id": IMAGE})
    answer = await check(empty, train())
    assert isinstance(answer, Rejection)
    assert (answer.code, answer.field) == (CODES.COLLECTIONS_EMPTY, "IMG_LAB_INFO")
    await db.DL_MODEL.insert_one({"model_name": "known", "version": 1, "task_id": Int64(7)})
    answer = await check(empty, train(task_type="TEST", param_request={"model_name": "known"}))
    assert isinstance(answer, dict)


async def test_a_rejected_document_is_let_go_of(full: Store) -> None:
    """At once, not when Python looks for garbage next: it may be 11 MB."""

    class Request(dict[str, Any]):
        """That can be referred to weakly."""

    for fault in ({"json_mongodb_id": str(NOWHERE)}, {"param_request": {"model_name": "new", "net_model": "NoNet"}}):
        document = Request(train(**fault))
        known = weakref.ref(document)
        gc.disable()
        try:
            assert isinstance(await check(full, document), Rejection)
            del document
            assert known() is None
        finally:
            gc.enable()


async def test_mirroring_is_written_down(full: Store) -> None:
    """By admission, for trainings; so a task that release 0.1.0 admitted, which says nothing, is not mirrored."""
    for given, stored in ((None, True), (True, True), (False, False)):
        fields = await check(full, train(mirror=given))
        assert isinstance(fields, dict)
        assert fields["mirror"] is stored
        owned = {**fields, "_id": 1, "owner": "w", "attempt": 1, "create_time": datetime.now(UTC)}
        assert Task.from_document(owned).mirror is stored
        with pytest.raises(ValueError, match="mirror is 'false'; expected true or false"):
            Task.from_document({**owned, "mirror": "false"})
        del owned["mirror"]
        assert not Task.from_document(owned).mirror


async def test_a_good_document_is_normalised(full: Store) -> None:
    """Numbers as MongoDB holds them, enumerations by name, defaults filled in; nothing that the client did not ask."""
    fields = await check(
        full,
        train(
            task_id=5.0,
            task_type=0,
            priority=2.0,
            patience=50.0,
            json_mongodb_id="",
            param_request={"model_name": "new", "device_type": 0, "max_num_iters": 300.0, "initial_learning_rate": 1},
        ),
    )
    assert isinstance(fields, dict)
    assert fields["task_id"] == 5
    assert type(fields["task_id"]) is Int64
    assert (fields["task_type"], fields["priority"], fields["max_attempts"]) == ("TRAIN", 2, 3)
    assert (type(fields["patience"]), fields["patience"]) == (int, 50)
    assert fields["param_request"] == {
        "model_name": "new",
        "dataset_expansion_lst": [],
        "net_model": "MobileNet",
        "model_scope": "NORMAL",
        "device_type": "CPU",
        "inital_learning_rate": 1.0,
        "device_num": 1,
        "max_num_iters": 300,
        "batch_size": 10,
        "snap_shot_ivterval": 10000,
    }
    assert not set(fields) & set(SERVICE_FIELDS)
    assert "json_mongodb_id" not in fields


async def test_a_stored_message_takes_the_place_of_images(full: Store) -> None:
    """With a message no image is asked for; its id is stored as hex digits."""
    fields = await check(full, train(json_mongodb_id=MESSAGE, img_mongodb_ids=[NOWHERE]))
    assert isinstance(fields, dict)
    assert fields["json_mongodb_id"] == str(MESSAGE)


@pytest.mark.parametrize(("name", "there"), [("known", True), ("known:3", True), ("known:5", False), ("new", False)])
async def test_a_test_needs_a_registered_model(full: Store, name: str, there: bool) -> None:
    """`name` is the newest version, `name:version` that one; a net_model is not looked at."""
    answer = await check(full, train(task_type="TEST", param_request={"model_name": name, "net_model": "Other"}))
    assert isinstance(answer, dict) is there


async def test_a_training_may_begin_with_a_version(full: Store) -> None:
    """With its weights stored, and of the same network; the scope is free. Without a version nothing is looked up."""
    for model_name in ("known:4", "known", "other"):
        fields = await check(full, train(param_request={"model_name": model_name, "model_scope": "LARGE"}))
        assert isinstance(fields, dict)
        assert fields["param_request"]["model_name"] == model_name


async def test_a_training_never_reads_the_test_split(full: Store) -> None:
    """`split: test` in a training is refused; in a test it is the usual thing."""
    await full.database.db.IMG_INFO.insert_one({"dataset": "toy", "split": "test"})
    request = train(img_mongodb_ids=[], dataset="toy", split="test")
    answer = await check(full, request)
    assert isinstance(answer, Rejection)
    assert (answer.code, answer.field) == (CODES.PARAM_INVALID, "split")
    assert "'test'" in answer.message
    assert isinstance(
        await check(full, request | {"task_type": "TEST", "param_request": {"model_name": "known"}}), dict
    )
