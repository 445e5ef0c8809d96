"""The janitor's rule: a file that a task left goes a day after it was first found unnamed; all others stay."""

import os
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest
from bson import Int64, ObjectId
from gridfs import GridFSBucket
from pymongo.database import Database
from pymongo.errors import AutoReconnect

import handlers.store.files
import service.janitor
from handlers.images import ImageCache
from handlers.store import Store
from service.janitor import ORPHAN_SECONDS, keep_clean, remove_chunks, remove_orphans

Db = Database[dict[str, Any]]
OLD = datetime(2020, 1, 1, tzinfo=UTC)


def put(db: Db, bucket: str, *, task_id: Any = 1, owner: str = "task_id") -> ObjectId:
    """A file with its metadata."""
    metadata = {} if task_id is None else {"metadata": {owner: task_id}}
    file_id: ObjectId = GridFSBucket(db, bucket).upload_from_stream("x", b"x" * 10, **metadata)
    return file_id


async def remove_after_a_day(store: Store, db: Db) -> int:
    """What the janitor's first look a day after the last one removes."""
    assert await remove_orphans(store, older_than=ORPHAN_SECONDS) == 0
    for bucket in ("models", "messages", "reports", "images"):
        for collection, field in (("files", "metadata.orphan_since"), ("chunks", "orphan_since")):
            db[f"{bucket}.{collection}"].update_many({field: {"$exists": True}}, {"$set": {field: OLD}})
    return await remove_orphans(store, older_than=ORPHAN_SECONDS)


def kept(db: Db, bucket: str) -> set[ObjectId]:
    """The files that are there, each with its chunk."""
    files = {file["_id"] for file in db[f"{bucket}.files"].find()}
    assert files == {chunk["files_id"] for chunk in db[f"{bucket}.chunks"].find()}
    return files


async def test_what_nothing_names_goes_and_all_else_stays(store: Store, db: Db) -> None:
    """Named by the task (snapshot, message, report) or by a model: stays. Of nobody we know: stays."""
    snapshot, model, lost_snapshot = (put(db, "models") for _ in range(3))
    message, lost_message = put(db, "messages"), put(db, "messages")
    report, lost_report = put(db, "reports"), put(db, "reports")
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
    assert await remove_after_a_day(store, db) == 4
    young = put(db, "models")
    assert await remove_orphans(store, older_than=ORPHAN_SECONDS) == 0
    assert kept(db, "models") == {snapshot, model, young, foreign[0]}
    assert kept(db, "messages") == {message, foreign[1]}
    assert kept(db, "reports") == {report, foreign[2]}
    assert kept(db, "images") == {image, foreign[3]}
    assert not {lost_snapshot, lost_message, lost_report, big} & kept(db, "models")


async def test_the_weights_of_a_model_stay(store: Store, db: Db) -> None:
    """Those that a version names, also when its task is gone; those that none names go. The first release, which does
    not know by what they are named, takes them for somebody else's: their metadata have no `task_id`."""
    weights = put(db, "models", owner="weights_of")
    put(db, "models", owner="weights_of")
    model = put(db, "models")
    version = {"model_name": "m", "version": 1, "task_id": 1, "file_id": model, "weights_file_id": weights}
    db.DL_MODEL.insert_one(version)
    db.DL_MODEL.insert_one({"model_name": "m", "version": 2, "task_id": 2, "file_id": model, "weights_file_id": None})
    assert await remove_after_a_day(store, db) == 1
    assert kept(db, "models") == {weights, model}
    db.DL_MODEL.delete_many({})
    assert await remove_after_a_day(store, db) == 2


async def test_records_of_other_forms_keep_it_from_nothing(store: Store, db: Db) -> None:
    """Files that are not ours, and tasks whose fields somebody changed into something else, are passed over."""
    others: list[tuple[Any, Any]] = [({"a": 1}, {"task_id": 1}), (1, [{"task_id": 1}]), (2, {"task_id": {}})]
    others += [(ObjectId(), [{"task_id": 1}]), (ObjectId(), {"task_id": {}})]
    for key, metadata in others:
        db["models.files"].insert_one({"_id": key, "metadata": metadata, "length": 0})
    values: list[Any] = ["x", [1], 5, {"reports": ["x"]}, {"reports": "x", "file_id": {}}]
    for number, value in enumerate(values):
        put(db, "models", task_id=number)
        db.DL_TASK.insert_one({"task_id": number, "result": value, "snapshot": value, "json_mongodb_id": value})
    assert await remove_after_a_day(store, db) == len(values)
    assert db["models.files"].count_documents({}) == len(others)


async def test_a_message_that_another_task_runs_on_stays(store: Store, db: Db) -> None:
    """Built by task 1, which is deleted; task 2 was given it."""
    message = put(db, "messages")
    db.DL_TASK.insert_one({"task_id": 2, "json_mongodb_id": str(message)})
    assert await remove_after_a_day(store, db) == 0
    db.DL_TASK.delete_many({})
    assert await remove_after_a_day(store, db) == 1


async def test_a_file_that_is_named_again_begins_a_new_day(store: Store, db: Db) -> None:
    """Found unnamed once, as a file whose document is just being written, it is not removed for that later."""
    message = put(db, "messages")
    assert await remove_orphans(store, older_than=ORPHAN_SECONDS) == 0
    db["messages.files"].update_one({"_id": message}, {"$set": {"metadata.orphan_since": OLD}})
    db.DL_TASK.insert_one({"task_id": 2, "json_mongodb_id": str(message)})
    assert await remove_orphans(store, older_than=ORPHAN_SECONDS) == 0
    db.DL_TASK.delete_many({})
    assert await remove_after_a_day(store, db) == 1


async def test_no_date_but_the_servers_counts(store: Store, db: Db) -> None:
    """A file, or a first chunk, that its writer's clock dates years back is as new as the server sees it."""
    long_ago = ObjectId.from_datetime(OLD)
    GridFSBucket(db, "models").upload_from_stream_with_id(long_ago, "x", b"x", metadata={"task_id": 1})
    db["models.files"].update_one({"_id": long_ago}, {"$set": {"uploadDate": OLD}})
    upload = ObjectId.from_datetime(OLD.replace(month=2))
    db["models.chunks"].insert_one({"_id": ObjectId.from_datetime(OLD), "files_id": upload, "n": 0})
    assert await remove_orphans(store, older_than=ORPHAN_SECONDS) == 0
    noted = db["models.files"].find_one({"_id": long_ago})
    server = db.command("hello")["localTime"].replace(tzinfo=UTC)
    assert noted is not None
    assert abs((server - noted["metadata"]["orphan_since"]).total_seconds()) < 60
    assert await remove_after_a_day(store, db) == 2


async def test_chunks_without_a_file_go_a_day_later(store: Store, db: Db, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload that was cut off leaves chunks; one that is under way has them too, and is left alone.

    However many there are: they are looked for page by page. What has another kind of id is nobody's that we know.
    """
    monkeypatch.setattr(handlers.store.files, "_PAGE", 2)
    whole, cut_off, another, under_way = put(db, "images"), ObjectId(), ObjectId(), ObjectId()
    for bucket in ("images", "models"):
        chunks = db[f"{bucket}.chunks"]
        chunks.insert_many([{"files_id": cut_off, "n": 0}, {"files_id": cut_off, "n": 1}])
        chunks.insert_many([{"_id": f"{bucket} 1", "files_id": another, "n": 0}, {"files_id": "foreign", "n": 0}])
    assert await remove_after_a_day(store, db) == 2
    assert db["models.chunks"].distinct("files_id") == ["foreign"]
    # The images are the platform's, and the janitor has no right to remove there: an import does it.
    assert {chunk["files_id"] for chunk in db["images.chunks"].find()} == {whole, cut_off, another, "foreign"}
    assert await remove_chunks(store.files.images, older_than=ORPHAN_SECONDS) == 0
    db["images.chunks"].update_many({"orphan_since": {"$exists": True}}, {"$set": {"orphan_since": OLD}})
    assert await remove_chunks(store.files.images, older_than=ORPHAN_SECONDS) == 2
    db["images.chunks"].insert_one({"files_id": under_way, "n": 0})
    assert await remove_chunks(store.files.images, older_than=ORPHAN_SECONDS) == 0
    assert {chunk["files_id"] for chunk in db["images.chunks"].find()} == {whole, under_way, "foreign"}


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
            patch.setattr(service.janitor, "ORPHAN_SECONDS", 0.0)
            await keep_clean(store, cache)
    assert rounds == [2]
    assert orphan not in kept(db, "models")
    assert not image.exists()
