"""The janitor's rule: a file that a task left goes once it is old and nothing names it; all others stay."""

import os
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest
from bson import Int64, ObjectId
from gridfs import GridFSBucket
from pymongo.database import Database
from pymongo.errors import AutoReconnect

import service.janitor
from handlers.images import ImageCache
from handlers.store import Store
from service.janitor import ORPHAN_SECONDS, keep_clean, remove_chunks, remove_orphans

Db = Database[dict[str, Any]]
OLD = datetime(2020, 1, 1, tzinfo=UTC)


def put(db: Db, bucket: str, *, task_id: Any = 1, old: bool = True) -> ObjectId:
    """A file with its metadata; old by the date that the server knows."""
    metadata = {} if task_id is None else {"metadata": {"task_id": task_id}}
    file_id: ObjectId = GridFSBucket(db, bucket).upload_from_stream("x", b"x" * 10, **metadata)
    if old:
        db[f"{bucket}.files"].update_one({"_id": file_id}, {"$set": {"uploadDate": OLD}})
    return file_id


def kept(db: Db, bucket: str) -> set[ObjectId]:
    """The files that are there, each with its chunk."""
    files = {file["_id"] for file in db[f"{bucket}.files"].find()}
    assert files == {chunk["files_id"] for chunk in db[f"{bucket}.chunks"].find()}
    return files


async def test_what_nothing_names_goes_and_all_else_stays(store: Store, db: Db) -> None:
    """Named by the task (snapshot, message, report) or by a model: stays. Young, or of nobody we know: stays."""
    snapshot, model, lost_snapshot = (put(db, "models") for _ in range(3))
    message, lost_message = put(db, "messages"), put(db, "messages")
    report, lost_report = put(db, "reports"), put(db, "reports")
    young = put(db, "models", old=False)
    foreign = [put(db, bucket, task_id=None) for bucket in ("models", "messages", "reports", "images")]
    image = put(db, "images")
    big = put(db, "models", task_id=Int64(2**63 - 1))
    db.DL_TASK.insert_one(
        {
            "task_id": 1,
            "snapshot": {"file_id": snapshot},
            "json_mongodb_id": str(message),
            "result": {"reports": {"curve.png": str(report)}},
        }
    )
    db.DL_MODEL.insert_one({"model_name": "m", "version": 1, "task_id": 1, "file_id": model})
    assert await remove_orphans(store, older_than=ORPHAN_SECONDS) == 4
    assert kept(db, "models") == {snapshot, model, young, foreign[0]}
    assert kept(db, "messages") == {message, foreign[1]}
    assert kept(db, "reports") == {report, foreign[2]}
    assert kept(db, "images") == {image, foreign[3]}
    assert not {lost_snapshot, lost_message, lost_report, big} & kept(db, "models")
    assert await remove_orphans(store, older_than=ORPHAN_SECONDS) == 0


async def test_a_message_that_another_task_runs_on_stays(store: Store, db: Db) -> None:
    """Built by task 1, which is deleted; task 2 was given it."""
    message = put(db, "messages")
    db.DL_TASK.insert_one({"task_id": 2, "json_mongodb_id": str(message)})
    assert await remove_orphans(store, older_than=ORPHAN_SECONDS) == 0
    db.DL_TASK.delete_many({})
    assert await remove_orphans(store, older_than=ORPHAN_SECONDS) == 1


async def test_chunks_without_a_file_go_once_they_are_old(store: Store, db: Db) -> None:
    """An upload that was cut off leaves chunks; one that is under way has them too, and is left alone."""
    long_ago = ObjectId.from_datetime(OLD)
    cut_off, under_way, unknown = ObjectId(), ObjectId(), ObjectId()
    whole = put(db, "images", old=False)
    for bucket in ("images", "models"):
        chunks = db[f"{bucket}.chunks"]
        chunks.insert_many([{"_id": long_ago, "files_id": cut_off, "n": 0}, {"files_id": cut_off, "n": 1}])
        chunks.insert_many([{"files_id": under_way, "n": 0}, {"_id": f"{bucket} 1", "files_id": unknown, "n": 0}])
        chunks.insert_one({"_id": 5, "files_id": "any id", "n": 0})
    assert await remove_orphans(store, older_than=ORPHAN_SECONDS) == 1
    # The images are the platform's, and the janitor has no right to remove there.
    assert db["images.chunks"].count_documents({"files_id": cut_off}) == 2
    assert await remove_chunks(store.files.images, older_than=ORPHAN_SECONDS) == 1
    for bucket in ("images", "models"):
        left = {chunk["files_id"] for chunk in db[f"{bucket}.chunks"].find()}
        assert left - {whole} == {under_way, unknown, "any id"}
    assert db["images.files"].count_documents({"_id": whole}) == 1


async def test_looking_for_chunks_reads_none(store: Store, db: Db) -> None:
    """The bytes of all images are in the chunks: the look goes through the index alone."""
    for _ in range(20):
        put(db, "images")
    db.command("profile", 2)
    assert await store.files.images.orphan_chunks(ORPHAN_SECONDS) == []
    db.command("profile", 0)
    looks = list(db["system.profile"].find({"ns": f"{db.name}.images.chunks", "command.aggregate": "images.chunks"}))
    assert len(looks) == 1
    # Those of images.files, which are small, are counted here too.
    assert looks[0]["planSummary"].startswith("IXSCAN")
    assert looks[0]["docsExamined"] <= 20


async def test_it_goes_on_after_the_database_was_away(
    store: Store, db: Db, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every hour again; a failure costs one round. Each round also forgets images."""
    orphan = put(db, "models")
    cache = ImageCache(tmp_path, max_bytes=0)
    image = tmp_path / "00" / "image"
    image.parent.mkdir()
    image.write_bytes(os.urandom(10))
    rounds = [0]
    remove = service.janitor.remove_orphans

    async def away_first(store: Store, *, older_than: float) -> int:
        rounds[0] += 1
        if rounds[0] == 1:
            raise AutoReconnect("away")
        return await remove(store, older_than=older_than)

    with anyio.CancelScope() as scope:

        async def next_hour(seconds: float) -> None:
            if rounds[0] == 2:
                scope.cancel()
            await anyio.lowlevel.checkpoint()

        with monkeypatch.context() as patch:
            patch.setattr(service.janitor, "remove_orphans", away_first)
            patch.setattr(service.janitor.anyio, "sleep", next_hour)
            await keep_clean(store, cache)
    assert rounds == [2]
    assert orphan not in kept(db, "models")
    assert not image.exists()
