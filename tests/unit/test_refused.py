"""`refused`: which of the server's answers are final, over its real codes."""

import pytest
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    CursorNotFound,
    DocumentTooLarge,
    DuplicateKeyError,
    ExecutionTimeout,
    NetworkTimeout,
    NotPrimaryError,
    OperationFailure,
    ServerSelectionTimeoutError,
    WaitQueueTimeoutError,
    WriteConcernError,
    WriteError,
    WTimeoutError,
)

from handlers.store.database import StoreError, away, refused

FINAL = {
    2: "BadValue",
    9: "FailedToParse",
    14: "TypeMismatch",
    20: "IllegalOperation",
    28: "PathNotViable",
    40: "ConflictingUpdateOperators",
    52: "DollarPrefixedFieldName",
    66: "ImmutableField",
    67: "CannotCreateIndex",
    85: "IndexOptionsConflict",
    86: "IndexKeySpecsConflict",
    121: "DocumentValidationFailure",
    171: "CannotIndexParallelArrays",
    10334: "BSONObjectTooLarge",
    11000: "DuplicateKey",
    16020: "$add of a text",
    17419: "the document would be over 16 MB",
}

PASSING = {
    6: "HostUnreachable",
    11: "UserNotFound",
    13: "Unauthorized",
    18: "AuthenticationFailed",
    43: "CursorNotFound",
    50: "MaxTimeMSExpired",
    64: "WriteConcernTimeout",
    79: "UnknownReplWriteConcern",
    89: "NetworkTimeout",
    91: "ShutdownInProgress",
    100: "UnsatisfiableWriteConcern",
    112: "WriteConflict",
    134: "ReadConcernMajorityNotAvailableYet",
    189: "PrimarySteppedDown",
    211: "KeyNotFound",
    215: "DatabaseDropPending",
    251: "NoSuchTransaction",
    262: "ExceededTimeLimit",
    290: "TransactionExceededLifetimeLimitSeconds",
    365: "TemporarilyUnavailable",
    391: "ReauthenticationRequired",
    462: "IngressRequestRateLimitExceeded",
    10107: "NotWritablePrimary",
    11600: "InterruptedAtShutdown",
    11601: "Interrupted",
    11602: "InterruptedDueToReplStateChange",
    13435: "NotPrimaryNoSecondaryOk",
    13436: "NotPrimaryOrSecondary",
    14031: "OutOfDiskSpace",
}


@pytest.mark.parametrize("code", FINAL, ids=FINAL.get)
def test_what_is_wrong_with_the_operation_is_final(code: int) -> None:
    """As a command's failure and as a write's."""
    assert refused(OperationFailure("no", code))
    assert refused(WriteError("no", code))
    assert refused(BulkWriteError({"writeErrors": [{"code": code}], "writeConcernErrors": []}))


@pytest.mark.parametrize("code", PASSING, ids=PASSING.get)
def test_what_is_wrong_with_the_server_is_not(code: int) -> None:
    """Nor with the members, the connection, the moment, or the rights of the user."""
    assert not refused(OperationFailure("not now", code))
    assert not refused(WriteError("not now", code))
    assert not refused(BulkWriteError({"writeErrors": [{"code": code}], "writeConcernErrors": []}))


@pytest.mark.parametrize(
    "label",
    [
        "RetryableWriteError",
        "TransientTransactionError",
        "UnknownTransactionCommitResult",
        "ResumableChangeStreamError",
    ],
)
def test_what_carries_a_label_is_not(label: str) -> None:
    """Whatever its code is: the server knows better than any table."""
    assert not refused(OperationFailure("again", 8, {"ok": 0, "code": 8, "errorLabels": [label]}))


@pytest.mark.parametrize(
    ("error", "final", "unreached"),
    [
        (DuplicateKeyError("E11000", 11000), True, False),
        (DocumentTooLarge("BSON document too large (17 MB)"), True, False),
        (WriteConcernError("waiting for replication timed out", 64), False, False),
        (WriteConcernError("operation was interrupted", 11000), False, False),
        (WTimeoutError("waiting for replication timed out", 64), False, False),
        (BulkWriteError({"writeErrors": [], "writeConcernErrors": [{"code": 64}]}), False, False),
        (ExecutionTimeout("operation exceeded time limit", 50), False, False),
        (CursorNotFound("cursor id 1 not found", 43), False, False),
        (AutoReconnect("connection closed"), False, True),
        (NetworkTimeout("timed out"), False, True),
        (NotPrimaryError("not primary"), False, True),
        (ServerSelectionTimeoutError("No replica set members match"), False, True),
        (WaitQueueTimeoutError("Timed out while checking out a connection"), False, True),
        (StoreError("anything else of the driver"), False, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_other_errors(error: StoreError, final: bool, unreached: bool) -> None:
    """A write concern that was not met says nothing against the write; a server that was not reached says nothing."""
    assert refused(error) is final
    assert away(error) is unreached
