"""IMG_INFO and IMG_LAB_INFO: the platform's images and labels, read in batches; written by the data set import only."""

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from itertools import islice
from typing import Any, Literal

from bson import ObjectId

from handlers.store.database import Database, Document
from schemas.records import ImageRecord, LabelRecord
from schemas.task import object_id

#: Images a query: large enough that the round trip does not count, small enough that the labels of a batch fit memory.
BATCH = 1000

_IMAGE_FIELDS = {"file_name": True, "width": True, "height": True, "file_id": True, "split": True}
_LABEL_FIELDS = {"class_name": True, "bbox": True, "difficult": True, "crowd": True} | {
    # As text, where they can be: of a million labels, two ids each take Python as long to make as all the rest.
    name: {"$convert": {"input": f"${name}", "to": "string", "onError": f"${name}"}}
    for name in ("_id", "img_id")
}


class Records:
    """The image table and the label table."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._images = database.collection("IMG_INFO")
        self._labels = database.collection("IMG_LAB_INFO")

    async def is_empty(self, table: Literal["IMG_INFO", "IMG_LAB_INFO"]) -> bool:
        """Whether `table` has no document."""
        return await self._db.call(self._db.collection(table).find_one, {}, {"_id": True}) is None

    async def missing(self, ids: Sequence[Any]) -> list[Any]:
        """Those of `ids` (ObjectIds or hex strings, possibly neither) that are no image, in their order."""
        known: set[Any] = set()
        # Two forms a row in the filter: an id is an ObjectId or its hex string, in the table as in the task.
        for chunk in _chunks(ids, 10_000):
            cursor = self._images.find({"_id": {"$in": _both_forms(chunk)}}, {"_id": True})
            async with aclosing(self._db.batches(cursor, 10_000)) as batches:
                async for batch in batches:
                    known.update(str(document["_id"]) for document in batch)
        return [value for value in ids if object_id(value) is None or str(value).lower() not in known]

    async def has_images(self, dataset: str, split: str | None) -> bool:
        """Whether a data set has any image in this split (None: in any split but `test`)."""
        return await self._db.call(self._images.find_one, _of(dataset, split), {"_id": True}) is not None

    async def images_by_id(self, ids: Iterable[Any]) -> AsyncGenerator[list[Document], None]:
        """The image records with these ids, in the order of `ids`, each once; ids without a record are left out."""
        seen: set[str] = set()
        for chunk in _chunks(ids, BATCH):
            cursor = self._images.find({"_id": {"$in": _both_forms(chunk)}}, _IMAGE_FIELDS)
            found = {str(document["_id"]): document for document in await self._db.call(cursor.to_list)}
            batch = []
            for value in chunk:
                key = str(value).lower()
                if key in found and key not in seen:
                    seen.add(key)
                    batch.append(found[key])
            yield batch

    async def images_of(self, dataset: str, split: str | None) -> AsyncGenerator[list[Document], None]:
        """The image records of a data set in the order of `_id`; split None is every split but `test`."""
        cursor = self._images.find(_of(dataset, split), _IMAGE_FIELDS).sort("_id")
        async with aclosing(self._db.batches(cursor, BATCH)) as batches:
            async for batch in batches:
                yield batch

    async def labels_of(self, images: Sequence[Document]) -> dict[str, list[Document]]:
        """The labels of these image records, by hex image id, each list in the order of `_id`."""
        grouped: dict[str, list[Document]] = {}
        ids = _both_forms([image["_id"] for image in images])
        cursor = self._labels.find({"img_id": {"$in": ids}}, _LABEL_FIELDS)
        # The order of the index, so it costs no sort; a message must not depend on the server's mood.
        cursor = cursor.sort([("img_id", 1), ("_id", 1)])
        async with aclosing(self._db.batches(cursor, 20_000)) as batches:
            async for batch in batches:
                for label in batch:
                    grouped.setdefault(str(label["img_id"]), []).append(label)
        return grouped

    async def file_ids(self, image_ids: Sequence[str]) -> dict[str, Any]:
        """The GridFS id of each of these images, by hex image id."""
        found: dict[str, Any] = {}
        for chunk in _chunks(image_ids, BATCH):
            cursor = self._images.find({"_id": {"$in": _both_forms(chunk)}}, {"file_id": True})
            for document in await self._db.call(cursor.to_list):
                found[str(document["_id"])] = document.get("file_id")
        return found

    # ---- data sets

    async def datasets(self) -> list[Document]:
        """Each data set with its number of images by split."""
        cursor = await self._db.call(
            self._images.aggregate,
            [
                {"$match": {"dataset": {"$type": "string"}}},
                {"$group": {"_id": {"dataset": "$dataset", "split": "$split"}, "images": {"$sum": 1}}},
                {"$sort": {"_id": 1}},
            ],
        )
        return [
            {"dataset": row["_id"]["dataset"], "split": row["_id"].get("split"), "images": row["images"]}
            for row in await self._db.call(cursor.to_list)
        ]

    async def splits_in(self, dataset: str) -> dict[str, str | None]:
        """The file names that a data set already has, with their splits."""
        fields = {"file_name": 1, "split": 1, "_id": 0}
        cursor = self._images.find({"dataset": dataset, "file_name": {"$type": "string"}}, fields)
        return {document["file_name"]: document.get("split") for document in await self._db.call(cursor.to_list)}

    async def add(self, image_id: ObjectId, image: ImageRecord, labels: Sequence[dict[str, Any]]) -> None:
        """Insert one image, as `image_id`, and its labels (LabelRecord fields but `img_id`).

        The labels go in first, so that an import which is cut off leaves no image that seems to have none.
        """
        records = [LabelRecord(img_id=image_id, **label).model_dump() for label in labels]
        if records:
            await self._db.call(self._labels.insert_many, records)
        await self._db.call(self._images.insert_one, {"_id": image_id, **image.model_dump(exclude_none=True)})


def _of(dataset: str, split: str | None) -> Document:
    return {"dataset": dataset, "split": {"$ne": "test"} if split is None else split}


def _both_forms(ids: Sequence[Any]) -> list[Any]:
    forms: list[Any] = []
    for value in ids:
        if (oid := object_id(value)) is not None:
            forms += (oid, str(oid))
    return forms


def _chunks(values: Iterable[Any], size: int) -> Iterable[list[Any]]:
    iterator = iter(values)
    while chunk := list(islice(iterator, size)):
        yield chunk
