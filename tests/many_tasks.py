"""Task documents by the million, made by the server itself: what tests and benchmarks of a large queue stand on."""

from collections.abc import Mapping
from typing import Any

from pymongo.database import Database

from schemas.params import check_params, stored_params
from schemas.version import SCHEMA_VERSION

#: Documents that one turn of the pipeline makes.
_STEP = 1000


def fill(db: Database[dict[str, Any]], first: int, count: int, **fields: Any) -> None:
    """Add tasks as admission leaves them, numbered from `first` in the order of their age; `fields` are expressions.

    They wait, for one CPU, unless the fields say otherwise. `$n` is a task's number. About 80,000 a second; faster
    before the indexes are made than after.
    """
    document: Mapping[str, Any] = {
        "_id": _object_id(),
        "admitted_id": _object_id(),
        "task_id": "$n",
        "task_type": "TRAIN",
        "dataset": "toy",
        "param_request": literal(params()),
        **{name: literal(value) for name, value in _PENDING.items()},
        # A millisecond younger than the one before, and all of them old.
        "create_time": {"$add": ["$$NOW", {"$add": ["$n", -(10**8)]}]},
        "history": [{"status": "PENDING", "at": "$$NOW", "attempt": literal(0)}],
        **fields,
    }
    end = first + count
    numbers = db["numbers"]
    numbers.insert_one({})
    numbers.aggregate(
        [
            {"$project": {"step": {"$range": [first, end, _STEP]}}},
            {"$unwind": "$step"},
            {"$project": {"n": {"$range": ["$step", {"$min": [{"$add": ["$step", _STEP]}, end]}]}}},
            {"$unwind": "$n"},
            {"$replaceWith": document},
            {"$merge": {"into": "DL_TASK", "whenMatched": "fail"}},
        ]
    )
    numbers.drop()


def literal(value: Any) -> dict[str, Any]:
    """A value that the pipeline takes as it is."""
    return {"$literal": value}


def params(device_type: str = "CPU", device_num: int = 1) -> dict[str, Any]:
    """Parameters as admission stores them; the stand-in child succeeds at once."""
    wanted = {"model_name": "ok", "device_type": device_type, "device_num": device_num, "max_num_iters": 1}
    return stored_params(check_params(wanted))


_PENDING = {
    "priority": 0,
    "max_attempts": 3,
    "schema_version": SCHEMA_VERSION,
    "status": "PENDING",
    "error_code": 0,
    "attempt": 0,
    "failures": 0,
}


def _object_id() -> dict[str, Any]:
    """An ObjectId that ends in the task's number."""
    digits = {"$concat": ["0" * 24, {"$toString": "$n"}]}
    return {"$toObjectId": {"$substrBytes": [digits, {"$subtract": [{"$strLenBytes": digits}, 24]}, 24]}}
