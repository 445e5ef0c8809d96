"""A file in GridFS that is gone or damaged costs what hangs on it and no more, in a real service."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import cv2
import numpy as np
import pytest
from bson import ObjectId
from gridfs import GridFSBucket
from pymongo.database import Database

from handlers.images import ImageCache
from handlers.store import Store
from tests.helpers import Service, ended, train_request, wait_for
from tests.integration.test_image_cache import content, fetch
from tests.unit.detection.toy_model import NAMES, SIDE, write_model

Db = Database[dict[str, Any]]
Serve = Callable[..., Service]


def set_file(db: Db, bucket: str, file_id: ObjectId, **fields: Any) -> None:
    db[f"{bucket}.files"].update_one({"_id": file_id}, {"$set": fields})


def change_data(db: Db, bucket: str, file_id: ObjectId, change: Callable[[bytes], Any]) -> None:
    chunk = db[f"{bucket}.chunks"].find_one({"files_id": file_id, "n": 0})
    assert chunk is not None
    db[f"{bucket}.chunks"].update_one({"_id": chunk["_id"]}, {"$set": {"data": change(chunk["data"])}})


#: What can happen to a file of one chunk.
DAMAGE: dict[str, Callable[[Db, str, ObjectId], object]] = {
    "no document": lambda db, bucket, i: db[f"{bucket}.files"].delete_one({"_id": i}),
    "no chunk": lambda db, bucket, i: db[f"{bucket}.chunks"].delete_many({"files_id": i}),
    "another chunk size": lambda db, bucket, i: set_file(db, bucket, i, chunkSize=1),
    "no chunk size": lambda db, bucket, i: set_file(db, bucket, i, chunkSize=0),
    "a length in words": lambda db, bucket, i: set_file(db, bucket, i, length="many"),
    "a length beyond all": lambda db, bucket, i: set_file(db, bucket, i, length=2**60),
    "one byte more": lambda db, bucket, i: change_data(db, bucket, i, lambda data: data + b"x"),
    "one byte less": lambda db, bucket, i: change_data(db, bucket, i, lambda data: data[:-1]),
    "one bit changed": lambda db, bucket, i: change_data(db, bucket, i, lambda data: bytes([data[0] ^ 1]) + data[1:]),
    "no data": lambda db, bucket, i: change_data(db, bucket, i, lambda data: None),
    "one chunk more": lambda db, bucket, i: db[f"{bucket}.chunks"].insert_one({"files_id": i, "n": 1, "data": b"x"}),
}


def upload(db: Db, bucket: str, data: bytes) -> ObjectId:
    """As `Bucket.put` does it, with the file's sha256."""
    metadata = {"sha256": hashlib.sha256(data).hexdigest()}
    file_id: ObjectId = GridFSBucket(db, bucket).upload_from_stream("x", data, metadata=metadata)
    return file_id


def register(db: Db, task_id: int, data: bytes, **fields: Any) -> str:
    """A model of its own name with this file; returns the name."""
    model = {
        "model_name": f"m{task_id}",
        "version": 1,
        "task_id": task_id,
        "class_names": list(NAMES),
        "input_size": SIDE,
        "file_id": upload(db, "models", data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    db.DL_MODEL.insert_one(model | fields)
    return str(model["model_name"])


def request_of_test(task_id: int, model_name: str) -> dict[str, Any]:
    params = {"model_name": model_name, "device_type": "CPU"}
    return {"task_id": task_id, "task_type": "TEST", "dataset": "toy", "split": "train", "param_request": params}


def test_damaged_images_are_skipped_with_the_reason(db: Db, serve: Serve, tmp_path: Path) -> None:
    """A real test of a real model: each damaged image is named, the whole one is used."""
    picture = cv2.imencode(".png", np.full((40, 40, 3), 200, np.uint8))[1].tobytes()
    images = {}
    for name in ("whole", *DAMAGE):
        file_id = upload(db, "images", picture)
        image = {"file_name": name, "width": 40, "height": 40, "file_id": file_id, "dataset": "toy", "split": "train"}
        images[name] = str(db.IMG_INFO.insert_one(image).inserted_id)
        if name != "whole":
            DAMAGE[name](db, "images", file_id)
    name = register(db, 1, write_model(tmp_path / "model.onnx").read_bytes())
    register(db, 2, b"not a model, but the file that was registered")
    serve(child_command=f"{sys.executable} -m handlers.detection")
    db.DL_TASK.insert_one(request_of_test(1, name))
    db.DL_TASK.insert_one(request_of_test(2, "m2"))
    document = ended(db, 1, seconds=120)
    assert document["status"] == "SUCCEEDED", document["error"]
    used = document["result"]["images"]
    assert (used["used"], used["skipped"]) == (1, len(DAMAGE))
    reasons = {example["img_id"]: example["reason"] for example in used["skipped_examples"]}
    assert set(reasons) == set(images.values()) - {images["whole"]}
    assert all("missing or damaged in GridFS" in reason for reason in reasons.values())
    # A file that is no model, with the sha256 that was registered: the child says so.
    document = ended(db, 2, seconds=120)
    assert (document["status"], document["attempt"], document["error"]["kind"]) == ("FAILED", 1, "data")
    assert document["error"]["field"] == "model_name"
    assert "is not a model that can be loaded" in document["error"]["message"]


def test_a_damaged_model_fails_the_test(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """FAILED at once, with kind `model` and what is wrong; a whole one is tested."""
    serve(cpu_devices=4)
    for number, damage in enumerate([None, *DAMAGE.values()]):
        name = register(db, number, b"the bytes of a model" * 10)
        if damage:
            model = db.DL_MODEL.find_one({"model_name": name})
            assert model is not None
            damage(db, "models", model["file_id"])
        db.DL_TASK.insert_one(request_of_test(number, name))
    register(db, 100, b"other bytes", sha256="0" * 64)
    db.DL_TASK.insert_one(request_of_test(100, "m100"))
    assert ended(db, 0)["status"] == "SUCCEEDED"
    for number in [*range(1, len(DAMAGE) + 1), 100]:
        document = ended(db, number)
        assert (document["status"], document["attempt"], document["error"]["kind"]) == ("FAILED", 1, "model")
        assert document["error_code"] == 8


def test_a_damaged_message_fails_the_task(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """FAILED at once, with kind `data`, whether it is gone, damaged or changed into another message."""
    serve(cpu_devices=4)
    db.DL_TASK.insert_one(train_request(1))
    message = GridFSBucket(db, "messages").open_download_stream(ObjectId(ended(db, 1)["json_mongodb_id"])).read()
    for number, name in enumerate(DAMAGE, 10):
        file_id = upload(db, "messages", message)
        DAMAGE[name](db, "messages", file_id)
        db.DL_TASK.insert_one(train_request(number, json_mongodb_id=str(file_id)))
    # Still a message, but another one: its sha256 tells.
    changed = upload(db, "messages", message)
    change_data(db, "messages", changed, lambda data: data.replace(b'"width":32', b'"width":33'))
    db.DL_TASK.insert_one(train_request(34, json_mongodb_id=str(changed)))
    # Whole, but no message.
    for number, data in ((30, b""), (31, b"{}"), (32, b"[" * 100_000), (33, b"\xff\xfe")):
        db.DL_TASK.insert_one(train_request(number, json_mongodb_id=str(upload(db, "messages", data))))
    for number, name in enumerate(DAMAGE, 10):
        document = ended(db, number)
        assert document["error_code"] == 2
        if name == "no document":  # seen by admission, see the next test
            assert document["status"] == "REJECTED"
        else:
            assert (document["status"], document["attempt"], document["error"]["kind"]) == ("FAILED", 1, "data")
    for number in range(30, 35):
        document = ended(db, number)
        assert (document["status"], document["error"]["kind"]) == ("FAILED", "data")
        assert document["error"]["field"] == "json_mongodb_id"


def test_a_message_that_goes_after_admission(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """FAILED with kind `data`, though admission found it."""
    serve()
    db.DL_TASK.insert_one(train_request(1, iterations=10_000))
    wait_for(lambda: db.DL_TASK.find_one({"task_id": 1, "status": "RUNNING", "json_mongodb_id": {"$ne": None}}))
    file_id = upload(db, "messages", b"{}")
    db.DL_TASK.insert_one(train_request(2, json_mongodb_id=str(file_id)))
    wait_for(lambda: db.DL_TASK.find_one({"task_id": 2, "status": "PENDING"}))
    db["messages.files"].delete_one({"_id": file_id})
    db.DL_TASK.update_one({"task_id": 1}, {"$set": {"cancel_requested": True}})
    document = ended(db, 2)
    assert (document["status"], document["error"]["kind"]) == ("FAILED", "data")
    assert "is gone" in document["error"]["message"]


def test_a_damaged_snapshot_means_starting_over(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """Each training starts over and SUCCEEDS; the one whose snapshot is whole goes on from it."""
    first = serve(cpu_devices=len(DAMAGE) + 1, grace_seconds=20)
    db.DL_TASK.insert_many([train_request(number, iterations=10_000) for number in range(len(DAMAGE) + 1)])
    at_work = {"status": "RUNNING", "progress.iteration": {"$gt": 0}}
    wait_for(lambda: db.DL_TASK.count_documents(at_work) == len(DAMAGE) + 1)
    first.stop()
    for number, damage in enumerate(DAMAGE.values(), 1):
        task = db.DL_TASK.find_one({"task_id": number})
        assert task is not None
        damage(db, "models", task["snapshot"]["file_id"])
    # So that they end soon, from wherever they go on.
    whole = db.DL_TASK.find_one({"task_id": 0})
    assert whole is not None
    last = whole["snapshot"]["iteration"] + 20
    db.DL_TASK.update_many({}, {"$set": {"param_request.max_num_iters": last}})
    serve(cpu_devices=len(DAMAGE) + 1)
    assert ended(db, 0, 60)["result"]["resumed_from_iteration"] == whole["snapshot"]["iteration"]
    for number in range(1, len(DAMAGE) + 1):
        document = ended(db, number, 60)
        assert (document["status"], document["failures"]) == ("SUCCEEDED", 0)
        assert document["result"]["resumed_from_iteration"] is None


@pytest.mark.parametrize("left", [0, 500])
async def test_a_cached_image_that_a_power_cut_left_is_fetched_again(
    store: Store, db: Db, tmp_path: Path, left: int
) -> None:
    """Empty or cut short in the cache: noticed by its length, and whole again for this run and the next."""
    data = b"0123456789" * 100
    file_id = GridFSBucket(db, "images").upload_from_stream("x", data)
    cache = ImageCache(tmp_path / "cache", max_bytes=10**9)
    await fetch(cache, store, tmp_path / "one", [file_id])
    (cached,) = (tmp_path / "cache").glob("*/*")
    cached.unlink()
    cached.write_bytes(data[:left])
    for run in ("two", "three"):
        (row,) = await fetch(cache, store, tmp_path / run, [file_id])
        assert content(row) == data
    assert cached.read_bytes() == data


async def test_an_image_that_gridfs_has_no_more_is_not_taken_from_the_cache(
    store: Store, db: Db, tmp_path: Path
) -> None:
    """So that what a task runs on does not hang on the machine that it runs on."""
    file_id = GridFSBucket(db, "images").upload_from_stream("x", b"x" * 10)
    cache = ImageCache(tmp_path / "cache", max_bytes=10**9)
    await fetch(cache, store, tmp_path / "one", [file_id])
    GridFSBucket(db, "images").delete(file_id)
    (row,) = await fetch(cache, store, tmp_path / "two", [file_id])
    assert "missing or damaged" in row["reason"]


async def test_every_stored_file_carries_its_sha256(store: Store, db: Db, tmp_path: Path) -> None:
    """Beside what its writer says of it; and one of another writer, with a text of that name, is fetched as it is."""
    await anyio.Path(tmp_path / "in").write_bytes(b"some bytes")
    await store.files.reports.put(tmp_path / "in", "x", {"task_id": 1})
    document = db["reports.files"].find_one()
    assert document is not None
    assert document["metadata"] == {"task_id": 1, "sha256": hashlib.sha256(b"some bytes").hexdigest()}
    for metadata in ({"sha256": "unknown"}, {"sha256": 5}, {"sha256": hashlib.sha256(b"y").hexdigest().upper()}, None):
        file_id = GridFSBucket(db, "images").upload_from_stream("x", b"y", metadata=metadata)
        await store.files.images.fetch(file_id, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == b"y"
    assert {path.name async for path in anyio.Path(tmp_path).iterdir()} == {"in", "out"}
