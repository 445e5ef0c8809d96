"""DL_WORKER: who is alive, with which devices. A document expires by itself a minute after its last renewal."""

from collections.abc import Mapping
from typing import Any

from handlers.store.database import Database, Document
from handlers.store.documents import legible
from handlers.store.expressions import bounded

#: What people see of a worker, and how many bytes of each field at most.
_SHOWN = {
    **dict.fromkeys(("_id", "host", "version", "devices", "free"), 2000),
    **dict.fromkeys(("pid", "fallback", "resting", "renewed_at"), 200),
    **dict.fromkeys(("min_device_num", "schema_version"), 200),
    "running": 20_000,
}


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
            {"$set": {**fields, "session": self._db.session_id}, "$currentDate": {"renewed_at": True}},
            upsert=True,
        )

    async def end_session(self, owner: Any) -> None:
        """End the transaction that `owner`, who is gone, may have left open. Raises StoreError.

        Nothing happens where its document has expired: it was renewed longer ago than a transaction lives.
        """
        found = await self._db.call(self._workers.find_one, {"_id": {"$eq": owner}}, {"session": True})
        if found is not None and isinstance(found.get("session"), dict):
            await self._db.end_session(found["session"])

    async def leave(self, owner: str) -> None:
        """Take `owner` off the list at once."""
        await self._db.call(self._workers.delete_one, {"_id": owner})

    async def all(self) -> list[Document]:
        """Every live worker, by name."""
        return await self._db.call(self._workers.find({}, {"session": False}).sort("_id", 1).to_list)

    async def shown(self, limit: int) -> list[Document]:
        """Live workers, by name, as far as they are shown; for whoever only looks on."""
        project = {name: bounded(name, size) for name, size in _SHOWN.items()}
        pipeline: list[Document] = [{"$sort": {"_id": 1}}, {"$limit": limit}, {"$project": project}]
        cursor = await self._db.look(self._db.raw("DL_WORKER").aggregate, pipeline)
        return legible(await self._db.look(cursor.to_list))
