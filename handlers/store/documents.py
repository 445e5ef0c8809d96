"""Task documents as they come: read without trust, since the server takes what no driver can read or write again."""

import binascii
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import bson
from bson import Decimal128
from bson.errors import BSONError, InvalidBSON
from bson.raw_bson import RawBSONDocument

from handlers.store.database import CODEC, Document

#: Bytes of an `_id` of each fixed size; the others that the server takes have none (MinKey), or begin with their size.
_FIXED = {1: 8, 7: 12, 8: 1, 9: 8, 16: 4, 17: 8, 18: 8, 19: 16}
#: What such a size leaves out.
_BESIDE_SIZE = {2: 4, 3: 0, 5: 5, 12: 16, 13: 4, 14: 4, 15: 0}

#: Where the value of the first element of a document begins, if that is `_id`, as the server sees to.
_VALUE_AT = 9


@dataclass(frozen=True)
class Unnameable:
    """An `_id` that a driver cannot write again as it stands there: text that is not UTF-8, a binary that lies about
    its length, a key that comes twice. `named` finds its document all the same.
    """

    #: The BSON element.
    element: bytes


class _Once(dict[str, Any]):
    """A document in which no field may come twice.

    Which one counts would be every reader's own guess. And an update by a pipeline that changes such a field aborts the
    server, which cannot tell the difference to its oplog (6.0.5: document_diff_serialization.cpp, `result.second`).
    """

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self:
            raise InvalidBSON(f"field {name!r:.80} comes twice")
        super().__setitem__(name, value)


_STRICT: bson.CodecOptions[Any] = CODEC.with_options(document_class=_Once)


def strictly(data: bytes) -> Document:
    """The document in `data`. Raises InvalidBSON where drivers would not agree on what stands there."""
    document: Document = bson.decode(data, _STRICT)
    return document


def readable(raw: RawBSONDocument) -> Document:
    """The document; its `_id` may be Unnameable, and is all there is where the rest of it is no valid BSON."""
    data = bytes(raw.raw)
    key, rest = _key(data), _rest(data)
    again: Document = {}
    if isinstance(key, Unnameable):
        # Once it has been answered, what cannot be read stands there twice.
        mark = key.element[:1] + b"admitted_id" + key.element[4:]
        again = {"admitted_id": key} if mark in rest else {}
        rest = _document(rest[4:-1].replace(mark, b""))
    try:
        return {"_id": key, **bson.decode(rest, CODEC), **again}
    except BSONError:
        return {"_id": key}


def legible(found: Iterable[RawBSONDocument]) -> list[Document]:
    """Those of the documents that are valid BSON: one that is none must not hide all others of an answer."""
    documents = []
    for raw in found:
        try:
            documents.append(bson.decode(raw.raw, CODEC))
        except BSONError:
            continue
    return documents


def _rest(data: bytes) -> bytes:
    """The document without its `_id`."""
    return _document(data[4 + len(_element(data)) : -1])


def _element(data: bytes) -> bytes:
    """The BSON element of the `_id`."""
    kind = data[4]
    size = _FIXED.get(kind, 0)
    if kind in _BESIDE_SIZE:
        size = struct.unpack_from("<i", data, _VALUE_AT)[0] + _BESIDE_SIZE[kind]
    return data[4 : _VALUE_AT + size]


def _key(data: bytes) -> Any:
    element = _element(data)
    alone = _document(element)
    try:
        key = bson.decode(alone, CODEC)["_id"]
        if bson.encode({"_id": key}) == alone:
            return key
    except (BSONError, OverflowError):
        pass
    return Unnameable(element)


def identity(raw: RawBSONDocument) -> Document:
    """`task_id` and `task_type` of a document, where they are a number or a short text, and beyond doubt."""
    try:
        document = strictly(_rest(bytes(raw.raw)))
    except BSONError:
        return {}
    plain = int | float | Decimal128 | str
    found = {name: document.get(name) for name in ("task_id", "task_type")}
    return {name: value for name, value in found.items() if isinstance(value, plain) and len(str(value)) < 100}


def named(key: Any, conditions: Mapping[str, Any]) -> Mapping[str, Any]:
    """The filter for the document with this `_id`, if it meets `conditions`."""
    if isinstance(key, Unnameable):
        # Not side by side in one: PyMongo looks at the names in a filter, and would read this one for it.
        return {"$and": [RawBSONDocument(_document(key.element)), conditions]}
    return {"_id": key, **conditions}


def reference(raw: RawBSONDocument) -> str:
    """The `_id` of a document as a word for a URL, whatever its type; see `referred`."""
    element = _element(bytes(raw.raw))
    return urlsafe_b64encode(element[:1] + element[5:]).decode().rstrip("=")


def referred(word: str) -> Mapping[str, Any] | None:
    """The filter for the document whose `_id` this word of `reference` says; None if it says none."""
    try:
        data = urlsafe_b64decode(word + "=" * (-len(word) % 4))
        kind, value = data[:1], data[1:]
        alone = _document(kind + b"_id\x00" + value)
        bson.decode(alone, CODEC)
        # Anybody writes URLs: one value, and no more behind it.
        if _element(alone) != alone[4:-1]:
            return None
    except (BSONError, binascii.Error, struct.error, ValueError, OverflowError):
        return None
    # Compared as a value: a document or a pattern would be a question of its own.
    return {"$and": [RawBSONDocument(_document(b"\x03_id\x00" + _document(kind + b"$eq\x00" + value)))]}


def _document(elements: bytes) -> bytes:
    return struct.pack("<i", len(elements) + 5) + elements + b"\x00"
