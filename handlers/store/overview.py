"""DL_TASK as people look at it: lists, counts, one task in detail. Nothing here is needed to run a task.

Anybody may look, as often as they like, at documents that anybody wrote. So every read here uses an index, ends in time
(`Database.look`) and fetches no more of a document than is shown: no id lists, and nothing that grew large by hand.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bson.raw_bson import RawBSONDocument
from pymongo import DESCENDING
from pymongo.asynchronous.collection import AsyncCollection

from handlers.store.database import Database, Document
from handlers.store.documents import readable, reference, referred
from handlers.store.expressions import IN_QUEUE_INDEX, bounded
from handlers.store.tasks import QUEUE_ORDER
from schemas.enums import END_STATES, TaskStatus
from schemas.numbers import UINT64_MAX, bson_uint64, whole_number
from schemas.task import ID_LISTS

#: Tasks of one page of the list.
PAGE_ROWS = 50

#: How far down the queue `queue` looks.
QUEUE_HEAD = 1000

#: Counting goes no further: it reads an index, and a million keys would take a second.
COUNT_LIMIT = 100_000

#: The state of a document that no worker has answered; it is none of TaskStatus.
NEW = "NEW"

#: A longer `_id` fits into no URL.
_KEY_BYTES = 1000

_WITHOUT_LISTS = dict.fromkeys(ID_LISTS, False)

#: What a line of the list shows, and how many bytes of each at most.
_ROW = {
    **dict.fromkeys(("task_id", "status", "priority", "failures", "attempt", "cancel_requested", "runs_alone"), 200),
    "schema_version": 200,
    **dict.fromkeys(("create_time", "start_time", "end_time", "not_before"), 200),
    **dict.fromkeys(("param_request.device_type", "param_request.device_num"), 200),
    **dict.fromkeys(("task_type", "owner", "param_request.model_name", "progress"), 2000),
    **dict.fromkeys(("result.model_name", "result.version", "result.metrics.on"), 500),
    **dict.fromkeys(("result.metrics.map", "result.metrics.map_50"), 200),
    "error": 10_000,
}

#: What the page of one task shows besides.
_DETAIL = {
    **{name: size for name, size in _ROW.items() if "." not in name},
    **dict.fromkeys(("error_code", "max_attempts", "lease_renewed_at", "batch_size_limit", "patience", "mirror"), 200),
    **dict.fromkeys(("dataset", "split", "json_mongodb_id", "traceparent", "trace_parent"), 2000),
    "snapshot": 2000,
    "param_request": 50_000,
    "history": 100_000,
    "result": 4_000_000,
}


@dataclass(frozen=True)
class Row:
    """A task document as far as it is shown; its `_id` is `reference`, and `admitted_id` too where it is admitted."""

    #: The task's number, or `~` and its `_id`; where the number is none and the `_id` is long, nothing.
    reference: str
    document: Document


@dataclass(frozen=True)
class Page:
    """One page of the list, and whether another one follows."""

    rows: tuple[Row, ...]
    more: bool


class Overview:
    """The task collection, for people."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._tasks = database.collection("DL_TASK")

    @cached_property
    def _raw(self) -> AsyncCollection[RawBSONDocument]:
        """DL_TASK, for what clients wrote. Opened when first read: mongomock, in unit tests, knows no raw documents."""
        return self._db.raw("DL_TASK")

    async def listed(self, limit: int) -> list[Document]:
        """What runs, what nobody has answered, what waits, what has ended; `limit` in all, without lists and reports.

        What waits is in the order in which workers claim it, the rest newest first.
        """
        found: list[RawBSONDocument] = []
        newest = {"_id": DESCENDING}
        answered = {"admitted_id": {"$ne": None}}
        long = ("history", *(f"result.metrics.{name}" for name in ("per_class", "confusion", "worst")))
        fields = {**_WITHOUT_LISTS, **dict.fromkeys(long, False)}
        for which, order in (
            ({"status": TaskStatus.RUNNING.name, **answered, **IN_QUEUE_INDEX}, newest),
            ({"admitted_id": None}, newest),
            ({"status": TaskStatus.PENDING.name, **answered, **IN_QUEUE_INDEX}, dict(QUEUE_ORDER)),
            ({"status": {"$in": [status.name for status in END_STATES]}, **answered}, newest),
        ):
            cursor = self._raw.find(which, fields).sort(order)
            found += await self._db.call(cursor.limit(limit - len(found)).to_list) if len(found) < limit else []
        return [readable(document) for document in found]

    async def queue(self) -> tuple[list[Document], int]:
        """The first `QUEUE_HEAD` PENDING tasks, by `_id` alone, as workers claim them; and how many there are."""
        waiting = {"status": TaskStatus.PENDING.name, **IN_QUEUE_INDEX}
        cursor = self._raw.find(waiting, {"_id": True}).sort(QUEUE_ORDER).limit(QUEUE_HEAD)
        first = [readable(document) for document in await self._db.call(cursor.to_list)]
        return first, await self._count({"status": TaskStatus.PENDING.name})

    async def counts(self) -> dict[str, int]:
        """How many documents are in each state, up to COUNT_LIMIT; NEW are those that no worker has answered.

        A copy of an answered document counts by the state that it carries, for the moment that passes until a worker
        answers it.
        """
        found = {NEW: await self._count({"admitted_id": None})}
        for status in TaskStatus:
            found[status.name] = await self._count({"status": status.name})
        return found

    async def _count(self, which: Document) -> int:
        return await self._db.look(self._tasks.count_documents, which, limit=COUNT_LIMIT)

    async def total(self) -> int:
        """How many documents there are."""
        return await self._db.look(self._tasks.estimated_document_count)

    async def page(self, state: str | None, number: int) -> Page:
        """The page `number`, from 1, of the tasks in this state or of all: newest first, as their `_id`s say.

        Those before it are skipped in the index (`_id`, `state` or `admitted`), without any document being fetched.
        """
        which: Document = {} if state is None else {"admitted_id": None} if state == NEW else {"status": state}
        skipped: list[Document] = [{"$sort": {"_id": DESCENDING}}, {"$skip": (number - 1) * PAGE_ROWS}]
        found = await self._rows([{"$match": which}, *skipped, {"$limit": PAGE_ROWS + 1}])
        return Page(tuple(found[:PAGE_ROWS]), more=len(found) > PAGE_ROWS)

    async def running(self, limit: int) -> list[Row]:
        """Running tasks, newest first."""
        newest: list[Document] = [{"$sort": {"_id": DESCENDING}}, {"$limit": limit}]
        return await self._rows([{"$match": {"status": TaskStatus.RUNNING.name}}, *newest])

    async def next_waiting(self, limit: int) -> list[Row]:
        """The first PENDING tasks, in the order in which workers claim them."""
        waiting = {"status": TaskStatus.PENDING.name, **IN_QUEUE_INDEX}
        return await self._rows([{"$match": waiting}, {"$sort": dict(QUEUE_ORDER)}, {"$limit": limit}])

    async def numbered(self, task_ids: Iterable[int]) -> list[Row]:
        """The tasks with these numbers, as lines of the list."""
        return await self._rows([{"$match": {"task_id": {"$in": [bson_uint64(number) for number in task_ids]}}}])

    async def task(self, word: str) -> Row | None:
        """The task that `Row.reference` says, in detail; None if there is none.

        Its `images` and `val_images` are the lengths of its id lists, where it has any.
        """
        which = _which(word)
        if which is None:
            return None
        lists = dict(zip(("images", "val_images"), ID_LISTS, strict=True))
        lengths = {
            name: {"$cond": [{"$isArray": [f"${field}"]}, {"$size": f"${field}"}, None]}
            for name, field in lists.items()
        }
        found = await self._rows([{"$match": which}, {"$limit": 1}], _DETAIL, lengths)
        return found[0] if found else None

    async def _rows(
        self, pipeline: list[Document], fields: Mapping[str, int] = _ROW, more: Mapping[str, Any] | None = None
    ) -> list[Row]:
        # Flat names of our own: an expression below a field that somebody made a list is computed for each element.
        names = {f"f{place}": path for place, path in enumerate(fields)}
        project: Document = {
            "_id": bounded("_id", _KEY_BYTES),
            "long": {"$gte": [{"$bsonSize": {"it": "$_id"}}, _KEY_BYTES]},
            "admitted": {"$eq": ["$admitted_id", "$_id"]},
            **{name: bounded(path, fields[path]) for name, path in names.items()},
            **(more or {}),
        }
        cursor = await self._db.look(self._raw.aggregate, [*pipeline, {"$project": project}])
        return [_row(found, names, more or {}) for found in await self._db.look(cursor.to_list)]


def _row(found: RawBSONDocument, names: Mapping[str, str], more: Iterable[str]) -> Row:
    flat = readable(found)
    document: Document = {name: flat.get(name) for name in more}
    for name, path in names.items():
        if name in flat:
            _put(document, path.split("."), flat[name])
    word = _word(document.get("task_id"))
    if not word and flat.get("long") is not True:
        word = f"~{reference(found)}"
    document["_id"] = word
    if flat.get("admitted") is True:
        document["admitted_id"] = word
    return Row(word, document)


def _put(document: Document, path: list[str], value: Any) -> None:
    for name in path[:-1]:
        document = document.setdefault(name, {})
    document[path[-1]] = value


def _word(task_id: Any) -> str:
    """The number in `task_id`, if it is one that is unique."""
    try:
        number = whole_number(task_id)
    except ValueError:
        return ""
    return str(number) if 0 <= number <= UINT64_MAX else ""


def _which(word: str) -> Mapping[str, Any] | None:
    if word.startswith("~"):
        return referred(word[1:]) if len(word) < 2 * _KEY_BYTES else None
    if word.isascii() and word.isdigit() and len(word) <= 20 and int(word) <= UINT64_MAX:
        return {"task_id": bson_uint64(int(word))}
    return None
