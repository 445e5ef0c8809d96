"""Why a MongoDB server cannot be used: one line that says what is wrong and what to mend, for whoever starts dltask."""

import re
from collections.abc import Mapping
from typing import Any

from pymongo import AsyncMongoClient
from pymongo.errors import PyMongoError
from pymongo.uri_parser import parse_uri

#: The wire version of MongoDB 5.0 (https://github.com/mongodb/specifications, server wire version).
OLDEST_WIRE_VERSION = 13

#: The server's, and that of MongoDB Atlas.
_AUTHENTICATION_FAILED = (18, 8000)
_UNAUTHORIZED = 13

#: Hosts of a URI that are asked one by one, and milliseconds for each of them.
_ASKED, _PATIENCE_MS = 3, 2000

_INITIATE = "`mongosh --host {host} --port {port} --eval 'rs.initiate()'`"


def why_unusable(text: str, code: Any = None) -> str:
    """One line for an error with this text and code: why the server cannot be used, and what to mend in the URI."""
    if code in _AUTHENTICATION_FAILED:
        return (
            "MongoDB refuses the user: authentication failed; check user, password and authSource (the database that "
            "the user was created in) in DLTASK_MONGODB_URI"
        )
    if code == _UNAUTHORIZED:
        return f"MongoDB wants a user: {text}; expected DLTASK_MONGODB_URI with user:password@ and authSource"
    if untrusted := re.search(r"certificate verify failed: (.*?)\.?( \(_ssl|$)", text):
        return (
            f"MongoDB's certificate is not trusted: {untrusted[1]}; check tlsCAFile in DLTASK_MONGODB_URI, the file of "
            "the authority that signed it, and that the host is named as in the certificate"
        )
    if re.search("connection (is already )?closed|onnection reset", text):
        return (
            f"MongoDB does not answer: {text}; check DLTASK_MONGODB_URI: a server that requires TLS closes connections "
            "without it (tls=true)"
        )
    if "SSL handshake failed" in text:
        return f"MongoDB speaks no TLS: {text}; leave tls=true out of DLTASK_MONGODB_URI, or set the server up for it"
    if too_old := re.search(r"Server at (\S+) reports wire version", text):
        return f"MongoDB at {too_old[1]} is older than 5.0; expected 5.0 or newer: upgrade the server"
    if re.search(r"\[Errno -\d+\]|getaddrinfo|No address associated|DNS query name does not exist", text):
        return (
            f"MongoDB does not answer: no such host: {text}; check the host in DLTASK_MONGODB_URI, and that its name "
            "resolves here"
        )
    if re.search("Connect call failed|Connection refused", text):
        return (
            f"MongoDB does not answer: nothing listens there: {text}; check host and port in DLTASK_MONGODB_URI, and "
            "that mongod runs and listens on that address (net.bindIp)"
        )
    if "timed out" in text:
        return (
            f"MongoDB does not answer in time: {text}; check the host in DLTASK_MONGODB_URI, and that no firewall or "
            "NetworkPolicy is between"
        )
    return f"MongoDB does not answer: {text}; check DLTASK_MONGODB_URI"


async def why_no_primary(uri: str) -> str | None:
    """One line for a server that answers and yet is none to work with, asked of each host by itself; else None."""
    if uri.startswith("mongodb+srv:"):
        return None  # Reading it asks the name service, and who publishes a set there has one.
    try:
        parsed = parse_uri(uri, warn=False)
    except (PyMongoError, ValueError, OSError):
        return None
    options: Mapping[str, Any] = parsed["options"]
    tls = {name: value for name, value in options.items() if name.lower().startswith("tls")}
    wanted = next((value for name, value in options.items() if name.lower() == "replicaset"), None)
    for host, port in parsed["nodelist"][:_ASKED]:
        client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(
            host, port, directConnection=True, timeoutMS=_PATIENCE_MS, connectTimeoutMS=_PATIENCE_MS, **tls
        )
        try:
            hello = await client.admin.command("hello")
        except PyMongoError:
            continue
        finally:
            await client.close()
        if reason := _what_is_wrong(hello, host, port, wanted):
            return reason
    return None


def _what_is_wrong(hello: Mapping[str, Any], host: str, port: Any, wanted: Any) -> str | None:
    name, primary = hello.get("setName"), hello.get("primary")
    if name is None:
        return no_replica_set(host, port, initiated=not hello.get("isreplicaset"), name=wanted)
    if wanted is not None and wanted != name:
        return (
            f"the replica set of MongoDB at {host}:{port} is called {name!r}; DLTASK_MONGODB_URI says "
            f"replicaSet={wanted}: expected replicaSet={name}"
        )
    if primary is None:
        return (
            f"the replica set {name!r} has no primary; more than half of its members must be up and reach each other: "
            f"see `mongosh --host {host} --port {port} --eval 'rs.status()'`"
        )
    if primary != f"{host}:{port}":
        return (
            f"the primary of the replica set {name!r} calls itself {primary}, and does not answer from here under that "
            "name; make it resolve and reachable, or change the member's name (rs.reconfig)"
        )
    return None


def no_replica_set(host: Any, port: Any, *, initiated: bool, name: Any = None) -> str:
    """One line for a server of its own; `initiated` is false for one that waits to be made a set."""
    initiate = _INITIATE.format(host=host, port=port)
    if not initiated:
        return f"the replica set of MongoDB at {host}:{port} has never been initiated; run {initiate} once"
    return (
        f"MongoDB at {host}:{port} runs without a replica set, which change streams need; start it as "
        f"`mongod --replSet {name or 'rs0'} …` and run {initiate} once (one member is enough)"
    )
