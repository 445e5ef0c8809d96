"""The real detector across versions: what one has begun the other finishes, and each tests the models of the other."""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from gridfs import GridFSBucket
from pymongo.database import Database

from tests.helpers import Service, ended, wait_for

Db = Database[dict[str, Any]]
Serve = Callable[..., Service]

#: Instead of the stand-in: what a worker starts by default, of its own version.
REAL = {"child_command": ""}


@pytest.fixture
def squares(db: Db) -> None:
    """Eight images of the data set `squares`, each with a white square on it, for training and for testing."""
    for number in range(8):
        picture = np.zeros((96, 96, 3), np.uint8)
        left = 8 * number
        cv2.rectangle(picture, (left, 30), (left + 30, 60), (255, 255, 255), -1)
        data = cv2.imencode(".png", picture)[1].tobytes()
        file_id = GridFSBucket(db, "images").upload_from_stream(f"{number}.png", data)
        image = {"file_name": f"{number}.png", "width": 96, "height": 96, "file_id": file_id, "dataset": "squares"}
        for split in ("train", "test"):
            image_id = db.IMG_INFO.insert_one({**image, "split": split}).inserted_id
            db.IMG_LAB_INFO.insert_one({"img_id": image_id, "class_name": "square", "bbox": [left, 30, 30, 30]})


@pytest.mark.parametrize("forwards", [True, False], ids=["0.1.0 begins", "0.1.0 goes on"])
def test_a_training_begun_by_one_version_is_finished_by_the_other(
    db: Db, serve_first: Serve, serve: Serve, squares: None, forwards: bool
) -> None:
    """Begun anew, since the network is another one, after one fault; and each tests the other's registered model."""
    begin, go_on = (serve_first, serve) if forwards else (serve, serve_first)
    first = begin(grace_seconds=60, **REAL)
    params = {"model_name": "squares", "model_scope": "SMALL", "device_type": "CPU", "batch_size": 2}
    params |= {"max_num_iters": 12, "snap_shot_ivterval": 4}
    request = {"task_id": 1, "task_type": "TRAIN", "dataset": "squares", "split": "train", "param_request": params}
    db.DL_TASK.insert_one(request)
    wait_for(lambda: db.DL_TASK.find_one({"task_id": 1, "snapshot.iteration": {"$gte": 4}}), 300)
    assert first.stop() == 0
    half = db.DL_TASK.find_one({"task_id": 1})
    assert half is not None
    assert (half["status"], half["failures"]) == ("PENDING", 0), first.log.read_text()
    second = go_on(grace_seconds=60, **REAL)
    trained = ended(db, 1, seconds=300)
    assert trained["status"] == "SUCCEEDED", second.log.read_text()
    assert half["snapshot"]["iteration"] >= 4
    assert trained["result"]["resumed_from_iteration"] is None
    assert (trained["attempt"], trained["failures"]) == (3, 1)
    assert trained["result"]["iterations"] == 12

    test = {"task_type": "TEST", "dataset": "squares", "param_request": {"model_name": "squares", "device_type": "CPU"}}
    db.DL_TASK.insert_one({"task_id": 2, **test})
    by_second = ended(db, 2, seconds=300)
    assert second.stop() == 0
    third = begin(**REAL)
    db.DL_TASK.insert_one({"task_id": 3, **test})
    by_first = ended(db, 3, seconds=300)
    assert third.stop() == 0
    assert (by_first["status"], by_second["status"]) == ("SUCCEEDED", "SUCCEEDED"), third.log.read_text()
    found = [by["result"]["metrics"]["map"] for by in (by_first, by_second)]
    # Not to the last digit: 0.1.0 stretches images by area.
    assert found[0] == pytest.approx(found[1], rel=0.1)
