"""The change stream on DL_TASK, as hints: which documents are worth a look."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import anyio
from bson.raw_bson import RawBSONDocument
from pymongo.errors import PyMongoError

from handlers.store.database import CODEC, INDEXES, Database
from handlers.store.documents import readable

#: How long the server holds a question that has no answer yet; also how long a shutdown may have to wait for one.
_AWAIT_MS = 500


@dataclass(frozen=True)
class Hint:
    """A document that was inserted or replaced (`new`), asked to be cancelled, or put back into the queue.

    Or, with `tables`, a collection of ours that was dropped or renamed: its indexes went with it, and what stands under
    its name now was told by no event.
    """

    key: Any
    new: bool
    cancel: bool
    tables: bool = False


#: Only what matters, and of that only the names: an event with a whole document in it can be too large to be sent.
_PIPELINE: list[dict[str, Any]] = [
    {
        "$match": {
            "$or": [
                {"ns.coll": "DL_TASK", "operationType": {"$in": ["insert", "replace"]}},
                {
                    "ns.coll": "DL_TASK",
                    "operationType": "update",
                    "updateDescription.updatedFields.cancel_requested": True,
                },
                {"ns.coll": "DL_TASK", "operationType": "update", "updateDescription.updatedFields.status": "PENDING"},
                {"ns.coll": {"$in": list(INDEXES)}, "operationType": {"$in": ["drop", "rename"]}},
                {"to.coll": {"$in": list(INDEXES)}, "operationType": "rename"},
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

    The stream is on the database and not on the collection, so that a dropped or renamed collection does not end it. A
    dropped database does, without an error.
    """
    # Read without being understood: one `_id` that is no valid BSON would end the stream.
    raw = database.db.with_options(codec_options=CODEC.with_options(document_class=RawBSONDocument))
    stream = await database.call(raw.watch, _PIPELINE, max_await_time_ms=_AWAIT_MS)
    try:
        opened.set()
        while stream.alive:
            event = await database.call(stream.try_next)
            if event is None:
                continue
            if event["operationType"] in ("drop", "rename"):
                yield Hint(None, new=False, cancel=False, tables=True)
            else:
                new = event["operationType"] != "update"
                yield Hint(readable(event["documentKey"])["_id"], new, event.get("cancel") is True)
    finally:
        # Left open it would hold a cursor on the server; that it cannot be closed is no news when it just broke.
        with anyio.CancelScope(shield=True):
            try:
                await stream.close()
            except PyMongoError:
                pass
