"""GridFS: images, request messages, snapshots and models, reports.

Neither `uploadDate` nor the time in an ObjectId says how old a file is: both are made by the clock of whoever wrote it,
and a worker's may be days off. So that a file is an orphan is noted when it is first seen, with the server's time.
"""

import hashlib
import re
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
from bson import ObjectId
from gridfs import NoFile
from gridfs.errors import CorruptGridFile
from pymongo.asynchronous.collection import AsyncCollection

from handlers.store.database import Database, Document

#: Bytes a read or write; one GridFS chunk is 255 kB.
_BLOCK = 1 << 20


#: Orphaned uploads that one look finds, at most.
_MAX_ORPHANS = 1000

#: Files that one look for chunks without a file takes in.
_PAGE = 10_000

#: Where a file's metadata say which task wrote it. Weights have a word of their own: the janitor of release 0.1.0 does
#: not know by what they are named, and would remove them.
_OWNER = ("weights_of", "task_id")

#: What PyMongo's GridFS raises for documents that are none of GridFS's: chunks without data, a length in words.
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError, ArithmeticError, AssertionError)


class FileMissing(Exception):
    """GridFS has no such file, not all of it, or other bytes than were stored."""


class Bucket:
    """One GridFS bucket. A file never changes under its id."""

    def __init__(self, database: Database, name: str) -> None:
        self._db = database
        self._name = name
        self._bucket = database.bucket(name)
        self._files = database.collection(f"{name}.files")
        self._chunks = database.collection(f"{name}.chunks")

    async def put(self, path: Path, name: str, metadata: Mapping[str, Any] | None = None) -> ObjectId:
        """Store the file at `path`; returns its id. What a failed upload began is removed.

        Its sha256 goes into its metadata, so that whoever fetches it can tell damage.
        """
        described = dict(metadata or {})
        stream = self._bucket.open_upload_stream(name, metadata=described)
        digest = hashlib.sha256()
        try:
            async with await anyio.open_file(path, "rb") as file:
                while block := await file.read(_BLOCK):
                    digest.update(block)
                    await self._db.call(stream.write, block)
            # Not before all was read: the stream writes its document, metadata and all, when it is closed.
            described["sha256"] = digest.hexdigest()
            await self._db.call(stream.close)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await stream.abort()
            raise
        file_id: ObjectId = stream._id
        return file_id

    async def fetch(self, file_id: Any, path: Path) -> str:
        """Write the file to `path`, whole or not at all; returns its sha256.

        Raises FileMissing, also where the bytes are not those whose sha256 stands in the file's metadata.
        """
        digest = hashlib.sha256()
        part = path.with_name(f"{path.name}.part")
        try:
            stream = await self._db.call(self._bucket.open_download_stream, file_id)
            async with await anyio.open_file(part, "wb") as file:
                while block := await self._db.call(stream.read, _BLOCK):
                    digest.update(block)
                    await file.write(block)
            found, stored = digest.hexdigest(), _sha256(stream.metadata)
            if stored not in (None, found):
                raise CorruptGridFile(f"its sha256 is {found}; stored was {stored}")
            part.replace(path)
        except (NoFile, CorruptGridFile, *_MALFORMED) as error:
            raise FileMissing(f"{self._name} {file_id}: {error}") from error
        finally:
            part.unlink(missing_ok=True)
        return found

    async def read(self, file_id: Any, most: int) -> bytes:
        """The file, for whoever only looks on. Raises FileMissing, also for one of more than `most` bytes."""
        try:
            stream = await self._db.look(self._bucket.open_download_stream, file_id)
            if stream.length > most:
                raise FileMissing(f"{self._name} {file_id}: {stream.length} bytes; expected at most {most}")
            content: bytes = await self._db.look(stream.read)
        except (NoFile, CorruptGridFile, *_MALFORMED) as error:
            raise FileMissing(f"{self._name} {file_id}: {error}") from error
        return content

    async def lengths(self, file_ids: Iterable[Any]) -> dict[str, Any]:
        """The length of each of these files that there is, in bytes, by its hex id."""
        cursor = self._files.find({"_id": {"$in": list(file_ids)}}, {"length": True})
        return {str(document["_id"]): document.get("length") for document in await self._db.call(cursor.to_list)}

    async def exists(self, file_id: Any) -> bool:
        """Whether there is a file with this id."""
        return await self._db.call(self._files.find_one, {"_id": file_id}, {"_id": True}) is not None

    async def delete(self, file_id: Any) -> None:
        """Remove the file; nothing happens if there is none."""
        try:
            await self._db.call(self._bucket.delete, file_id)
        except NoFile:
            pass

    async def ours(self) -> AsyncGenerator[dict[Any, Any], None]:
        """Files that a task left: batches of {file id: its task's id}.

        Files without a `task_id` or `weights_of` in their metadata are somebody else's, and not listed.
        """
        # Nor are those of other forms: what we store has an ObjectId, and a number in its metadata.
        owner = [{f"metadata.{name}": {"$type": "number"}} for name in _OWNER]
        cursor = self._files.find(
            {"_id": {"$type": "objectId"}, "$or": owner}, {f"metadata.{name}": True for name in _OWNER}
        )
        async with aclosing(self._db.batches(cursor, 500)) as batches:
            async for batch in batches:
                described = ((document["_id"], document["metadata"]) for document in batch)
                yield {
                    file_id: data[next(name for name in _OWNER if name in data)]
                    for file_id, data in described
                    if isinstance(data, Mapping)
                }

    async def orphaned(self, file_ids: list[Any], seconds: float) -> list[Any]:
        """Note of files that nothing refers to them; returns those of which that was noted `seconds` ago."""
        return await self._noted(self._files, {"_id": {"$in": file_ids}}, "_id", "metadata.orphan_since", seconds)

    async def not_orphaned(self, file_ids: list[Any]) -> None:
        """Take back what `orphaned` noted of these files: something refers to them again."""
        noted = {"_id": {"$in": file_ids}, "metadata.orphan_since": {"$exists": True}}
        await self._db.call(self._files.update_many, noted, {"$unset": {"metadata.orphan_since": ""}})

    async def orphan_chunks(self, seconds: float) -> list[Any]:
        """Note of chunks that they have no file, as a crash in an upload leaves them and as one under way has them;
        returns the file ids of those of which that was noted `seconds` ago.

        Looks for them in the index `{files_id, n}` alone: the documents hold all the bytes of the bucket. In pages,
        each soon read, however many files there are. Ids that are no ObjectId are none of ours.
        """
        found: list[Any] = []
        after = ObjectId(bytes(12))
        while len(found) < _MAX_ORPHANS:
            page = await self._first_chunks(after)
            found += [row["files_id"] for row in page if not row["file"]]
            if len(page) < _PAGE:
                break
            after = page[-1]["files_id"]
        found = found[:_MAX_ORPHANS]
        first = {"files_id": {"$in": found}, "n": 0}
        return await self._noted(self._chunks, first, "files_id", "orphan_since", seconds) if found else []

    async def _first_chunks(self, after: ObjectId) -> list[Document]:
        """`files_id` of the next files' first chunks, each with its `file`, if there is one."""
        cursor = await self._db.call(
            self._chunks.aggregate,
            [
                {"$match": {"files_id": {"$gt": after}, "n": 0}},
                {"$sort": {"files_id": 1}},
                {"$limit": _PAGE},
                {"$project": {"_id": False, "files_id": True}},
                {
                    "$lookup": {
                        "from": f"{self._name}.files",
                        "localField": "files_id",
                        "foreignField": "_id",
                        "as": "file",
                        "pipeline": [{"$project": {"_id": 1}}],
                    }
                },
            ],
        )
        return await self._db.call(cursor.to_list)

    async def _noted(
        self, collection: AsyncCollection[Document], which: Document, key: str, field: str, seconds: float
    ) -> list[Any]:
        """Set `field` to the server's time where it is not set; the `key` of those where it was set `seconds` ago."""
        await self._db.call(
            collection.update_many, {**which, field: {"$exists": False}}, {"$currentDate": {field: True}}
        )
        long_ago = {"$lte": [f"${field}", {"$subtract": ["$$NOW", int(seconds * 1000)]}]}
        cursor = collection.find({**which, field: {"$type": "date"}, "$expr": long_ago}, {key: True})
        return [document[key] for document in await self._db.call(cursor.to_list)]

    async def delete_chunks(self, file_id: Any) -> None:
        """Remove the chunks of a file that is none."""
        await self._db.call(self._chunks.delete_many, {"files_id": file_id})


def _sha256(metadata: Any) -> str | None:
    """The sha256 that a file's metadata give, lower-case hex, or None."""
    value = metadata.get("sha256") if isinstance(metadata, Mapping) else None
    return value.lower() if isinstance(value, str) and re.fullmatch("[0-9A-Fa-f]{64}", value) else None


class Files:
    """The four buckets."""

    def __init__(self, database: Database) -> None:
        self.images = Bucket(database, "images")
        self.messages = Bucket(database, "messages")
        self.models = Bucket(database, "models")
        self.reports = Bucket(database, "reports")
