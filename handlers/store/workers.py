"""DL_WORKER: who is alive, with which devices. A document expires by itself a minute after its last renewal."""

from collections.abc import Mapping
from typing import Any

from handlers.store.database import Database, Document


class Workers:
    """The live worker processes."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._workers = database.collection("DL_WORKER")

    async def renew(self, owner: str, fields: Mapping[str, Any]) -> None:
        """Say that `owner` is alive; `fields` are its host, version, devices and running tasks."""
        await self._db.call(
            self._workers.update_one,
            {"_id": owner},
            {"$set": dict(fields), "$currentDate": {"renewed_at": True}},
            upsert=True,
        )

    async def leave(self, owner: str) -> None:
        """Take `owner` off the list at once."""
        await self._db.call(self._workers.delete_one, {"_id": owner})

    async def all(self) -> list[Document]:
        """Every live worker, by name."""
        return await self._db.call(self._workers.find({}).sort("_id", 1).to_list)
