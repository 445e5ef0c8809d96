"""How long the fuzz runs are, and the line that each prints at its end."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from gridfs import GridFSBucket
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
    documents, seed = os.environ.get("DLTASK_FUZZ_DOCUMENTS", "600"), os.environ.get("DLTASK_FUZZ_SEED", "1")
    return Fuzz(int(documents), int(seed), lines)


def pytest_unconfigure(config: pytest.Config) -> None:
    # Last what the run is named after.
    for line in sorted(config.stash.get(_LINES, []), key=lambda line: '"fuzz": "documents"' in line):
        print(line)
    sys.stdout.flush()


@dataclass
class Platform:
    """The tables as a platform fills them: three images of the data set `toy`, a request message, a model `ok`."""

    images: list[Any]
    message: Any


@pytest.fixture
def dltask(dltask_env: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command of `dltask`; its task may have failed, and the command must not break."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "service.cli", *arguments]
        done = subprocess.run(command, env=dltask_env, capture_output=True, text=True, timeout=120)
        assert done.returncode in (0, 1), (arguments, done.stderr[-3000:])
        assert "Traceback" not in done.stderr, (arguments, done.stderr[-3000:])
        return done

    return run


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
