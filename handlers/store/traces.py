"""DL_TASK_METRIC and DL_TASK_LOG: what a running task leaves for whoever follows it. Never needed to run it."""

from collections.abc import Sequence
from typing import Any

from bson import MaxKey, MinKey
from pymongo import UpdateOne

from handlers.store.database import Database, Document

#: Lines kept of a task, over all attempts; with `LINE_LENGTH` this bounds the document to about a megabyte.
LOG_LINES = 1000
LINE_LENGTH = 1000

#: Measurements read for a picture: five times as many as a training makes.
_DRAWN = 2000
_CURVES = ("loss", "learning_rate", "map", "map_50")


class Traces:
    """Measurements and log lines of tasks."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._metrics = database.collection("DL_TASK_METRIC")
        self._logs = database.collection("DL_TASK_LOG")

    async def put_measurements(self, task_id: Any, rows: Sequence[tuple[int, dict[str, float]]]) -> None:
        """Store (iteration, values) rows; a resumed run overwrites what it repeats."""
        if rows:
            updates = [
                UpdateOne({"_id": {"task": task_id, "iteration": iteration}}, {"$set": values}, upsert=True)
                for iteration, values in rows
            ]
            await self._db.call(self._metrics.bulk_write, updates, ordered=False)

    async def measurements(self, task_id: Any) -> list[Document]:
        """All measurements of a task, by iteration: `{iteration, loss, learning_rate, map, …}`."""
        cursor = self._metrics.find({"_id": _span(task_id)}).sort("_id", 1)
        rows = await self._db.call(cursor.to_list)
        return [{"iteration": row.pop("_id")["iteration"], **row} for row in rows]

    async def curves(self, task_id: Any) -> list[Document]:
        """What is drawn of a training, by iteration: `{iteration, loss, learning_rate, map, map_50}`.

        For whoever only looks on; numbers of any BSON type, and nothing else that somebody wrote there.
        """
        paths = {"iteration": "$_id.iteration", **{name: f"${name}" for name in _CURVES}}
        numbers = {name: {"$cond": [{"$isNumber": path}, path, "$$REMOVE"]} for name, path in paths.items()}
        cursor = await self._db.look(
            self._metrics.aggregate,
            [
                {"$match": {"_id": _span(task_id)}},
                {"$sort": {"_id": 1}},
                {"$limit": _DRAWN},
                {"$project": {"_id": False, **numbers}},
            ],
        )
        return await self._db.look(cursor.to_list)

    async def append_log(self, task_id: Any, lines: Sequence[str]) -> None:
        """Append log lines (JSON, of LINE_LENGTH characters at most); the oldest fall off."""
        if lines:
            # They come cut, and as whole JSON (`service.log_lines`); here the document is bounded whatever comes.
            bounded = [line[:LINE_LENGTH] for line in lines]
            await self._db.call(
                self._logs.update_one,
                {"_id": task_id},
                {"$push": {"lines": {"$each": bounded, "$slice": -LOG_LINES}}},
                upsert=True,
            )

    async def log(self, task_id: Any) -> list[str]:
        """The log lines of a task, oldest first."""
        found = await self._db.call(self._logs.find_one, {"_id": task_id})
        lines = found.get("lines") if found else None
        # Anybody who may write there may have written anything.
        return [line for line in lines if isinstance(line, str)] if isinstance(lines, list) else []

    async def last_lines(self, task_id: Any, most: int) -> tuple[list[str], int]:
        """The last `most` log lines of a task, oldest first, and how many are kept of it; for whoever only looks on."""
        lines = {"$cond": [{"$isArray": ["$lines"]}, "$lines", []]}
        small = {"$lt": [{"$bsonSize": {"it": "$lines"}}, 2 * LOG_LINES * LINE_LENGTH * 4]}
        texts = {"$filter": {"input": {"$slice": [lines, -most]}, "cond": {"$eq": [{"$type": "$$this"}, "string"]}}}
        project = {"lines": {"$cond": [small, texts, []]}, "kept": {"$size": lines}}
        cursor = await self._db.look(
            self._logs.aggregate, [{"$match": {"_id": task_id}}, {"$project": {"_id": False, **project}}]
        )
        for found in await self._db.look(cursor.to_list):
            return found["lines"], found["kept"]
        return [], 0


def _span(task_id: Any) -> Document:
    return {"$gt": {"task": task_id, "iteration": MinKey()}, "$lt": {"task": task_id, "iteration": MaxKey()}}
