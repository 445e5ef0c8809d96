"""What the tests against a real server share: a store, some images, and services as real processes."""

import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from pymongo.database import Database

from handlers.store import Store, connect_store, replica_set
from service.embedded import find_mongod
from tests.helpers import wait_for


@pytest.fixture(scope="module")
def start_mongod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Starts servers of the module's own, each a one-node replica set with more options; returns their URIs.

    For what must not happen to the server that all tests share: failing on command, forgetting, being stopped.
    """
    with contextlib.ExitStack() as running:

        def start(*options: str) -> str:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port: int = probe.getsockname()[1]
            folder = tmp_path_factory.mktemp("mongod")
            command = [str(find_mongod()), "--dbpath", str(folder), "--port", str(port), "--bind_ip", "127.0.0.1"]
            command += ["--replSet", replica_set.SET_NAME, "--nounixsocket", "--quiet", "--noscripting"]
            command += ["--wiredTigerCacheSizeGB", "0.25", "--setParameter", "diagnosticDataCollectionEnabled=false"]
            log = running.enter_context(Path(folder / "mongod.log").open("wb"))
            process = running.enter_context(subprocess.Popen([*command, *options], stdout=log, stderr=log))
            running.callback(process.kill)
            wait_for(lambda: replica_set.become_primary(port, process.pid), 60)
            return replica_set.uri_of(port)

        yield start


@pytest.fixture
async def store(mongo_uri: str, database_name: str) -> AsyncIterator[Store]:
    """The service's store on the test's database, with its indexes."""
    async with connect_store(mongo_uri, database_name) as store:
        await store.indexes.create()
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
