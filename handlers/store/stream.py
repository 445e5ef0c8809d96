"""The change stream on DL_TASK, as hints: which documents are worth a look."""

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import anyio
from bson.raw_bson import RawBSONDocument
from pymongo.errors import PyMongoError

from handlers.store.database import CODEC, Database
from handlers.store.documents import readable
from handlers.store.indexes import INDEXES

#: How long the server holds a question that has no answer yet; also how long a shutdown may have to wait for one.
_AWAIT_MS = 1000


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
    #: When it was written, by the server's clock; servers before 6.0 do not tell.
    written: datetime | None = None


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
            "wallTime": 1,
            "cancel": "$updateDescription.updatedFields.cancel_requested",
        }
    },
]


async def hints(database: Database, opened: anyio.Event, reached: Callable[[int], None]) -> AsyncGenerator[Hint, None]:
    """Hints from now on; `opened` is set once nothing inserted later can be missed. Use under `contextlib.aclosing`.

    `reached` is told how far the stream has come, hints or none: a second of the server's cluster time.

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
            if (second := _second(stream.resume_token)) is not None:
                reached(second)
            if event is None:
                continue
            if event["operationType"] in ("drop", "rename"):
                yield Hint(None, new=False, cancel=False, tables=True)
            else:
                new, written = event["operationType"] != "update", event.get("wallTime")
                yield Hint(
                    readable(event["documentKey"])["_id"],
                    new,
                    event.get("cancel") is True,
                    written=written if isinstance(written, datetime) else None,
                )
    finally:
        # Left open it would hold a cursor on the server; that it cannot be closed is no news when it just broke.
        with anyio.CancelScope(shield=True):
            try:
                await stream.close()
            except PyMongoError:
                pass


def _second(token: Mapping[str, Any] | None) -> int | None:
    """The second of a place in the stream; None for a token of another form than servers have had since 4.0.7.

    A token is a key string in hex digits that begins with the cluster time: its type, 130, and two 32-bit numbers, of
    which the first is the second (src/mongo/db/pipeline/resume_token.h; Debezium reads it so too). The server moves it
    on with every write to the oplog, so that it tells a stream that stands still from one that has nothing to tell.
    """
    data = (token or {}).get("_data")
    if not isinstance(data, str) or not data.startswith("82"):
        return None
    try:
        return int(data[2:10], 16)
    except ValueError:
        return None
