"""The change stream on DL_TASK, as hints: which documents are worth a look."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import anyio
from pymongo.errors import PyMongoError

from handlers.store.database import Database

#: How long the server holds a question that has no answer yet; also how long a shutdown may have to wait for one.
_AWAIT_MS = 500


@dataclass(frozen=True)
class Hint:
    """A document that was inserted or replaced (`new`), asked to be cancelled, or put back into the queue."""

    key: Any
    new: bool
    cancel: bool


#: Only what matters, and of that only the names: an event with a whole document in it can be too large to be sent.
_PIPELINE: list[dict[str, Any]] = [
    {
        "$match": {
            "ns.coll": "DL_TASK",
            "$or": [
                {"operationType": {"$in": ["insert", "replace"]}},
                {"operationType": "update", "updateDescription.updatedFields.cancel_requested": True},
                {"operationType": "update", "updateDescription.updatedFields.status": "PENDING"},
            ],
        }
    },
    {
        "$project": {
            "documentKey": 1,
            "operationType": 1,
            "ns": 1,
            "cancel": "$updateDescription.updatedFields.cancel_requested",
        }
    },
]


async def hints(database: Database, opened: anyio.Event) -> AsyncGenerator[Hint, None]:
    """Hints from now on; `opened` is set once nothing inserted later can be missed. Use under `contextlib.aclosing`.

    PyMongo resumes by itself after a lost connection or a fail-over. It ends, or raises PyMongoError, when there is no
    going on: the caller opens it afresh and sweeps; a resume token that failed once is never tried again.

    The stream is on the database and not on the collection, so that a dropped or renamed collection does not end it.
    """
    stream = await database.call(database.db.watch, _PIPELINE, max_await_time_ms=_AWAIT_MS)
    try:
        opened.set()
        while stream.alive:
            event = await database.call(stream.try_next)
            if event is not None:
                new = event["operationType"] != "update"
                yield Hint(event["documentKey"]["_id"], new, event.get("cancel") is True)
    finally:
        # Left open it would hold a cursor on the server; that it cannot be closed is no news when it just broke.
        with anyio.CancelScope(shield=True):
            try:
                await stream.close()
            except PyMongoError:
                pass
