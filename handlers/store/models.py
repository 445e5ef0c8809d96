"""DL_MODEL: the registry. One document is one version of a named model."""

from typing import Any

from pymongo import DESCENDING
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from handlers.errors import PermanentError
from handlers.store.database import Database, Document
from handlers.store.documents import legible
from handlers.store.expressions import bounded
from schemas.card import MAX_CARD_BYTES
from schemas.numbers import bson_uint64
from schemas.params import split_model_name
from schemas.records import ModelRecord

#: What lists of versions show, and how many bytes of each at most; the names on the left are those in the answer.
_LISTED = {
    **{name: bounded(name, 500) for name in ("model_name", "version", "task_id", "net_model", "model_scope")},
    **{name: bounded(name, 500) for name in ("parent_version", "input_size", "create_time", "data_fingerprint")},
    **{name: bounded(f"metrics.{name}", 200) for name in ("map", "map_50", "map_75", "on")},
    "classes": {"$cond": [{"$isArray": "$class_names"}, {"$size": "$class_names"}, None]},
    "_id": False,
}

#: The fields of a version that name files in GridFS `models`.
_FILES = ("file_id", "weights_file_id")


class Models:
    """The model registry."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._models = database.collection("DL_MODEL")

    async def find(self, reference: str) -> Document | None:
        """The version that `name` (its newest) or `name:version` refers to; None if it is not registered.

        Raises ValueError for a reference that is no model name.
        """
        name, version = split_model_name(reference)
        wanted = {"model_name": name} if version is None else {"model_name": name, "version": version}
        return await self._db.call(self._models.find_one, wanted, sort=[("version", DESCENDING)])

    async def made_by(self, task_id: Any) -> Document | None:
        """The version that the task with this stored `task_id` made."""
        return await self._db.call(self._models.find_one, {"task_id": task_id})

    async def all(self) -> list[Document]:
        """Every version, by name, newest first; without their cards."""
        return await self._db.call(
            self._models.find({}, {"card": False}).sort([("model_name", 1), ("version", -1)]).to_list
        )

    async def newest_of_each(self, skip: int, limit: int) -> list[Document]:
        """The newest version of each name, by name, as lists show it (`_LISTED`); for whoever only looks on.

        The server jumps from name to name in the index `version` (DISTINCT_SCAN).
        """
        newest: list[Document] = [
            {"$sort": {"model_name": 1, "version": -1}},
            {"$group": {"_id": "$model_name", "newest": {"$first": "$$ROOT"}}},
            {"$sort": {"_id": 1}},
            {"$skip": skip},
            {"$limit": limit},
            {"$replaceWith": "$newest"},
            {"$project": _LISTED},
        ]
        cursor = await self._db.look(self._db.raw("DL_MODEL").aggregate, newest)
        return legible(await self._db.look(cursor.to_list))

    async def versions(self, name: str, limit: int) -> list[Document]:
        """The newest versions of a name, the newest first, as lists show them; for whoever only looks on."""
        pipeline: list[Document] = [
            {"$match": {"model_name": name}},
            {"$sort": {"version": -1}},
            {"$limit": limit},
            {"$project": _LISTED},
        ]
        cursor = await self._db.look(self._db.raw("DL_MODEL").aggregate, pipeline)
        return legible(await self._db.look(cursor.to_list))

    async def per_class(self, name: str, version: Any) -> Any:
        """`metrics.per_class` of one version, as it stands there; for whoever only looks on."""
        pipeline: list[Document] = [
            {"$match": {"model_name": name, "version": {"$eq": version}}},
            {"$project": {"_id": False, "it": bounded("metrics.per_class", 2_000_000)}},
        ]
        cursor = await self._db.look(self._db.raw("DL_MODEL").aggregate, pipeline)
        return next((found.get("it") for found in legible(await self._db.look(cursor.to_list))), None)

    async def with_card(self, name: str, version: Any) -> Document:
        """One version as lists show it, with its `sha256` and its `card`; for whoever only looks on. Empty if gone."""
        pipeline: list[Document] = [
            {"$match": {"model_name": name, "version": {"$eq": version}}},
            {"$project": {**_LISTED, "sha256": bounded("sha256", 200), "card": bounded("card", 2 * MAX_CARD_BYTES)}},
        ]
        cursor = await self._db.look(self._db.raw("DL_MODEL").aggregate, pipeline)
        return next(iter(legible(await self._db.look(cursor.to_list))), {})

    async def next_version(self, name: str, session: AsyncClientSession) -> int:
        """The version that the next model of this name gets; to be inserted in the same transaction.

        Two trainings that finish at once meet on the unique index, and the transaction runs again for one of them.
        """
        newest = await self._db.call(
            self._models.find_one,
            {"model_name": name},
            {"version": True},
            sort=[("version", DESCENDING)],
            session=session,
        )
        return newest["version"] + 1 if newest else 1

    async def insert(self, model: ModelRecord, session: AsyncClientSession) -> None:
        """Insert one version, with the server's time. Part of a transaction with the task's end.

        Raises PermanentError if this task_id has made a model before: then an older task of that number was deleted.
        """
        document = {**model.model_dump(exclude={"create_time"}), "task_id": bson_uint64(model.task_id)}
        try:
            inserted = await self._db.call(self._models.insert_one, document, session=session)
        except DuplicateKeyError as error:
            if "task_id" not in (error.details or {}).get("keyPattern", {}):
                raise
            raise PermanentError(
                "model", f"a model of task_id {model.task_id} is registered already", field="task_id"
            ) from None
        await self._db.call(
            self._models.update_one,
            {"_id": inserted.inserted_id},
            {"$currentDate": {"create_time": True}},
            session=session,
        )

    async def version_of(self, task_id: Any) -> tuple[Any, Any] | None:
        """Name and version of the model that a task made; for whoever only looks on."""
        fields = {"_id": False, "name": bounded("model_name", 500), "version": bounded("version", 200)}
        cursor = self._db.raw("DL_MODEL").find({"task_id": task_id}, fields).limit(1)
        found = legible(await self._db.look(cursor.to_list))
        return (found[0].get("name"), found[0].get("version")) if found else None

    async def files_named(self, task_ids: list[Any]) -> set[str]:
        """Hex ids of the files of the models that these tasks made."""
        cursor = self._models.find({"task_id": {"$in": task_ids}}, dict.fromkeys(_FILES, True))
        return {str(document.get(name)) for document in await self._db.call(cursor.to_list) for name in _FILES}
