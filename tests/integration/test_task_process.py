"""`TaskProcess`: each code, in the published precedence, and the result of a test; anything but OK inserts nothing."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from bson import Decimal128, ObjectId
from gridfs import GridFSBucket
from pymongo import MongoClient
from pymongo.database import Database

from handlers.errors import StartupError
from handlers.task_process import TaskProcess
from schemas.enums import DeviceClass, ExpansionDataClass, TaskErrorCode, TaskTypeClass
from schemas.numbers import bson_uint64
from schemas.params import ParamClass
from tests.helpers import Service, ended

Db = Database[dict[str, Any]]
TRAIN, TEST = TaskTypeClass.TRAIN, TaskTypeClass.TEST


@pytest.fixture
def process(dltask_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[TaskProcess]:
    """A TaskProcess on the test's database."""
    for name in ("DLTASK_MONGODB_URI", "DLTASK_DATABASE"):
        monkeypatch.setenv(name, dltask_env[name])
    with TaskProcess() as process:
        yield process


def params(**fields: Any) -> ParamClass:
    return ParamClass(**{"model_name": "ok", "device_type": DeviceClass.CPU, "max_num_iters": 2, **fields})


def test_a_request_becomes_the_document_a_client_would_insert(
    process: TaskProcess, db: Db, image_ids: list[ObjectId]
) -> None:
    """Names as published, ids as ObjectIds, and nothing that only the service writes."""
    request = ParamClass("ok", [ExpansionDataClass.HOR_FLIPE])
    ids = [str(image_ids[0]), image_ids[1]]
    assert process.task_start_request(request, 7, TRAIN, ids, "") == 0
    document = db.DL_TASK.find_one({"task_id": 7})
    assert document is not None
    assert set(document) == {"_id", "task_id", "task_type", "param_request", "img_mongodb_ids"}
    assert process.task_start_request(request, 8, TRAIN, ids, "", mirror=False) == 0
    assert db.DL_TASK.count_documents({"task_id": 8, "mirror": False}) == 1
    assert document["task_type"] == "TRAIN"
    assert document["img_mongodb_ids"] == image_ids[:2]
    assert document["param_request"]["dataset_expansion_lst"] == ["HOR_FLIPE"]
    assert document["param_request"]["batch_size"] == 10


def test_a_stored_message_takes_the_place_of_image_ids(process: TaskProcess, db: Db, image_ids: list[ObjectId]) -> None:
    """With `json_mongodb_id` the list of images may be empty; None stands for no message, as '' does."""
    message = str(GridFSBucket(db, "messages").upload_from_stream("m.json", b"{}"))
    assert process.task_start_request(params(), 1, TRAIN, [], message) is TaskErrorCode.OK
    assert process.task_start_request(params(), 2, TRAIN, image_ids, None) is TaskErrorCode.OK  # type: ignore[arg-type]
    given, built = db.DL_TASK.find_one({"task_id": 1}), db.DL_TASK.find_one({"task_id": 2})
    assert given is not None
    assert built is not None
    assert given["json_mongodb_id"] == message
    assert "json_mongodb_id" not in built


@pytest.mark.parametrize("task_id", [0, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 12.0])
def test_the_whole_range_of_task_ids(
    process: TaskProcess, db: Db, image_ids: list[ObjectId], task_id: int | float
) -> None:
    """Every uint64 is accepted once, and found again by value."""
    assert process.task_start_request(params(), task_id, TRAIN, image_ids, "") is TaskErrorCode.OK  # type: ignore[arg-type]
    assert process.task_start_request(params(), task_id, TRAIN, image_ids, "") is TaskErrorCode.TASK_ID_INVALID  # type: ignore[arg-type]
    number = int(task_id)
    assert db.DL_TASK.count_documents({"task_id": Decimal128(str(number))}) == 1


BAD_ID = ObjectId()


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        (TaskErrorCode.TASK_ID_INVALID, {"task_id": -1}),
        (TaskErrorCode.TASK_ID_INVALID, {"task_id": 2**64}),
        (TaskErrorCode.TASK_ID_INVALID, {"task_id": "1"}),
        (TaskErrorCode.TASK_ID_INVALID, {"task_id": True}),
        (TaskErrorCode.TASK_ID_INVALID, {"task_id": None}),
        (TaskErrorCode.TASK_ID_INVALID, {"task_id": 2.0**60}),
        (TaskErrorCode.TASK_TYPE_ERROR, {"task_type": 2}),
        (TaskErrorCode.TASK_TYPE_ERROR, {"task_type": "TRIAN"}),
        (TaskErrorCode.PARAM_INVALID, {"param_request": params(batch_size=0)}),
        (TaskErrorCode.PARAM_INVALID, {"param_request": params(model_name="")}),
        (TaskErrorCode.PARAM_INVALID, {"param_request": params(device_num=2**16)}),
        (TaskErrorCode.MODEL_INVALID, {"param_request": params(net_model="YOLO99")}),
        (TaskErrorCode.MODEL_INVALID, {"task_type": TEST, "param_request": params(model_name="unknown")}),
        (TaskErrorCode.PARAM_INVALID, {"param_request": params(model_name="unknown:0")}),
        (TaskErrorCode.MODEL_INVALID, {"param_request": params(model_name="unknown:1")}),
        (TaskErrorCode.JASON_MONGOID_INVALID, {"json_mongodb_id": str(BAD_ID)}),
        (TaskErrorCode.JASON_MONGOID_INVALID, {"json_mongodb_id": "not an id"}),
        (TaskErrorCode.IMAG_MONGOID_INVALID, {"img_mongodb_ids": [BAD_ID]}),
        (TaskErrorCode.IMAG_MONGOID_INVALID, {"img_mongodb_ids": []}),
        (TaskErrorCode.IMAG_MONGOID_INVALID, {"img_mongodb_ids": ["x"]}),
        (TaskErrorCode.IMAG_MONGOID_INVALID, {"img_mongodb_ids": str(BAD_ID)}),
    ],
)
def test_each_code_and_nothing_inserted(
    process: TaskProcess, db: Db, image_ids: list[ObjectId], code: TaskErrorCode, wrong: dict[str, Any]
) -> None:
    """One thing wrong gives its code, and leaves no document."""
    request = {
        "param_request": params(),
        "task_id": 1,
        "task_type": TRAIN,
        "img_mongodb_ids": image_ids,
        "json_mongodb_id": "",
    }
    assert process.task_start_request(**(request | wrong)) is code
    assert db.DL_TASK.count_documents({}) == 0


def test_empty_collections(process: TaskProcess, db: Db, image_ids: list[ObjectId]) -> None:
    """A training needs images and labels; a test needs images only."""
    db.DL_MODEL.insert_one({"model_name": "ok", "version": 1, "task_id": 9})
    db.IMG_LAB_INFO.delete_many({})
    assert process.task_start_request(params(), 1, TRAIN, image_ids, "") is TaskErrorCode.COLLECTIONS_EMPTY
    assert process.task_start_request(params(), 1, TEST, image_ids, "") is TaskErrorCode.OK
    db.IMG_INFO.delete_many({})
    assert process.task_start_request(params(), 2, TEST, image_ids, "") is TaskErrorCode.COLLECTIONS_EMPTY
    assert db.DL_TASK.count_documents({}) == 1


def test_the_first_of_several_codes(process: TaskProcess, db: Db) -> None:
    """Everything wrong, then mended one by one, gives 4, 1, 7, 8, 5, 2, 3 and 0; a used id counts as an invalid one."""
    assert process.task_start_request(params(), 5, TRAIN, [], "") is TaskErrorCode.COLLECTIONS_EMPTY
    db.DL_TASK.insert_one({"task_id": 5})
    bad = str(ObjectId())
    request: dict[str, Any] = {
        "param_request": params(batch_size=0, net_model="YOLO99"),
        "task_id": 5,
        "task_type": 9,
        "img_mongodb_ids": [bad],
        "json_mongodb_id": bad,
    }

    def image() -> str:
        db.IMG_LAB_INFO.insert_one({"class_name": "a"})
        return str(db.IMG_INFO.insert_one({"file_name": "x"}).inserted_id)

    mends: list[tuple[int, Callable[[], dict[str, Any]]]] = [
        (4, lambda: {"task_id": 6}),
        (1, lambda: {"task_type": TRAIN}),
        (7, lambda: {"param_request": params(net_model="YOLO99")}),
        (8, lambda: {"param_request": params()}),
        (5, lambda: {"ignored": image()}),
        (2, lambda: {"json_mongodb_id": ""}),
        (3, lambda: {"img_mongodb_ids": [image()]}),
    ]
    for code, mend in mends:
        assert process.task_start_request(**request) == code
        request |= mend()
        request.pop("ignored", None)
    assert process.task_start_request(**request) == 0


def test_many_threads_and_one_task_id(process: TaskProcess, db: Db, image_ids: list[ObjectId]) -> None:
    """Of many threads that ask for the same number one gets it; one connection serves them all."""
    with ThreadPoolExecutor(16) as pool:
        codes = list(
            pool.map(lambda _: process.task_start_request(params(), 3, TRAIN, image_ids, ""), range(32)),
        )
    assert sorted(codes) == [TaskErrorCode.OK, *[TaskErrorCode.TASK_ID_INVALID] * 31]
    assert db.DL_TASK.count_documents({}) == 1


def test_a_list_that_no_document_can_hold(
    process: TaskProcess, db: Db, image_ids: list[ObjectId], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a worker would reject for its size is not inserted, and has the same code."""
    monkeypatch.setattr("handlers.task_process.MAX_DOCUMENT_BYTES", 1000)
    many = image_ids * 30
    assert process.task_start_request(params(), 1, TRAIN, many, "") is TaskErrorCode.IMAG_MONGOID_INVALID
    assert db.DL_TASK.count_documents({}) == 0
    assert process.task_start_request(params(), 1, TRAIN, image_ids, "") is TaskErrorCode.OK


def test_results_of_tests(process: TaskProcess, db: Db) -> None:
    """Unknown and non-test tasks are invalid, waiting and running ones not over, ended ones have a status."""

    def task(task_id: int, **fields: Any) -> int:
        key = ObjectId()
        document = {"_id": key, "admitted_id": key, "task_id": bson_uint64(task_id), "task_type": "TEST", **fields}
        db.DL_TASK.insert_one(document)
        return task_id

    not_over = (TaskErrorCode.TASK_TEST_NOT_OVER, None)
    invalid = (TaskErrorCode.TASK_ID_INVALID, None)
    assert process.task_test_result(1) == invalid
    assert process.task_test_result("x") == invalid  # type: ignore[arg-type]
    assert process.task_test_result(-1) == invalid
    assert process.task_test_result(task(2, task_type="TRAIN", status="SUCCEEDED", result={})) == invalid
    assert process.task_test_result(task(3, task_type="nonsense", status="REJECTED")) == invalid
    assert process.task_test_result(task(4, status="PENDING")) == not_over
    assert process.task_test_result(task(5, status="RUNNING")) == not_over
    db.DL_TASK.insert_one({"task_id": 6, "task_type": 1})
    assert process.task_test_result(6) == not_over
    # A copy of a finished task's document, inserted as a new task, has not run.
    assert process.task_test_result(task(7, admitted_id=ObjectId(), status="SUCCEEDED", result={"x": 1})) == not_over
    error = {"kind": "data", "message": "too few", "field": None}
    for number, status in enumerate(("FAILED", "REJECTED"), 8):
        assert process.task_test_result(task(number, status=status, error=error)) == (
            TaskErrorCode.OK,
            {"status": status, "error": error},
        )
    cancelled = {"status": "CANCELLED", "error": None}
    assert process.task_test_result(task(10, status="CANCELLED")) == (TaskErrorCode.OK, cancelled)
    code, result = process.task_test_result(task(2**64 - 1, status="SUCCEEDED", result={"device": "cpu"}))
    assert (code, result) == (TaskErrorCode.OK, {"status": "SUCCEEDED", "device": "cpu"})


def test_from_a_request_to_its_result(
    process: TaskProcess, db: Db, image_ids: list[ObjectId], serve: Callable[..., Service]
) -> None:
    """With a service running: a training, a test of what it made, and the result of the test."""
    serve()
    assert process.task_start_request(params(), 1, TRAIN, image_ids, "") == 0
    assert (train := ended(db, 1))["status"] == "SUCCEEDED", train
    assert process.task_start_request(params(), 2, TEST, image_ids, "") == 0
    assert ended(db, 2)["status"] == "SUCCEEDED"
    code, result = process.task_test_result(2)
    assert code == 0
    assert result is not None
    assert (result["status"], result["model_name"], result["version"]) == ("SUCCEEDED", "ok", 1)
    assert process.task_test_result(1) == (TaskErrorCode.TASK_ID_INVALID, None)


def test_closing_and_going_on(process: TaskProcess, db: Db) -> None:
    """`close` ends the connection, may be called twice, and a later call opens another one."""
    assert process.task_test_result(1)[0] is TaskErrorCode.TASK_ID_INVALID
    process.close()
    process.close()
    assert process.task_test_result(1)[0] is TaskErrorCode.TASK_ID_INVALID


def test_a_program_that_never_closes_ends_without_a_word(dltask_env: dict[str, str]) -> None:
    """No warning, no traceback and no hanging thread at the end of a program."""
    code = "from handlers.task_process import TaskProcess; p = TaskProcess(); print(int(p.task_test_result(1)[0]))"
    ran = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code],
        env=dltask_env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "4\n", "")


def test_a_constructor_without_arguments_connects_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings come from the environment; a URI that is none is said at the first call, without its password."""
    monkeypatch.setenv("DLTASK_MONGODB_URI", "mongodb://user:geheim@@nowhere")
    process = TaskProcess()
    with pytest.raises(StartupError, match="is not a MongoDB URI") as error:
        process.task_test_result(1)
    assert "geheim" not in str(error.value)


def test_a_database_named_in_the_environment(process: TaskProcess, mongo_uri: str, database_name: str) -> None:
    """The indexes that tell two requests apart are there after the first call."""
    process.task_test_result(1)
    with MongoClient(mongo_uri) as client:
        assert client[database_name].DL_TASK.index_information()["task_id"]["unique"]
