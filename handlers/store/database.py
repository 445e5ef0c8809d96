"""The client, and the one shielded call that every operation goes through.

PyMongo's async client must never be cancelled by anyio in the middle of an operation: the connection it was using is
then never given back, and once the pool is used up every later operation hangs for good. So nothing outside this
package sees the client, and everything inside goes through `Database.call` or `Database.batches`.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any, ParamSpec, TypeVar
from urllib.parse import quote_plus, unquote_plus

import anyio
import anyio.lowlevel
import pymongo
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument
from gridfs import AsyncGridFSBucket
from pymongo import AsyncMongoClient
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.command_cursor import AsyncCommandCursor
from pymongo.asynchronous.cursor import AsyncCursor
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    DocumentTooLarge,
    InvalidURI,
    OperationFailure,
    PyMongoError,
    WriteConcernError,
)
from pymongo.read_preferences import ReadPreference
from pymongo.write_concern import WriteConcern

from handlers.errors import StartupError
from handlers.store.diagnosis import OLDEST_WIRE_VERSION, no_replica_set, why_no_primary, why_unusable
from handlers.store.privileges import lacking

P = ParamSpec("P")
T = TypeVar("T")
Document = dict[str, Any]
D = TypeVar("D", bound=Mapping[str, Any])
E = TypeVar("E", bound=PyMongoError)

#: What a MongoDB operation raises; callers outside this package know it by this name.
StoreError = PyMongoError

#: One operation, retries and server selection included. Above a fail-over (11 s), below half the lease of 45 s, so that
#: a renewal that hangs is tried again in time.
OPERATION_TIMEOUT_MS = 20_000

#: One look of somebody who only looks on: soon answered, or not at all. Of the server's work on it too.
LOOK_SECONDS = 3.0

#: Documents that clients wrote can hold dates no datetime can and text that is not UTF-8: neither may break a reader.
CODEC: CodecOptions[dict[str, Any]] = CodecOptions(
    tz_aware=True, datetime_conversion=DatetimeConversion.DATETIME_AUTO, unicode_decode_error_handler="replace"
)


#: Of every write: what was confirmed outlives a fail-over.
_MAJORITY = WriteConcern(w="majority", j=True)


class Unreadable(PyMongoError):
    """An answer of the server holds a document that is no valid BSON."""


#: What the server says when the time was wrong and not the operation (see `refused`).
_NOT_NOW = frozenset(
    (
        # The categories NetworkError, NotPrimaryError, ShutdownError, RetriableError, ExceededTimeLimitError,
        # Interruption, WriteConcernError, SnapshotError and SystemOverloadedError of the server's error_codes.yml, …
        *(6, 7, 24, 50, 64, 75, 79, 89, 91, 100, 134, 189, 202, 237, 239, 246, 250, 262, 272, 279, 281, 282, 290, 355),
        *(358, 402, 406, 407, 412, 433, 449, 450, 453, 462, 9001, 10107, 11600, 11601, 11602, 13435, 13436, 46841),
        *(50915, 91331, 10045600),
        # … cursors that are gone, routing that is stale, …
        *(43, 63, 136, 143, 150, 175, 222, 234, 249, 13388),
        # … locks, conflicts and transactions that begin anew: LockBusy, LockFailed, WriteConflict, Conflicting…, …
        *(46, 107, 112, 117, 206, 215, 216, 217, 225, 228, 251, 267, 276, 285, 356, 363, 365, 388, 12586, 12587),
        # … who may do it: a user or key that is not there yet after a restart, a role or password being changed, …
        *(11, 13, 18, 31, 211, 334, 391, 404),
        # … and what an operator mends: members without a primary, writes blocked, files, memory, a full disk.
        *(133, 371, 264, 146, 14031),
        10058,  # "not primary" of old
    )
)

#: What PyMongo adds to an error of the network, and what the server repeats of a command that it does not allow.
_TIMEOUTS = re.compile(r" \(configured timeouts: [^)]*\)")
_COMMAND = re.compile(r"(to execute command \{ \w+: [^,}]+),.*")


def masked(text: str, uri: str) -> str:
    """`text` without the secrets that `uri` carries, however they are written there."""
    for secret in secrets_of(uri):
        text = text.replace(secret, "***")
    return text


@lru_cache(maxsize=8)  # each value of each log line is masked
def secrets_of(uri: str) -> tuple[str, ...]:
    """The password and the like that `uri` carries, as written and unescaped, the longest first."""
    # Not by PyMongo's parser, which asks the name service about mongodb+srv, and has no answer for a URI that is wrong
    # and may hold a password all the same. Up to the last @, since a password that is not escaped may have one in it.
    name_and_password, at, rest = uri.partition("://")[2].rpartition("@")
    found = [name_and_password.partition(":")[2]] if at else []
    found += re.findall(r"(?i)(?:password=|token:)([^&,]+)", rest)
    forms = {form for raw in found for form in (raw, unquote_plus(raw), quote_plus(unquote_plus(raw)))}
    # Longest first, lest a part of one be left over.
    return tuple(sorted((form for form in forms if form), key=len, reverse=True))


class Database:
    """One MongoDB database, its collections and GridFS buckets."""

    def __init__(
        self,
        client: AsyncMongoClient[Document],
        name: str,
        uri: str = "",
        *,
        failed: Callable[[StoreError], None] = lambda error: None,
    ) -> None:
        self._client = client
        #: Only to find out why the server cannot be used.
        self._uri = uri
        self._failed = failed
        # What the URI says of these is for clients that may be told what is old, or lose what was confirmed.
        self.db = client.get_database(
            name, codec_options=CODEC, read_preference=ReadPreference.PRIMARY, write_concern=_MAJORITY
        )
        self._in_transaction = anyio.Lock()

    def collection(self, name: str) -> AsyncCollection[Document]:
        """The collection `name`."""
        return self.db[name]

    def raw(self, name: str) -> AsyncCollection[RawBSONDocument]:
        """The collection `name`, for what anybody wrote: see `documents`."""
        return self.db[name].with_options(codec_options=CODEC.with_options(document_class=RawBSONDocument))

    def bucket(self, name: str) -> AsyncGridFSBucket:
        """The GridFS bucket `name`."""
        return AsyncGridFSBucket(self.db, bucket_name=name)

    async def call(self, operation: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run one operation of the client to its end, whoever cancels meanwhile.

        A cancellation is delivered before the operation begins and never after, so that a caller always learns what
        its write did.
        """
        await anyio.lowlevel.checkpoint_if_cancelled()
        try:
            with anyio.CancelScope(shield=True):
                result = await operation(*args, **kwargs)
        except BSONError as error:
            # The server checks little of what it is given: a binary may lie about its length.
            raise self._told(Unreadable(f"a document is no valid BSON: {error}")) from None
        except OverflowError as error:
            # What PyMongo 4.20 raises once it has tried a thousand times within an operation's time, as it can while
            # each connection is closed at once (`helpers_shared._backoff`). BSON's own has other words.
            if "to float" not in str(error):
                raise
            raise self._told(AutoReconnect("the connection was closed again and again")) from None
        except PyMongoError as error:
            self._failed(error)
            raise
        return result

    def _told(self, error: E) -> E:
        """`error`, counted. No variable of the frame that raises it: it knows that frame, and would keep all in it."""
        self._failed(error)
        return error

    async def look(self, operation: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """`call` for whoever only looks on: it ends within LOOK_SECONDS, on the server too, or raises."""
        with self.looking():
            return await self.call(operation, *args, **kwargs)

    @staticmethod
    def looking() -> AbstractContextManager[None]:
        """Where all calls together end within LOOK_SECONDS, or raise."""
        return pymongo.timeout(LOOK_SECONDS)

    async def batches(
        self, cursor: AsyncCursor[D] | AsyncCommandCursor[D], size: int = 1000
    ) -> AsyncGenerator[list[D], None]:
        """The documents of `cursor`, up to `size` at a time. Use under `contextlib.aclosing`."""
        # Else the server sends 16 MB at a time, many times that as Python objects.
        cursor.batch_size(size)
        try:
            while batch := await self.call(cursor.to_list, size):
                yield batch
        finally:
            with anyio.CancelScope(shield=True):
                await cursor.close()

    async def transaction(self, body: Callable[[AsyncClientSession], Awaitable[T]]) -> T:
        """Run `body` in a transaction, again if the server says that it may succeed then."""

        async with self._in_transaction:
            return await self.call(
                self._session.with_transaction,
                body,
                # Those of `db` do not hold in a transaction, but else those of the URI.
                write_concern=_MAJORITY,
                read_preference=ReadPreference.PRIMARY,
            )

    @cached_property
    def _session(self) -> AsyncClientSession:
        """That of all transactions, one after the other."""
        return self._client.start_session()

    @property
    def session_id(self) -> Document:
        """The session of all transactions. Whoever takes over from this process ends it, see `end_session`."""
        return dict(self._session.session_id)

    async def end_session(self, session_id: Document) -> None:
        """End the session of a process that is gone, and with it a transaction that it has left open.

        The documents that such a transaction has written stay locked until the server gives it up, after 60 seconds
        (`transactionLifetimeLimitSeconds`): every write to them waits, and no other model of its name can be
        registered. A user may end its own sessions without a privilege for that. Raises StoreError.
        """
        await self.call(self._client.admin.command, {"killSessions": [session_id]})

    async def now(self) -> datetime:
        """The server's time, UTC."""
        hello = await self.call(self.db.command, "hello", codec_options=CODEC)
        now: datetime = hello["localTime"]
        return now

    async def check(self) -> str:
        """Raise StartupError unless the server is a replica set new enough, where this user may do what is needed.

        Returns what it is, for people.
        """
        try:
            hello = await self.call(self._client.admin.command, "hello")
        except PyMongoError as error:
            # One that answers is not chosen where it is no primary of the set that the URI names.
            reason = await self.call(why_no_primary, self._uri) if isinstance(error, ConnectionFailure) else None
            raise StartupError(reason or _why_unusable(error)) from error
        try:
            release = (await self.call(self._client.admin.command, "buildInfo"))["version"]
        except PyMongoError as error:
            raise StartupError(_why_unusable(error)) from error
        if hello["maxWireVersion"] < OLDEST_WIRE_VERSION:
            raise StartupError(f"MongoDB is {release}; expected 5.0 or newer: upgrade the server")
        if "setName" not in hello:
            host, port = await self._client.address or ("127.0.0.1", 27017)
            raise StartupError(no_replica_set(host, port, initiated=not hello.get("isreplicaset")))
        await self._check_user()
        return f"MongoDB {release}, replica set {hello['setName']} of {len(hello.get('hosts', ()))}"

    async def _check_user(self) -> None:
        # Now, since a worker would learn of some only at the end of its first training.
        try:
            who = await self.call(self._client.admin.command, "connectionStatus", showPrivileges=True)
            users = who["authInfo"]["authenticatedUsers"]
            if not users:
                # Without access control there are no users; with it, who names none may do this much, and no read.
                await self.call(self.collection("DL_TASK").find_one, {}, {"_id": True})
                return
        except PyMongoError as error:
            raise StartupError(_why_unusable(error)) from error
        if missing := lacking(who["authInfo"]["authenticatedUserPrivileges"], self.db.name):
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise StartupError(
                f"MongoDB does not allow the user {users[0]['user']!r} in the database {self.db.name!r}: "
                f"{', '.join(missing[:5])}{more}; grant it the role dltaskWorker (docs/security.md)"
            )


def away(error: StoreError) -> bool:
    """Whether the server could not be reached, or has no primary: any other operation would meet the same."""
    return isinstance(error, ConnectionFailure)


def _why_unusable(error: PyMongoError) -> str:
    return why_unusable(brief(error), getattr(error, "code", None))


def refused(error: StoreError) -> bool:
    """Whether the server answered, and its answer was no: the same operation would end the same way again.

    It rests on three things that MongoDB says. A label (`RetryableWriteError`, `TransientTransactionError`,
    `ResumableChangeStreamError`, …) is only ever put on what may pass. A write concern that was not met says nothing
    against the write, which is done and may yet be rolled back. And the server's table of error codes
    (src/mongo/base/error_codes.yml) sorts those that tell of its own state into categories. Every other code is about
    the operation or its document: a key that is taken, a value of the wrong type, a document that grows too large.
    """
    if isinstance(error, DocumentTooLarge | Unreadable):
        return True
    if not isinstance(error, OperationFailure) or isinstance(error, WriteConcernError) or error.timeout:
        return False
    if (error.details or {}).get("errorLabels"):
        return False
    if isinstance(error, BulkWriteError):
        return any(write.get("code") not in _NOT_NOW for write in error.details.get("writeErrors", ()))
    return error.code not in _NOT_NOW


def brief(error: BaseException) -> str:
    """The first line of an error, without the topology description, the time-outs and the command that are appended."""
    lines = str(error).split(", Timeout:")[0].split(", full error:")[0].splitlines()
    if not lines:
        return repr(error)[:300]
    return _COMMAND.sub(r"\1, … }", _TIMEOUTS.sub("", lines[0]))[:300]


@asynccontextmanager
async def connect(
    uri: str, name: str, *, failed: Callable[[StoreError], None] = lambda error: None
) -> AsyncIterator[Database]:
    """The database `name` at `uri`. Connects when first used. Raises StartupError for a URI that is none.

    `failed` is told of every operation that raises, whatever becomes of it.
    """
    try:
        client: AsyncMongoClient[Document] = AsyncMongoClient(
            uri, timeoutMS=OPERATION_TIMEOUT_MS, connectTimeoutMS=5000, heartbeatFrequencyMS=2000, appname="dltask"
        )
    except (InvalidURI, ConfigurationError, ValueError, TypeError, OSError) as error:
        file = error if isinstance(error, OSError) else error.__context__
        if isinstance(file, OSError):
            which = f"{file.filename}: " if file.filename else ""
            raise StartupError(
                f"DLTASK_MONGODB_URI names a certificate that cannot be used: {which}{file.strerror}; expected PEM "
                "files that can be read as tlsCAFile and tlsCertificateKeyFile"
            ) from None
        # PyMongo quotes what it could not make out: where a password is not escaped, that is some part of it.
        why = f": {brief(error)}" if "@" not in uri else ""
        raise StartupError(
            f"DLTASK_MONGODB_URI is not a MongoDB URI{why}; expected mongodb://[user:password@]host[:port]/?replicaSet="
            "NAME, with special characters of the password percent-encoded"
        ) from None
    try:
        yield Database(client, name, uri, failed=failed)
    finally:
        with anyio.CancelScope(shield=True):
            await client.close()
