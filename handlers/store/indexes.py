"""The indexes that the service needs: made at its start, and again where somebody drops one."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pymongo
from pymongo import ASCENDING, DESCENDING, IndexModel
from pymongo.errors import OperationFailure

from handlers.errors import StartupError
from handlers.store.database import Database, brief
from schemas.version import SCHEMA_VERSION

_DUPLICATE_KEY = 11000
_UNAUTHORIZED = 13

CLAIM_INDEX = "claim"

INDEXES: Mapping[str, Sequence[IndexModel]] = {
    "DL_TASK": [
        # Partial, so that documents with no, negative or textual ids can each be inserted, and be rejected with a code.
        IndexModel("task_id", unique=True, partialFilterExpression={"task_id": {"$gte": 0}}, name="task_id"),
        # All that waits and runs, in the order of the queue. The device fields are for claims without `claim`.
        IndexModel(
            [
                ("status", ASCENDING),
                ("priority", DESCENDING),
                ("create_time", ASCENDING),
                ("param_request.device_type", ASCENDING),
                ("param_request.device_num", ASCENDING),
            ],
            name="queue",
            # Not of documents as clients write them, nor of rejected ones: MongoDB refuses to index two lists of one
            # document, and a client would get a driver's error instead of a code.
            partialFilterExpression={"error_code": 0},
        ),
        # What waits, by kind of device: a claim passes over no task for another kind, of which there may be a million.
        IndexModel(
            [
                ("param_request.device_type", ASCENDING),
                ("priority", DESCENDING),
                ("create_time", ASCENDING),
                ("param_request.device_num", ASCENDING),
            ],
            name=CLAIM_INDEX,
            partialFilterExpression={"status": "PENDING", "error_code": 0},
        ),
        # The two that follow hold next to nothing. Without them each sweep of each worker would fetch all waiting tasks
        # to see whether a cancel is requested (a million: half a minute), and each start, whether they are newer.
        IndexModel(
            "cancel_requested",
            name="cancel",
            partialFilterExpression={"cancel_requested": True, "status": "PENDING", "error_code": 0},
        ),
        # The version is part of the name: the next one's index is another one, and can be made beside this.
        IndexModel(
            "schema_version",
            name=f"newer_than_{SCHEMA_VERSION}",
            partialFilterExpression={"schema_version": {"$gt": SCHEMA_VERSION}, "error_code": 0},
        ),
        # Finds copies of admitted documents from the index alone (see `Tasks.copied_keys`).
        IndexModel([("admitted_id", ASCENDING), ("_id", ASCENDING)], name="admitted"),
        # Counts and pages by state, for people, newest first; rejected ones too, which `queue` does not hold. One field
        # that clients may make a list, and no more: MongoDB refuses to index two lists of one document.
        IndexModel([("status", ASCENDING), ("_id", DESCENDING)], name="state"),
        # The janitor asks whether any task still runs on a message.
        IndexModel("json_mongodb_id", sparse=True, name="message"),
    ],
    "IMG_INFO": [IndexModel([("dataset", ASCENDING), ("split", ASCENDING), ("_id", ASCENDING)], name="dataset")],
    "IMG_LAB_INFO": [IndexModel([("img_id", ASCENDING), ("_id", ASCENDING)], name="img_id")],
    "DL_MODEL": [
        IndexModel([("model_name", ASCENDING), ("version", DESCENDING)], unique=True, name="version"),
        IndexModel("task_id", unique=True, name="task_id"),
    ],
    "DL_TEST_RESULT": [
        IndexModel(
            [("task_id", ASCENDING), ("attempt", ASCENDING), ("img_id", ASCENDING)], unique=True, name="task_image"
        )
    ],
    "DL_WORKER": [IndexModel("renewed_at", expireAfterSeconds=60, name="expiry")],
}


class Indexes:
    """The indexes of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, *names: str, seconds: float | None = None) -> None:
        """Create what is missing, in these collections or in all.

        Each may take so many `seconds`, or else as long as any operation: then the server gives up what it has built.
        Raises StartupError that names the duplicates which stand against a unique index.
        """
        if problems := await self.mend(*names, seconds=seconds):
            raise StartupError("; ".join(problems))

    async def mend(self, *names: str, seconds: float | None = None) -> list[str]:
        """Create what is missing, as far as it goes; returns why some could not be, and what to do about it."""
        problems = []
        for name in names or INDEXES:
            there = await self._database.call(self._database.collection(name).index_information)
            for index in INDEXES[name]:
                # Who only finds them needs no right to create them.
                if _is_there(index, there):
                    continue
                try:
                    with nullcontext() if seconds is None else pymongo.timeout(seconds):
                        await self._database.call(self._database.collection(name).create_indexes, [index])
                except OperationFailure as error:
                    problems.append(await self._why_no_index(name, index, error))
                    if error.code == _UNAUTHORIZED:
                        break  # nor any other of this collection
        return problems

    async def _why_no_index(self, name: str, index: IndexModel, error: OperationFailure) -> str:
        if error.code == _DUPLICATE_KEY:
            return await self._duplicates(name, index)
        fix = "let a user create it that may (docs/security.md)" if error.code == _UNAUTHORIZED else "mend that"
        return f"cannot create index {name}.{index.document['name']}: {brief(error)}; {fix}"

    async def missing(self) -> list[str]:
        """`COLLECTION.index` of each index that `create` would make."""
        missing = []
        for name, indexes in INDEXES.items():
            there = await self._database.call(self._database.collection(name).index_information)
            missing += [f"{name}.{index.document['name']}" for index in indexes if index.document["name"] not in there]
        return missing

    async def _duplicates(self, name: str, index: IndexModel) -> str:
        fields = list(index.document["key"])
        cursor = await self._database.call(
            self._database.collection(name).aggregate,
            [
                {"$match": index.document.get("partialFilterExpression", {})},
                {"$group": {"_id": {field: f"${field}" for field in fields}, "count": {"$sum": 1}}},
                {"$match": {"count": {"$gt": 1}}},
                {"$limit": 10},
            ],
            allowDiskUse=True,
        )
        found = await self._database.call(cursor.to_list)
        values = "; ".join(
            ", ".join(f"{field} {row['_id'].get(field)}" for field in fields) + f" in {row['count']} documents"
            for row in found
        )
        return f"{name} has duplicates of what must be unique: {values}; remove or renumber them"


def _is_there(index: IndexModel, there: Mapping[str, Any]) -> bool:
    """Whether `there`, a collection's index_information, has exactly this index; the server judges any other."""
    wanted = {**index.document, "key": list(index.document["key"].items())}
    found = there.get(wanted.pop("name"), {})
    return {option: value for option, value in found.items() if option != "v"} == wanted
