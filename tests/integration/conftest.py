"""What the tests against a real server share: a store, some images, and services as real processes."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from bson import ObjectId
from pymongo.database import Database

from handlers.store import Store, connect_store


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
