"""Errors of MongoDB in a few words: what an operator does about one depends on no more."""

import pytest
from pymongo.errors import (
    AutoReconnect,
    DuplicateKeyError,
    ExecutionTimeout,
    NetworkTimeout,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WaitQueueTimeoutError,
    WriteError,
    WTimeoutError,
)

from handlers.store.database import Unreadable
from handlers.store.kinds import kind_of


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ServerSelectionTimeoutError("no primary"), "unreachable"),
        (NetworkTimeout("timed out"), "unreachable"),
        (WaitQueueTimeoutError("pool"), "unreachable"),
        (AutoReconnect("connection closed"), "unreachable"),
        (ExecutionTimeout("operation exceeded time limit", 50), "timeout"),
        (WTimeoutError("waiting for replication timed out", 64), "timeout"),
        (OperationFailure("Resume of change stream was not possible", 286), "history_lost"),
        (OperationFailure("CollectionScan died", 136), "history_lost"),
        (DuplicateKeyError("E11000", 11000), "duplicate"),
        (Unreadable("a document is no valid BSON"), "unreadable"),
        (WriteError("Document failed validation", 121), "refused"),
        (OperationFailure("not authorized", 13), "passing"),
        (OperationFailure("interrupted", 11601), "passing"),
        (PyMongoError("whatever it may be"), "passing"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{type(value).__name__}",
)
def test_kinds(error: PyMongoError, kind: str) -> None:
    assert kind_of(error) == kind
