"""Looking at a service from outside while documents rain on it."""

import json
from pathlib import Path
from typing import Any

import bson
from bson.raw_bson import RawBSONDocument
from pymongo.database import Database

from handlers.store.database import CODEC
from tests.helpers import Service

#: Events that may stand in the log at level error: how a task ended, and what is documented to have no answer.
_ERRORS = {"task failed", "document not answered"}


def memory(service: Service, name: str) -> int:
    """`VmRSS` (now) or `VmHWM` (at most so far) of the service, in MB."""
    lines = Path(f"/proc/{service.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) // 1024


def assert_calm(service: Service) -> None:
    """Not one exception in the log that nobody expected, and every line of it is one JSON object."""
    for line in service.log.read_text(errors="replace").splitlines():
        assert "Traceback" not in line, line[:4000]
        assert "bug in" not in line, line[:4000]
        event = json.loads(line)
        assert event["level"] in ("info", "warning") or event["event"] in _ERRORS, line[:4000]


def raw(db: Database[dict[str, Any]], collection: str = "DL_TASK") -> Any:
    """The collection, read without being understood."""
    return db.get_collection(collection, codec_options=CODEC.with_options(document_class=RawBSONDocument))


def first_element(document: bytes) -> bytes:
    """The bytes of the first element of a document: of `_id`, where the server has put it there."""
    document = bytes(document)  # PyMongo may give a view into the whole answer
    kind, name_end = document[4], document.index(b"\x00", 5)
    return document[4 : name_end + 1 + _size(kind, document, name_end + 1)]


_FIXED = {1: 8, 6: 0, 7: 12, 8: 1, 9: 8, 10: 0, 16: 4, 17: 8, 18: 8, 19: 16, 255: 0, 127: 0}


def _size(kind: int, data: bytes, at: int) -> int:
    if kind in _FIXED:
        return _FIXED[kind]
    length = int.from_bytes(data[at : at + 4], "little", signed=True)
    return length + {2: 4, 13: 4, 14: 4, 12: 16, 5: 5}.get(kind, 0)


def decoded(document: RawBSONDocument) -> dict[str, Any]:
    """What stands in it, `_id` aside, which may be beyond any driver."""
    key = first_element(document.raw)
    rest = bytes(document.raw)[4 + len(key) :]
    return bson.decode((len(rest) + 4).to_bytes(4, "little") + rest, CODEC)
