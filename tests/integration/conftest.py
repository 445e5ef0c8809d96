"""What the tests against a real server share: a store, some images, and services as real processes."""

import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from pymongo import MongoClient
from pymongo.database import Database

from handlers.store import Store, connect_store
from tests.helpers import STANDIN, Service, wait_for


@pytest.fixture
def db(mongo_uri: str, database_name: str) -> Iterator[Database[dict[str, Any]]]:
    """The test's database as a client sees it."""
    with MongoClient(mongo_uri, tz_aware=True) as client:
        yield client[database_name]


@pytest.fixture
async def store(mongo_uri: str, database_name: str) -> AsyncIterator[Store]:
    """The service's store on the test's database, with its indexes."""
    async with connect_store(mongo_uri, database_name) as store:
        await store.database.create_indexes()
        yield store


@pytest.fixture
def image_ids(db: Database[dict[str, Any]]) -> list[ObjectId]:
    """Three images of the data set `toy`, with a label each."""
    from gridfs import GridFSBucket

    ids = []
    for number in range(3):
        file_id = GridFSBucket(db, "images").upload_from_stream(f"{number}.jpg", b"not really a picture")
        image = {"file_name": f"{number}.jpg", "width": 32, "height": 32, "file_id": file_id, "dataset": "toy"}
        image_id = db.IMG_INFO.insert_one({**image, "split": "train"}).inserted_id
        db.IMG_LAB_INFO.insert_one({"img_id": image_id, "class_name": "a", "bbox": [1, 1, 8, 8]})
        ids.append(image_id)
    return ids


@pytest.fixture
def serve(dltask_env: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Starts services with the stand-in child; settings are given as `cpu_devices=2`. They end with the test."""
    started: list[Service] = []
    with contextlib.ExitStack() as files:

        def start(**settings: Any) -> Service:
            env = dltask_env | {
                "DLTASK_CHILD_COMMAND": STANDIN,
                "STANDIN_LOG": str(tmp_path / "children.jsonl"),
                "DLTASK_LOG_FORMAT": "json",
                "DLTASK_SWEEP_SECONDS": "1",
                "DLTASK_GRACE_SECONDS": "5",
            }
            env |= {f"DLTASK_{name.upper()}": str(value) for name, value in settings.items()}
            log = tmp_path / f"service-{len(started)}.log"
            out = files.enter_context(log.open("wb"))
            process = subprocess.Popen([sys.executable, "-m", "service.cli", "serve"], env=env, stderr=out)
            service = Service(process, log)
            started.append(service)
            wait_for(lambda: "service ready" in log.read_text() or process.poll() is not None)
            return service

        yield start
        for service in started:
            if service.process.poll() is None:
                service.stop()
