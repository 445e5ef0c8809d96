"""The main job on real data: blood cells are imported, trained through the loss of a worker, and tested."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pymongo.database import Database

from tests.helpers import Service, alive, ended, wait_for

REAL_CHILD = f"{sys.executable} -m handlers.detection"
REQUEST = {
    "task_id": 1,
    "task_type": "TRAIN",
    "dataset": "bccd",
    "split": "train",
    "param_request": {
        "model_name": "cells",
        "dataset_expansion_lst": ["HOR_FLIPE", "VER_FLIPE"],
        # Half the pixels of NORMAL, and half the time.
        "model_scope": "SMALL",
        "device_type": "CPU",
        "max_num_iters": 140,
        "batch_size": 10,
        "snap_shot_ivterval": 70,
    },
}


@pytest.mark.timeout(1800)
def test_blood_cells(
    db: Database[dict[str, Any]],
    serve: Callable[..., Service],
    dltask_env: dict[str, str],
    shared_datasets: Path,
    tmp_path: Path,
) -> None:
    """140 iterations at the default rate, the worker killed after 70: one model, test mAP@.5 of at least 0.78."""

    def dltask(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "service.cli", *arguments], env=dltask_env, check=True)

    dltask("dataset", "import", "--format", "coco", str(shared_datasets / "bccd"), "--name", "bccd")
    assert db.IMG_LAB_INFO.count_documents({}) == 4886
    first = serve(child_command=REAL_CHILD, lease_seconds=10)
    db.DL_TASK.insert_one(REQUEST)
    wait_for(lambda: db.DL_TASK.find_one({"task_id": 1, "snapshot.iteration": 70}), seconds=600)
    child = subprocess.run(["pgrep", "-P", str(first.process.pid)], capture_output=True, text=True, check=True)
    first.kill()
    wait_for(lambda: not any(alive(int(pid)) for pid in child.stdout.split()))

    serve(child_command=REAL_CHILD, lease_seconds=10)
    train = ended(db, 1, seconds=1200)
    assert train["status"] == "SUCCEEDED", train
    assert (train["attempt"], train["result"]["resumed_from_iteration"]) == (2, 70)
    assert db.DL_MODEL.count_documents({}) == 1
    assert train["result"]["initial_weights"].startswith("ImageNet")
    assert train["result"]["images"] == {"used": 292, "skipped": 0, "skipped_examples": []}
    assert train["result"]["metrics"]["on"] == "val"

    test_request = {"model_name": "cells", "device_type": "CPU"}
    request = {"task_id": 2, "task_type": "TEST", "dataset": "bccd", "split": "test", "param_request": test_request}
    db.DL_TASK.insert_one(request)
    test = ended(db, 2, seconds=300)
    assert test["status"] == "SUCCEEDED", test
    metrics = test["result"]["metrics"]
    assert metrics["map_50"] >= 0.78, metrics
    assert {row["class_name"]: row["instances"] for row in metrics["per_class"]} == {
        "RBC": 805,
        "WBC": 71,
        "Platelets": 69,
    }
    assert db.DL_TEST_RESULT.count_documents({"task_id": 2, "attempt": test["attempt"]}) == 72
    assert metrics["confusion"]["labels"] == [*train["result"]["class_names"], "background"]
    objects = [sum(row) for row in metrics["confusion"]["counts"]][:-1]
    assert objects == [row["instances"] for row in metrics["per_class"]]
    stored = db.DL_MODEL.find_one({"model_name": "cells"})
    assert stored is not None
    assert all(0 < row["threshold"] < 1 and row["f1"] > 0.6 for row in stored["metrics"]["per_class"])
    assert train["result"]["metrics"] == stored["metrics"]
    # One cell was photographed twice: once for the training split, once for that of validation.
    assert (train["result"]["leaks"]["count"], train["result"]["leaks"]["compared"]) == (1, 87)
    assert (test["result"]["leaks"]["count"], test["result"]["leaks"]["training_images"]) == (0, 205)
    own = [row["at_model_threshold"]["threshold"] for row in metrics["per_class"]]
    assert own == [row["threshold"] for row in stored["metrics"]["per_class"]]
    assert metrics["calibration"]["ece"] < 0.2

    for task_id in ("1", "2"):
        dltask("report", task_id, str(tmp_path / task_id))
    drawn = {task_id: {path.name for path in (tmp_path / task_id).glob("*.png")} for task_id in ("1", "2")}
    of_measurement = {"confusion.png", "precision_recall.png", "worst.png", "suspicious.png", "calibration.png"}
    assert drawn["2"] == {"samples.png"} | of_measurement
    assert drawn["1"] == drawn["2"] | {"training.png"}
    pictures = [cv2.imread(str(path)) for task_id in ("1", "2") for path in (tmp_path / task_id).glob("*.png")]
    assert all("<!doctype html>" in (tmp_path / task_id / "report.html").read_text() for task_id in ("1", "2"))
    # A picture with something on it: a blank sheet has no spread of values.
    assert all(picture is not None and min(picture.shape[:2]) > 300 and np.std(picture) > 5 for picture in pictures)

    # The page on the ONNX file, word for word.
    dltask("models", "export", "cells", str(tmp_path))
    page = (Path(__file__).parents[2] / "docs" / "onnx.md").read_text()
    example = page.split("```python\n")[1].split("```")[0]
    shutil.copy(shared_datasets / "bccd" / "images" / "BloodImage_00007.jpg", tmp_path / "picture.jpg")
    ran = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.count("RBC") >= 3, ran.stdout
