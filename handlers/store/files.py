"""GridFS: images, request messages, snapshots and models, reports."""

import hashlib
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
from bson import MinKey, ObjectId
from gridfs import NoFile
from gridfs.errors import CorruptGridFile

from handlers.store.database import Database

#: What PyMongo makes of a record in `files` or `chunks` whose fields are missing or of other types.
_WRONG_RECORD = (TypeError, ValueError, KeyError, AttributeError, ArithmeticError)

#: Bytes a read or write; one GridFS chunk is 255 kB.
_BLOCK = 1 << 20


class FileMissing(Exception):
    """GridFS has no such file, or not all of it."""


class Bucket:
    """One GridFS bucket. A file never changes under its id."""

    def __init__(self, database: Database, name: str) -> None:
        self._db = database
        self._name = name
        self._bucket = database.bucket(name)
        self._files = database.collection(f"{name}.files")
        self._chunks = database.collection(f"{name}.chunks")

    async def put(self, path: Path, name: str, metadata: Mapping[str, Any] | None = None) -> ObjectId:
        """Store the file at `path`; returns its id. What a failed upload began is removed."""
        stream = self._bucket.open_upload_stream(name, metadata=dict(metadata or {}))
        try:
            async with await anyio.open_file(path, "rb") as file:
                while block := await file.read(_BLOCK):
                    await self._db.call(stream.write, block)
            await self._db.call(stream.close)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await stream.abort()
            raise
        file_id: ObjectId = stream._id
        return file_id

    async def fetch(self, file_id: Any, path: Path) -> str:
        """Write the file to `path`, whole or not at all; returns its sha256. Raises FileMissing."""
        digest = hashlib.sha256()
        part = path.with_name(f"{path.name}.part")
        try:
            stream = await self._db.call(self._bucket.open_download_stream, file_id)
            async with await anyio.open_file(part, "wb") as file:
                while block := await self._db.call(stream.read, _BLOCK):
                    digest.update(block)
                    await file.write(block)
        except (NoFile, CorruptGridFile, *_WRONG_RECORD) as error:
            part.unlink(missing_ok=True)
            raise FileMissing(f"{self._name} {file_id}: {error!s:.200}") from error
        part.replace(path)
        return digest.hexdigest()

    async def exists(self, file_id: Any) -> bool:
        """Whether there is a file with this id."""
        return await self._db.call(self._files.find_one, {"_id": file_id}, {"_id": True}) is not None

    async def delete(self, file_id: Any) -> None:
        """Remove the file; nothing happens if there is none."""
        try:
            await self._db.call(self._bucket.delete, file_id)
        except NoFile:
            pass

    async def ours_older_than(self, seconds: float) -> AsyncGenerator[dict[Any, Any], None]:
        """Files that a task left more than `seconds` ago by the server's clock: batches of {file id: its task's id}.

        Files without a `task_id` in their metadata are somebody else's, and not listed.
        """
        cursor = self._files.find(
            {"metadata.task_id": {"$exists": True}, "$expr": _before("$uploadDate", seconds)},
            {"metadata.task_id": True},
        )
        async with aclosing(self._db.batches(cursor, 500)) as batches:
            async for batch in batches:
                yield {document["_id"]: document["metadata"]["task_id"] for document in batch}

    async def orphan_chunks(self, seconds: float) -> list[Any]:
        """Up to 100 file ids that have chunks more than `seconds` old and no file: what a crash in an upload leaves.

        Looks for them in the index `{files_id, n}` alone: the documents hold all the bytes of the bucket.
        """
        cursor = await self._db.call(
            self._chunks.aggregate,
            [
                {"$match": {"files_id": {"$gte": MinKey()}, "n": 0}},
                {"$project": {"_id": False, "files_id": True}},
                _joined(f"{self._name}.files", "files_id", "_id", "file", [{"$project": {"_id": 1}}]),
                {"$match": {"file": []}},
                _joined(
                    f"{self._name}.chunks",
                    "files_id",
                    "files_id",
                    "old",
                    # Not every driver's chunk ids tell their age; of one that does not, it is never known.
                    [
                        {"$match": {"n": 0, "$expr": {"$eq": [{"$type": "$_id"}, "objectId"]}}},
                        {"$match": {"$expr": _before({"$toDate": "$_id"}, seconds)}},
                        {"$project": {"_id": 1}},
                    ],
                ),
                {"$match": {"old": {"$ne": []}}},
                {"$limit": 100},
            ],
        )
        return [row["files_id"] for row in await self._db.call(cursor.to_list)]

    async def delete_chunks(self, file_id: Any) -> None:
        """Remove the chunks of a file that is none."""
        await self._db.call(self._chunks.delete_many, {"files_id": file_id})


def _before(date: Any, seconds: float) -> dict[str, Any]:
    return {"$lt": [date, {"$subtract": ["$$NOW", int(seconds * 1000)]}]}


def _joined(table: str, here: str, there: str, name: str, pipeline: list[dict[str, Any]]) -> dict[str, Any]:
    return {"$lookup": {"from": table, "localField": here, "foreignField": there, "as": name, "pipeline": pipeline}}


class Files:
    """The four buckets."""

    def __init__(self, database: Database) -> None:
        self.images = Bucket(database, "images")
        self.messages = Bucket(database, "messages")
        self.models = Bucket(database, "models")
        self.reports = Bucket(database, "reports")
