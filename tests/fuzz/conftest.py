"""How long the fuzz runs are, and the line that each prints at its end."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from gridfs import GridFSBucket
from pymongo import MongoClient
from pymongo.database import Database

_LINES = pytest.StashKey[list[str]]()


@dataclass
class Fuzz:
    """The length of a run, and what it has to say."""

    #: Documents; `make fuzz DOCUMENTS=20000` sets more than the checks take.
    documents: int
    seed: int
    _lines: list[str] = field(default_factory=list)

    def say(self, **what: Any) -> None:
        """One JSON line for the end of the run."""
        self._lines.append(json.dumps(what))


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Fuzz:
    lines = request.config.stash.setdefault(_LINES, [])
    documents, seed = os.environ.get("DLTASK_FUZZ_DOCUMENTS", "1000"), os.environ.get("DLTASK_FUZZ_SEED", "1")
    return Fuzz(int(documents), int(seed), lines)


def pytest_unconfigure(config: pytest.Config) -> None:
    for line in config.stash.get(_LINES, []):
        print(line)
    sys.stdout.flush()


@pytest.fixture(autouse=True)
def room(mongo_uri: str) -> Iterator[None]:
    """More memory for the server: the tests' own is small, and gives way under documents of 16 MB."""
    with MongoClient(mongo_uri) as client:
        client.admin.command("setParameter", 1, wiredTigerEngineRuntimeConfig="cache_size=1500M")
        yield
        client.admin.command("setParameter", 1, wiredTigerEngineRuntimeConfig="cache_size=256M")


@dataclass
class Platform:
    """The tables as a platform fills them: three images of the data set `toy`, a request message, a model `ok`."""

    images: list[Any]
    message: Any


@pytest.fixture
def platform(db: Database[dict[str, Any]]) -> Platform:
    ids = []
    for number in range(3):
        file_id = GridFSBucket(db, "images").upload_from_stream(f"{number}.jpg", b"not really a picture")
        image = {"file_name": f"{number}.jpg", "width": 32, "height": 32, "file_id": file_id, "dataset": "toy"}
        image_id = db.IMG_INFO.insert_one({**image, "split": "train"}).inserted_id
        db.IMG_LAB_INFO.insert_one({"img_id": image_id, "class_name": "a", "bbox": [1, 1, 8, 8]})
        ids.append(image_id)
    message = {"image_info": [{"id": 1, "mongodb_id": str(ids[0])}]}
    message_id = GridFSBucket(db, "messages").upload_from_stream("m.json", json.dumps(message).encode())
    model = b"no real model"
    file_id = GridFSBucket(db, "models").upload_from_stream("ok.onnx", model)
    digest = {"file_id": file_id, "sha256": hashlib.sha256(model).hexdigest()}
    db.DL_MODEL.insert_one(
        {"model_name": "ok", "version": 1, "task_id": 0, "class_names": ["a"], "input_size": 320, **digest}
    )
    return Platform(ids, message_id)
