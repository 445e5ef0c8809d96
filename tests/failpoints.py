"""A server that fails on command: MongoDB's own failpoints (it must run with `enableTestCommands=1`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pymongo import MongoClient
from pymongo.database import Database

Db = Database[dict[str, Any]]


@contextmanager
def on_command(db: Db, *commands: str, **how: Any) -> Iterator[None]:
    """These commands of services, and of nobody else, fail in this way."""
    data = {"failCommands": list(commands), "appName": "dltask", **how}
    client: MongoClient[dict[str, Any]] = db.client
    client.admin.command({"configureFailPoint": "failCommand", "mode": "alwaysOn", "data": data})
    try:
        yield
    finally:
        client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})


@contextmanager
def away(db: Db) -> Iterator[None]:
    """The server closes the connection at each command of a service."""
    commands = ["hello", "find", "aggregate", "getMore", "insert", "update", "findAndModify", "delete"]
    with on_command(db, *commands, closeConnection=True):
        yield
