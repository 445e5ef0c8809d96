"""`name:version` in a training: it begins with that version's weights and makes the next one, or says why it cannot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from gridfs import GridFSBucket
from pymongo.database import Database

from tests.helpers import Service, ended, running, train_request, wait_for

Db = Database[dict[str, Any]]
Serve = Callable[..., Service]


def test_a_training_begins_with_the_weights_of_a_version(
    db: Db, serve: Serve, image_ids: list[ObjectId], tmp_path: Path
) -> None:
    """Of the one that is named, not of the newest; the next version of the name is made, and names its parent. A plain
    name begins as ever."""
    serve()
    for number, model_name in ((1, "ok"), (2, "ok"), (3, "ok:1"), (4, "ok"), (5, "ok:3")):
        db.DL_TASK.insert_one(train_request(number, model_name=model_name))
        assert ended(db, number)["status"] == "SUCCEEDED"
    models = list(db.DL_MODEL.find().sort("version"))
    assert [(model["model_name"], model["version"]) for model in models] == [("ok", n) for n in range(1, 6)]
    assert [model["parent_version"] for model in models] == [None, None, 1, None, 3]
    results = [ended(db, number)["result"] for number in range(1, 6)]
    assert [result.get("parent_version") for result in results] == [None, None, 1, None, 3]
    assert [result["initial_weights"] for result in results] == [
        "stand-in",
        "stand-in",
        "stand-in, from no real weights of task 1",
        "stand-in",
        "stand-in, from no real weights of task 3",
    ]
    jobs = [json.loads(line)["job"] for line in (tmp_path / "children.jsonl").read_text().splitlines()]
    assert [job["start_from"] is not None for job in jobs] == [False, False, True, False, True]
    named = {model[name] for model in models for name in ("file_id", "weights_file_id")}
    assert len(named) == 10
    assert named <= set(db["models.files"].distinct("_id"))


def test_patience_and_mirror_reach_the_child(db: Db, serve: Serve, image_ids: list[ObjectId], tmp_path: Path) -> None:
    """As a client of any language writes the number; one that has none says nothing of it."""
    serve()
    for number, more in ((1, {"patience": 40.0, "mirror": False}), (2, {})):
        db.DL_TASK.insert_one(train_request(number, **more))
        assert ended(db, number)["status"] == "SUCCEEDED"
    jobs = [json.loads(line)["job"] for line in (tmp_path / "children.jsonl").read_text().splitlines()]
    assert [(job["patience"], job["mirror"]) for job in jobs] == [(40, False), (None, True)]


@pytest.mark.parametrize(
    ("model_name", "change", "field", "words"),
    [
        ("ok:2", {}, "model_name", "registered"),
        ("other:1", {}, "model_name", "registered"),
        ("ok:1", {"net_model": "OtherNet"}, "net_model", "'OtherNet', the network of 'ok:1'"),
        ("ok:1", {"weights_file_id": None}, "model_name", "without stored weights"),
    ],
)
def test_what_cannot_be_begun_with_is_rejected(
    db: Db, serve: Serve, image_ids: list[ObjectId], model_name: str, change: dict[str, Any], field: str, words: str
) -> None:
    """MODEL_INVALID, with what is wrong; nothing runs."""
    serve()
    db.DL_TASK.insert_one(train_request(1))
    assert ended(db, 1)["status"] == "SUCCEEDED"
    if change:
        db.DL_MODEL.update_one({}, {"$set": change})
    db.DL_TASK.insert_one(train_request(2, model_name=model_name))
    document = ended(db, 2)
    assert (document["status"], document["error_code"]) == ("REJECTED", 8)
    assert document["error"]["field"] == f"param_request.{field}"
    assert words in document["error"]["message"]


def test_weights_that_are_damaged_or_gone_fail_the_task(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """FAILED at once with kind `model`: trying again would end the same way, and another start was not asked for."""
    serve()
    db.DL_TASK.insert_one(train_request(1))
    assert ended(db, 1)["status"] == "SUCCEEDED"
    model = db.DL_MODEL.find_one({})
    assert model is not None
    chunk = {"files_id": model["weights_file_id"]}
    other = {"$set": {"weights_sha256": "0" * 64}}
    damages: list[tuple[str, Callable[[], object]]] = [
        ("damaged: sha256", lambda: db.DL_MODEL.update_one({}, other)),
        ("gone", lambda: db["models.chunks"].update_one(chunk, {"$set": {"data": b"other bytes"}})),
        ("gone", lambda: GridFSBucket(db, "models").delete(model["weights_file_id"])),
    ]
    for number, (word, damage) in enumerate(damages, 2):
        damage()
        db.DL_TASK.insert_one(train_request(number, model_name="ok:1"))
        document = ended(db, number)
        assert (document["status"], document["attempt"], document["error"]["kind"]) == ("FAILED", 1, "model")
        assert document["error_code"] == 8
        assert f"the weights file of model 'ok:1' is {word}" in document["error"]["message"]


def test_a_resumed_training_needs_no_version_any_more(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """The snapshot wins over the weights it once began with, also when those are gone."""
    first = serve(grace_seconds=20)
    db.DL_TASK.insert_one(train_request(1))
    assert ended(db, 1)["status"] == "SUCCEEDED"
    db.DL_TASK.insert_one(train_request(2, model_name="ok:1", iterations=300))
    running(db, 2)
    first.stop()
    half = wait_for(lambda: db.DL_TASK.find_one({"task_id": 2, "status": "PENDING"}))
    db.DL_MODEL.delete_many({})
    serve()
    document = ended(db, 2)
    assert document["status"] == "SUCCEEDED"
    result = document["result"]
    assert result["resumed_from_iteration"] == half["snapshot"]["iteration"]
    assert (result["version"], result["parent_version"]) == (1, 1)
