"""DL_MODEL: the registry. One document is one version of a named model."""

from typing import Any

from pymongo import DESCENDING
from pymongo.asynchronous.client_session import AsyncClientSession

from handlers.store.database import Database, Document
from schemas.params import split_model_name


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

    async def all(self) -> list[Document]:
        """Every version, by name, newest first."""
        return await self._db.call(self._models.find({}).sort([("model_name", 1), ("version", -1)]).to_list)

    async def register(self, model: Document, session: AsyncClientSession) -> int:
        """Insert `model` as the next version of its name, with the server's time; returns the version.

        Part of a transaction with the task's end. Two trainings that finish at once meet in a write conflict or on the
        unique index, and the transaction runs again for one of them.
        """
        newest = await self._db.call(
            self._models.find_one,
            {"model_name": model["model_name"]},
            {"version": True},
            sort=[("version", DESCENDING)],
            session=session,
        )
        version = newest["version"] + 1 if newest else 1
        inserted = await self._db.call(self._models.insert_one, {**model, "version": version}, session=session)
        await self._db.call(
            self._models.update_one,
            {"_id": inserted.inserted_id},
            {"$currentDate": {"create_time": True}},
            session=session,
        )
        return version

    async def references(self, file_ids: list[Any]) -> set[Any]:
        """Those of these file ids that a registered model names."""
        cursor = self._models.find({"file_id": {"$in": file_ids}}, {"file_id": True})
        return {document["file_id"] for document in await self._db.call(cursor.to_list)}
