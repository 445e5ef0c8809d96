"""What queries and updates of DL_TASK are made of: expressions that the server computes.

They are total: whatever value of whatever type stands in a field, since anybody may write into a document that has been
admitted, and an update that failed on one document would stop all that wait behind it.
"""

from typing import Any

from handlers.store.database import Document
from schemas.enums import TaskErrorCode
from schemas.version import SCHEMA_VERSION

#: What is shown instead of a value that is too large to be fetched for a page.
TOO_LARGE = "(too large to show)"

#: State changes kept in a document.
HISTORY_LENGTH = 50


def _once(document: str) -> Document:
    """Whether no field of a document comes twice; true of what is none."""
    names = {"$map": {"input": {"$objectToArray": document}, "in": "$$this.k"}}
    once = {"$eq": [{"$size": names}, {"$size": {"$setUnion": [names]}}]}
    return {"$cond": [{"$eq": [{"$type": document}, "object"]}, once, True]}


#: Whether no field comes twice where our updates by a pipeline change a document: such an update would abort the server
#: (see `documents.strictly`); plain operators do no harm. Anybody may write it so, before its admission or after.
ONCE: Document = {
    "$and": [
        _once("$$ROOT"),
        _once("$error"),
        {
            "$allElementsTrue": [
                {
                    "$map": {
                        "input": {"$cond": [{"$isArray": ["$history"]}, "$history", []]},
                        "as": "change",
                        "in": _once("$$change"),
                    }
                }
            ]
        },
    ]
}

#: Admission is one update filtered on its not being so; a copy of an admitted document carries another document's id.
#: One with a field that comes twice is not admitted, whatever it says: admission rejects it.
IS_ADMITTED: Document = {"$and": [{"$eq": ["$admitted_id", "$_id"]}, ONCE]}
ADMITTED: Document = {"$expr": IS_ADMITTED}
NOT_ADMITTED: Document = {"$expr": {"$not": [IS_ADMITTED]}}

#: Documents that this version understands. Plain, for a query: of a value that is no number it is true.
UNDERSTOOD: Document = {"schema_version": {"$not": {"$gt": SCHEMA_VERSION}}}
NOT_UNDERSTOOD: Document = {"schema_version": {"$gt": SCHEMA_VERSION}}

#: What the index `queue` holds, all waiting and running tasks among it; a query that does not say so cannot use it.
IN_QUEUE_INDEX: Document = {"error_code": int(TaskErrorCode.OK)}


def history(status: Any, **fields: Any) -> Document:
    """The expression that appends one state change, keeping the newest."""
    entry = {"status": status, "at": "$$NOW", **fields}
    before = {"$cond": [{"$isArray": ["$history"]}, "$history", []]}
    return {"$slice": [{"$concatArrays": [before, [entry]]}, -HISTORY_LENGTH]}


def is_count(name: str) -> Document:
    """Whether the field holds a number that can be counted up."""
    field = f"${name}"
    return {"$and": [{"$isNumber": field}, {"$gte": [field, 0]}, {"$lt": [field, 2**31]}]}


def count(name: str, otherwise: int) -> Document:
    """The field if it is a count, else `otherwise`."""
    return {"$cond": [is_count(name), f"${name}", otherwise]}


#: The iteration of the snapshot that the next attempt would go on from, and the furthest one of any fault so far.
_KEPT: Document = {"$ifNull": ["$snapshot.iteration", 0]}
_KEPT_BEFORE: Document = {"$ifNull": ["$failed_at", 0]}

#: A count that is none is taken for used up.
_FAILURES = count("failures", 2**31 - 1)

#: One fault more, or the first one since a snapshot got further than at any fault before. Else a long training on
#: machines that are often lost would use up its attempts although each of them got on. One that dies at the same place
#: again and again does not begin anew, also when its snapshot was unusable and it had to come that far once more.
COUNTED_FAULT: Document = {
    "failures": {"$cond": [{"$gt": [_KEPT, _KEPT_BEFORE]}, 1, {"$add": [_FAILURES, 1]}]},
    "failed_at": {"$max": [_KEPT, _KEPT_BEFORE]},
}


def literal(value: Any) -> Document:
    """A value of somebody's, which the server takes as it is."""
    return {"$literal": value}


def _kept(name: str) -> Document:
    small = {"$lt": [{"$bsonSize": {"it": f"${name}"}}, 1000]}
    return {"$cond": [small, f"${name}", "$$REMOVE"]}


#: What an ended task keeps where its document has no room for its end.
ONLY_WHAT_ENDED: Document = {
    "$replaceWith": {
        "_id": "$_id",
        "admitted_id": "$_id",
        **{
            name: _kept(name)
            for name in ("task_id", "task_type", "attempt", "failures", "max_attempts", "create_time", "start_time")
        },
    }
}


def fits(kind: str, number: int, least: int = 1) -> Document:
    """The query for tasks that need at most so many devices of a kind, and at least `least`."""
    # No lower bound unless one is asked for: what was changed by hand to 0 is claimed, and ended with a reason.
    above = {"$gte": least} if least > 1 else {}
    return {"param_request.device_type": kind, "param_request.device_num": {**above, "$lte": number}}


def due() -> Document:
    """Whether the task may run now: a retry waits until `not_before`, and a cancelled one is not begun."""
    return {
        "$and": [
            {"$lte": [{"$ifNull": ["$not_before", "$$NOW"]}, "$$NOW"]},
            {"$ne": ["$cancel_requested", True]},
        ]
    }


def bounded(path: str, size: int) -> Document:
    """The field if it is small, else a text that says so: no page costs megabytes of what somebody wrote by hand."""
    small = {"$lt": [{"$bsonSize": {"it": f"${path}"}}, size]}
    return {"$cond": [small, f"${path}", TOO_LARGE]}
