"""The errors of MongoDB in a few words, for counting."""

from typing import Literal

from pymongo.errors import DuplicateKeyError, PyMongoError

from handlers.store.database import Unreadable, away, refused

#: `unreachable`: no server, no primary, or the connection broke. `timeout`: no answer in time. `history_lost`: the
#: change stream's place is no longer in the oplog. `duplicate`: a unique index said no. `unreadable`: a document is no
#: valid BSON. `refused`: the server said no, and would again. `passing`: it said no, and may say yes the next time.
ErrorKind = Literal["unreachable", "timeout", "history_lost", "duplicate", "unreadable", "refused", "passing"]

#: ChangeStreamHistoryLost, CappedPositionLost.
_HISTORY_LOST = (286, 136)


def kind_of(error: PyMongoError) -> ErrorKind:
    """The kind of an error of the store."""
    if isinstance(error, Unreadable):
        return "unreadable"
    if isinstance(error, DuplicateKeyError):
        return "duplicate"
    if getattr(error, "code", None) in _HISTORY_LOST:
        return "history_lost"
    if away(error):
        return "unreachable"
    if error.timeout:
        return "timeout"
    return "refused" if refused(error) else "passing"
