"""A disk that is really full ends an attempt, not the task, and leaves nothing half that is later taken for whole."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
from bson import ObjectId
from gridfs import GridFSBucket
from pymongo.database import Database

from tests.disks import fill, resize, small_disk
from tests.helpers import Service, ended, train_request, wait_for
from tests.unit.detection.drawn import CLASSES, SIDE, draw

Db = Database[dict[str, Any]]
Serve = Callable[..., Service]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 16) as path:
        yield path


def put_back(db: Db, task_id: int) -> dict[str, Any]:
    """The task document after its first fault."""
    document: dict[str, Any] = wait_for(lambda: db.DL_TASK.find_one({"task_id": task_id, "failures": {"$gte": 1}}), 120)
    return document


@pytest.mark.parametrize(("leave", "kind"), [(3_000_000, "disk_full"), (0, "machine")])
def test_no_room_for_the_images(
    db: Db, serve: Serve, image_ids: list[ObjectId], disk: Path, leave: int, kind: str
) -> None:
    """Whether the images do not fit or not even the request message: back to the queue with the reason; once there is
    room the task SUCCEEDS. What the first attempt left in the cache is whole.
    """
    contents = {}
    for image_id in image_ids:
        contents[image_id] = os.urandom(1_500_000)
        file_id = GridFSBucket(db, "images").upload_from_stream("x", contents[image_id])
        db.IMG_INFO.update_one({"_id": image_id}, {"$set": {"file_id": file_id}})
    by_file = {str(image["file_id"]): contents[image["_id"]] for image in db.IMG_INFO.find()}
    filler = fill(disk, leave=leave)
    service = serve(cache_dir=disk)
    db.DL_TASK.insert_one(train_request(1, max_attempts=10))
    document = put_back(db, 1)
    assert (document["error"]["kind"], document["status"]) == (kind, "PENDING")
    if kind == "disk_full":
        assert "DLTASK_CACHE_DIR" in document["error"]["message"]
    cached = list((disk / "images").glob("*/*"))
    assert all(path.read_bytes() == by_file[path.name] for path in cached)
    filler.unlink()
    assert ended(db, 1)["status"] == "SUCCEEDED"
    cached = list((disk / "images").glob("*/*"))
    assert {path.name: path.read_bytes() for path in cached} == by_file
    service.stop()
    assert not [path for path in (disk / "runs").iterdir() if path.is_dir()], "nothing of the attempts is left"


def test_no_room_for_a_snapshot_of_a_real_training(db: Db, serve: Serve, disk: Path) -> None:
    """The child says that the disk is full; with a larger disk the training SUCCEEDS."""
    for number in range(1, 7):
        image, labels = draw(number)
        encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
        file_id = GridFSBucket(db, "images").upload_from_stream("x", encoded)
        known = {
            "file_name": "x",
            "width": SIDE,
            "height": SIDE,
            "file_id": file_id,
            "dataset": "toy",
            "split": "train",
        }
        image_id = db.IMG_INFO.insert_one(known).inserted_id
        for class_id, box in labels:
            db.IMG_LAB_INFO.insert_one({"img_id": image_id, "class_name": CLASSES[class_id - 1], "bbox": box})
    serve(cache_dir=disk, child_command=f"{sys.executable} -m handlers.detection")
    request = train_request(1, iterations=2, max_attempts=20)
    request["param_request"] |= {"model_scope": "SMALL", "batch_size": 2}
    db.DL_TASK.insert_one(request)
    document = put_back(db, 1)
    assert document["error"]["kind"] == "machine"
    assert "No space left on device" in document["error"]["message"]
    resize(disk, 500)
    assert ended(db, 1, seconds=180)["status"] == "SUCCEEDED"
    assert db.DL_MODEL.count_documents({}) == 1
