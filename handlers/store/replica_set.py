"""A one-node replica set: the smallest server with change streams and transactions, for one machine's own use."""

from typing import Any

from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

#: The name of the set, in its configuration and in the URI.
SET_NAME = "rs0"

# https://github.com/mongodb/mongo/blob/master/src/mongo/base/error_codes.yml
_NOT_YET_INITIALIZED = 94
_INVALID_REPLICA_SET_CONFIG = 93


def uri_of(port: int) -> str:
    """Return the URI of the set whose one member listens on ``127.0.0.1:port``.

    It names the set instead of asking for a direct connection: a client then waits for the election after a start,
    where a direct one would be answered "not primary".
    """
    return f"mongodb://127.0.0.1:{port}/?replicaSet={SET_NAME}"


def become_primary(port: int, pid: int, *, timeout_seconds: float = 2.0) -> bool:
    """Take the server on ``127.0.0.1:port`` one step towards being the primary of its own one-node set.

    Call it until it returns True; it is harmless to repeat, and blocks for a few times ``timeout_seconds`` at most.
    Nothing is done to a server whose process id is not ``pid``: somebody else's may listen on the port by then.

    Returns:
        Whether the server accepts writes now.

    Raises:
        RuntimeError: the server can never become the primary (its data belong to a set of another name, say).
    """
    timeout_ms = int(timeout_seconds * 1000)
    client: MongoClient[dict[str, Any]]
    with MongoClient(
        "127.0.0.1",
        port,
        directConnection=True,
        serverSelectionTimeoutMS=timeout_ms,
        connectTimeoutMS=timeout_ms,
        socketTimeoutMS=timeout_ms,
    ) as client:
        try:
            if client.admin.command("serverStatus", repl=0, metrics=0, wiredTiger=0)["pid"] != pid:
                return False
            if client.admin.command("hello").get("isWritablePrimary"):
                return True
            _configure(client, f"127.0.0.1:{port}")
        except OperationFailure as error:
            if error.code == _INVALID_REPLICA_SET_CONFIG:
                raise RuntimeError(f"MongoDB on port {port} refuses the replica set {SET_NAME!r}: {error}") from error
        except PyMongoError:
            pass  # Not listening yet, or busy with its own start: the caller asks again.
    return False


def _configure(client: MongoClient[dict[str, Any]], host: str) -> None:
    """Make ``host`` the set's only member, in a new set or in the one its data directory remembers."""
    try:
        config = client.admin.command("replSetGetConfig")["config"]
    except OperationFailure as error:
        if error.code != _NOT_YET_INITIALIZED:
            raise
        config = {"_id": SET_NAME, "members": [{"_id": 0, "host": host}]}
        client.admin.command("replSetInitiate", config)
        return
    if [member["host"] for member in config["members"]] != [host]:
        # The same data on another port: the server does not find itself in the old configuration and stays in state
        # REMOVED, where only a forced change is taken.
        config["members"] = [{**config["members"][0], "host": host}]
        config["version"] += 1
        client.admin.command("replSetReconfig", config, force=True)
