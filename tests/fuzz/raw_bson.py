"""BSON by hand: what no driver would write, and a server takes all the same."""

import struct
from dataclasses import dataclass
from typing import Any

import bson
from bson.raw_bson import RawBSONDocument


@dataclass(frozen=True)
class Raw:
    """A value that is given as its type byte and its bytes."""

    kind: int
    payload: bytes


@dataclass(frozen=True)
class Pairs:
    """A document as a list of (key, value): keys may come twice."""

    items: tuple[tuple[str, Any], ...]


def text(value: bytes) -> Raw:
    """A text that need not be UTF-8."""
    return Raw(2, struct.pack("<i", len(value) + 1) + value + b"\x00")


def old_binary(inner_length: int, value: bytes) -> Raw:
    """A binary of subtype 2, which tells its length twice: no driver can read one whose lengths differ."""
    return Raw(5, struct.pack("<iBi", len(value) + 4, 2, inner_length) + value)


def symbol(value: bytes) -> Raw:
    """The deprecated type of Ruby's symbols."""
    return Raw(14, text(value).payload)


def db_pointer(collection: bytes) -> Raw:
    """The deprecated type that came before DBRef."""
    return Raw(12, text(collection).payload + bytes(12))


UNDEFINED = Raw(6, b"")


def encoded(document: Any) -> bytes:
    """The bytes of a document: a mapping or `Pairs`."""
    items = document.items if isinstance(document, Pairs) else document.items()
    body = b"".join(element(key, value) for key, value in items)
    return struct.pack("<i", len(body) + 5) + body + b"\x00"


def element(key: str, value: Any) -> bytes:
    """One element of a document. A key with a lone surrogate from "surrogateescape" becomes that byte."""
    name = key.encode(errors="surrogateescape") + b"\x00"
    if isinstance(value, Raw):
        return bytes((value.kind,)) + name + value.payload
    if isinstance(value, Pairs) or type(value) is dict:
        return b"\x03" + name + encoded(value)
    if type(value) is list:
        return b"\x04" + name + encoded(Pairs(tuple((str(place), item) for place, item in enumerate(value))))
    plain = bson.encode({"": value})
    return plain[4:5] + name + plain[6:-1]


def raw_document(document: Any) -> RawBSONDocument:
    """`document` as a driver sends it on, unread."""
    return RawBSONDocument(encoded(document))
