"""`dltask` as a program, on a real server, with a running service: what each command prints, and its exit code."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from bson import Decimal128, ObjectId
from gridfs import GridFSBucket
from pymongo import MongoClient
from pymongo.database import Database

from tests.helpers import Service, running

Db = Database[dict[str, Any]]
Dltask = Callable[..., tuple[int, str, str]]
COMMAND = [sys.executable, "-m", "service.cli"]
CPU = ("--param", "device_type=CPU")


@pytest.fixture
def dltask(dltask_env: dict[str, str]) -> Dltask:
    """Runs `dltask` with the given arguments; returns exit code, stdout and stderr."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        ran = subprocess.run(
            [*COMMAND, *map(str, arguments)], env=dltask_env, capture_output=True, text=True, timeout=120, check=False
        )
        assert "Traceback" not in ran.stderr
        return ran.returncode, ran.stdout, ran.stderr

    return run


def test_a_training_from_submit_to_its_model(
    dltask: Dltask, db: Db, serve: Callable[..., Service], image_ids: list[ObjectId], tmp_path: Path
) -> None:
    """submit prints the id; wait follows; status, logs, models, export and workers tell of it, also as one JSON."""
    serve()
    parameters = (*CPU, "--param", "max_num_iters=20", "--param", "dataset_expansion_lst=HOR_FLIP,VER_FLIPE")
    code, out, _ = dltask("submit", "train", "--model-name", "ok", "--dataset", "toy", "--split", "train", *parameters)
    assert code == 0
    task_id = int(out)
    assert 2**50 < task_id < 2**53
    document = db.DL_TASK.find_one({"task_id": task_id})
    assert document is not None
    assert (document["dataset"], document["split"]) == ("toy", "train")

    code, out, err = dltask("wait", task_id)
    assert code == 0, out + err
    assert "SUCCEEDED ok:1 · mAP 0.500 · mAP@.5 0.750 (val)" in out
    code, out, _ = dltask("wait", task_id, "--json")
    waited = json.loads(out)
    assert (code, waited["status"], waited["task_id"]) == (0, "SUCCEEDED", task_id)
    assert waited["end_time"].endswith("Z")
    assert waited["param_request"]["dataset_expansion_lst"] == ["HOR_FLIPE", "VER_FLIPE"]

    code, out, _ = dltask("status")
    assert code == 0
    assert str(task_id) in out
    assert "SUCCEEDED" in out
    assert [task["task_id"] for task in json.loads(dltask("status", "--json")[1])] == [task_id]
    assert json.loads(dltask("status", task_id, "--json")[1])["result"]["version"] == 1
    assert "history" in dltask("status", task_id)[1]
    assert "hello from the child" in dltask("logs", task_id)[1]
    events = json.loads(dltask("logs", task_id, "--json")[1])
    assert any(event.get("line") == "hello from the child" for event in events)

    assert "ok" in dltask("models")[1]
    models = json.loads(dltask("models", "--json")[1])
    assert [(model["model_name"], model["version"]) for model in models] == [("ok", 1)]
    code, out, _ = dltask("models", "export", "ok:1", tmp_path / "model")
    names = ("model.onnx", "classes.json", "model_card.md")
    assert (code, out.splitlines()) == (0, [str(tmp_path / "model" / name) for name in names])
    assert (tmp_path / "model" / "model.onnx").read_bytes() == b"no real model"
    classes = json.loads((tmp_path / "model" / "classes.json").read_text())
    assert classes == {"model_name": "ok", "version": 1, "input_size": 320, "classes": [{"id": 1, "name": "a"}]}
    card = dltask("models", "card", "ok")[1]
    assert card.startswith("# ok:1\n")
    assert (tmp_path / "model" / "model_card.md").read_text() == card
    document = json.loads(dltask("models", "card", "ok:1", "--json")[1])
    assert (document["version"], document["card"]["boxes"]) == (1, [7])
    assert "card" not in models[0]
    for command in (("export", "ok:2", tmp_path / "model"), ("card", "ok:2")):
        code, _, err = dltask("models", *command)
        assert (code, err) == (2, "dltask: there is no model 'ok:2'; see `dltask models`\n")

    [worker] = json.loads(dltask("workers", "--json")[1])
    assert worker["devices"]["CPU"] == 1
    assert worker["_id"] in dltask("workers")[1]
    code, out, _ = dltask("doctor")
    assert code == 0, out
    assert "FAILED" not in out


def test_tasks_that_do_not_succeed_end_with_1(
    dltask: Dltask, db: Db, serve: Callable[..., Service], image_ids: list[ObjectId]
) -> None:
    """Rejected, failed and cancelled: exit 1, with the reason; with --json the document."""
    serve()
    submit = ("submit", "train", "--dataset", "toy", *CPU, "--wait")
    code, out, _ = dltask(*submit, "--model-name", "ok", "--param", "batch_size=0")
    assert code == 1
    assert "REJECTED PARAM_INVALID: param_request.batch_size is 0" in out
    code, out, _ = dltask(*submit, "--model-name", "data", "--json")
    document = json.loads(out)
    assert (code, document["status"], document["error"]["message"]) == (1, "FAILED", "made up: data")
    long = ("submit", "train", "--dataset", "toy", *CPU, "--model-name", "ok", "--task-id", 2**64 - 1)
    assert dltask(*long)[1] == f"{2**64 - 1}\n"
    code, _, err = dltask(*long)
    assert (code, "already used" in err) == (2, True)

    running(db, Decimal128(str(2**64 - 1)))
    assert "RUNNING" in dltask("status")[1]
    assert dltask("cancel", 2**64 - 1) == (0, f"task {2**64 - 1} (RUNNING) is being cancelled\n", "")
    code, out, _ = dltask("wait", 2**64 - 1)
    assert (code, "CANCELLED" in out) == (1, True)
    assert dltask("cancel", 2**64 - 1)[1] == f"task {2**64 - 1} has already ended: CANCELLED\n"


def test_why_tasks_wait(dltask: Dltask, db: Db, serve: Callable[..., Service], image_ids: list[ObjectId]) -> None:
    """`dltask status` says that no worker is alive, that none has the devices, or the position in the queue."""
    submit = ("submit", "train", "--dataset", "toy", "--model-name", "ok")
    assert dltask(*submit, "--task-id", 1, "--param", "device_num=2")[0] == 0
    assert "no worker is alive to admit it" in dltask("status")[1]
    serve()
    assert dltask(*submit, *CPU, "--task-id", 2)[0] == 0
    running(db, 2)
    assert dltask(*submit, *CPU, "--task-id", 3)[0] == 0
    out = dltask("status")[1]
    assert "needs 2 GPU; no live worker has them" in out
    assert "position 2 of 2 in the queue" in dltask("status", 3)[1]


@pytest.mark.parametrize(
    "arguments", [("status", 7), ("wait", 7), ("cancel", 7), ("logs", 7), ("report", 7, "/nowhere/at/all")]
)
def test_an_unknown_task_ends_with_2(dltask: Dltask, arguments: tuple[Any, ...]) -> None:
    """One clear line."""
    assert dltask(*arguments) == (2, "", "dltask: there is no task 7; see `dltask status`\n")


def test_pictures_are_written_under_safe_names(dltask: Dltask, db: Db, tmp_path: Path) -> None:
    """report writes what the result names as NAME.png and prints the paths; a missing picture is said."""
    file_id = GridFSBucket(db, "reports").upload_from_stream("curves.png", b"picture")
    key = ObjectId()
    reports = {"curves": str(file_id), "../../x": str(file_id), "report.html": str(file_id)}
    task = {"_id": key, "admitted_id": key, "task_id": 1, "status": "SUCCEEDED", "result": {"reports": reports}}
    db.DL_TASK.insert_one(task)
    folder = tmp_path / "pictures"
    code, out, _ = dltask("report", 1, folder)
    assert (code, out.splitlines()) == (0, [f"{folder}/curves.png", f"{folder}/_.._x.png", f"{folder}/report.html"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "curves.png": b"picture",
        "_.._x.png": b"picture",
        "report.html": b"picture",
    }
    assert json.loads(dltask("report", 1, folder, "--json")[1]) == out.splitlines()
    db.DL_TASK.update_one({}, {"$set": {"result.reports.curves": str(ObjectId())}})
    code, _, err = dltask("report", 1, folder)
    assert code == 2
    assert "picture 'curves' is gone" in err


def test_data_sets(dltask: Dltask, tmp_path: Path) -> None:
    """import, list and export, and exit 2 where nothing can be imported."""
    (tmp_path / "in" / "images").mkdir(parents=True)
    assert cv2.imwrite(str(tmp_path / "in" / "images" / "x.png"), np.zeros((9, 9, 3), np.uint8))
    annotations = tmp_path / "in" / "annotations.json"
    document = {
        "images": [{"id": 1, "file_name": "x.png"}, {"id": 2, "file_name": "gone.png"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2]}],
        "categories": [{"id": 1, "name": "a"}],
    }
    annotations.write_text(json.dumps(document))
    bring_in = ("dataset", "import", "--format", "coco", tmp_path / "in", "--name", "toy", "--split", "val")
    code, out, err = dltask(*bring_in)
    assert (code, out) == (0, "toy: imported 1 images, 1 labels; left out: 1 images, 0 labels (val 1)\n")
    assert "gone.png" in err
    assert dltask(*bring_in)[0] == 0
    assert "val 1" in dltask("dataset", "list")[1]
    assert json.loads(dltask("dataset", "list", "--json")[1]) == [{"dataset": "toy", "images": 1, "splits": {"val": 1}}]
    code, _, err = dltask("dataset", "export", "--format", "coco", "toy", annotations)
    assert (code, err.startswith("dltask: ")) == (2, True)
    code, out, _ = dltask("dataset", "export", "--format", "coco", "toy", tmp_path / "out")
    assert (code, out) == (0, "toy: exported 1 images, 1 labels (val 1)\n")
    assert (tmp_path / "out" / "images" / "x.png").exists()
    document["images"] = [{"id": 2, "file_name": "gone.png"}]
    annotations.write_text(json.dumps(document))
    code, out, _ = dltask("dataset", "import", "--format", "coco", tmp_path / "in", "--name", "none", "--json")
    assert (code, json.loads(out)["failed_images"]) == (2, 1)


def test_mongo_prints_its_uri_and_ends_at_sigterm(tmp_path: Path) -> None:
    """Exactly one line, once writes are accepted; SIGTERM ends it with 0, and its server with it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        command = [*COMMAND, "mongo", "--data-dir", str(tmp_path / "data")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            uri = process.stdout.readline().strip()
            with MongoClient(uri) as client:
                client.test.things.insert_one({})
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
            assert (process.returncode, out, err) == (0, "", "")
        with MongoClient(uri, serverSelectionTimeoutMS=200, connectTimeoutMS=200) as client:
            assert not client.nodes


def test_a_taken_port_ends_with_2(dltask: Dltask, mongo_uri: str) -> None:
    """One line that names the port."""
    port = mongo_uri.split(":")[2].split("/")[0]
    code, out, err = dltask("mongo", "--port", port)
    assert (code, out) == (2, "")
    assert err == f"dltask: port {port} on 127.0.0.1 is taken: choose another one, or 0 for a free one\n"
