"""The client, the one shielded call that every operation goes through, and the indexes.

PyMongo's async client must never be cancelled by anyio in the middle of an operation: the connection it was using is
then never given back, and once the pool is used up every later operation hangs for good. So nothing outside this
package sees the client, and everything inside goes through `Database.call` or `Database.batches`.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
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
from pymongo import ASCENDING, DESCENDING, AsyncMongoClient, IndexModel
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
from pymongo.write_concern import WriteConcern

from handlers.errors import StartupError
from handlers.store.diagnosis import OLDEST_WIRE_VERSION, no_replica_set, why_no_primary, why_unusable
from handlers.store.privileges import lacking

P = ParamSpec("P")
T = TypeVar("T")
Document = dict[str, Any]
D = TypeVar("D", bound=Mapping[str, Any])

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


class Unreadable(PyMongoError):
    """An answer of the server holds a document that is no valid BSON."""


_DUPLICATE_KEY = 11000
_UNAUTHORIZED = 13

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

INDEXES: Mapping[str, Sequence[IndexModel]] = {
    "DL_TASK": [
        # Partial, so that documents with no, negative or textual ids can each be inserted, and be rejected with a code.
        IndexModel("task_id", unique=True, partialFilterExpression={"task_id": {"$gte": 0}}, name="task_id"),
        # Claim and sweep; the device fields let a claim pass over tasks that do not fit without fetching them.
        IndexModel(
            [
                ("status", ASCENDING),
                ("priority", DESCENDING),
                ("create_time", ASCENDING),
                ("param_request.device_type", ASCENDING),
                ("param_request.device_num", ASCENDING),
            ],
            name="queue",
            # Not of documents as clients write them, nor of rejected ones: MongoDB refuses to index two lists of one
            # document, and a client would get a driver's error instead of a code.
            partialFilterExpression={"error_code": 0},
        ),
        # Finds copies of admitted documents from the index alone (see `Tasks.copied_keys`).
        IndexModel([("admitted_id", ASCENDING), ("_id", ASCENDING)], name="admitted"),
        # Counts and pages by state, for people, newest first; rejected ones too, which `queue` does not hold. One field
        # that clients may make a list, and no more: MongoDB refuses to index two lists of one document.
        IndexModel([("status", ASCENDING), ("_id", DESCENDING)], name="state"),
        # The janitor asks whether any task still runs on a message.
        IndexModel("json_mongodb_id", sparse=True, name="message"),
    ],
    "IMG_INFO": [IndexModel([("dataset", ASCENDING), ("split", ASCENDING), ("_id", ASCENDING)], name="dataset")],
    "IMG_LAB_INFO": [IndexModel([("img_id", ASCENDING), ("_id", ASCENDING)], name="img_id")],
    "DL_MODEL": [
        IndexModel([("model_name", ASCENDING), ("version", DESCENDING)], unique=True, name="version"),
        IndexModel("task_id", unique=True, name="task_id"),
    ],
    "DL_TEST_RESULT": [
        IndexModel(
            [("task_id", ASCENDING), ("attempt", ASCENDING), ("img_id", ASCENDING)], unique=True, name="task_image"
        )
    ],
    "DL_WORKER": [IndexModel("renewed_at", expireAfterSeconds=60, name="expiry")],
}


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
        self.db = client.get_database(name, codec_options=CODEC, write_concern=WriteConcern(w="majority", j=True))
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
            unreadable = Unreadable(f"a document is no valid BSON: {error}")
            self._failed(unreadable)
            raise unreadable from None
        except OverflowError as error:
            # What PyMongo 4.20 raises once it has tried a thousand times within an operation's time, as it can while
            # each connection is closed at once (`helpers_shared._backoff`). BSON's own has other words.
            if "to float" not in str(error):
                raise
            again = AutoReconnect("the connection was closed again and again")
            self._failed(again)
            raise again from None
        except PyMongoError as error:
            self._failed(error)
            raise
        return result

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
            return await self.call(self._session.with_transaction, body)

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

    async def create_indexes(self, *names: str) -> None:
        """Create what is missing, in these collections or in all.

        Raises StartupError that names the duplicates which stand against a unique index.
        """
        if problems := await self.mend_indexes(*names):
            raise StartupError("; ".join(problems))

    async def mend_indexes(self, *names: str) -> list[str]:
        """Create what is missing, as far as it goes; returns why some could not be, and what to do about it."""
        problems = []
        for name in names or INDEXES:
            there = await self.call(self.collection(name).index_information)
            for index in INDEXES[name]:
                # Who only finds them needs no right to create them.
                if _is_there(index, there):
                    continue
                try:
                    await self.call(self.collection(name).create_indexes, [index])
                except OperationFailure as error:
                    problems.append(await self._why_no_index(name, index, error))
                    if error.code == _UNAUTHORIZED:
                        break  # nor any other of this collection
        return problems

    async def _why_no_index(self, name: str, index: IndexModel, error: OperationFailure) -> str:
        if error.code == _DUPLICATE_KEY:
            return await self._duplicates(name, index)
        fix = "let a user create it that may (docs/security.md)" if error.code == _UNAUTHORIZED else "mend that"
        return f"cannot create index {name}.{index.document['name']}: {brief(error)}; {fix}"

    async def missing_indexes(self) -> list[str]:
        """`COLLECTION.index` of each index that `create_indexes` would make."""
        missing = []
        for name, indexes in INDEXES.items():
            there = await self.call(self.collection(name).index_information)
            missing += [f"{name}.{index.document['name']}" for index in indexes if index.document["name"] not in there]
        return missing

    async def _duplicates(self, name: str, index: IndexModel) -> str:
        fields = list(index.document["key"])
        cursor = await self.call(
            self.collection(name).aggregate,
            [
                {"$match": index.document.get("partialFilterExpression", {})},
                {"$group": {"_id": {field: f"${field}" for field in fields}, "count": {"$sum": 1}}},
                {"$match": {"count": {"$gt": 1}}},
                {"$limit": 10},
            ],
            allowDiskUse=True,
        )
        found = await self.call(cursor.to_list)
        values = "; ".join(
            ", ".join(f"{field} {row['_id'].get(field)}" for field in fields) + f" in {row['count']} documents"
            for row in found
        )
        return f"{name} has duplicates of what must be unique: {values}; remove or renumber them"


def away(error: StoreError) -> bool:
    """Whether the server could not be reached, or has no primary: any other operation would meet the same."""
    return isinstance(error, ConnectionFailure)


def _is_there(index: IndexModel, there: Mapping[str, Any]) -> bool:
    """Whether `there`, a collection's index_information, has exactly this index; the server judges any other."""
    wanted = {**index.document, "key": list(index.document["key"].items())}
    found = there.get(wanted.pop("name"), {})
    return {option: value for option, value in found.items() if option != "v"} == wanted


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
