"""The embedded MongoDB: it accepts writes, keeps its data, stops when we do, and says what is wrong."""

import os
import select
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
from pymongo import MongoClient
from pymongo.monitoring import CommandListener, CommandStartedEvent, register

from handlers.store.database import connect
from service import embedded
from service.embedded import EmbeddedMongoError, embedded_mongo

pytestmark = pytest.mark.anyio


class _Commands(CommandListener):
    """Keeps what is sent to one database, by the command's name. Nobody can take a listener off again."""

    def __init__(self, database: str) -> None:
        self.sent: defaultdict[str, list[Any]] = defaultdict(list)
        self._database = database

    def started(self, event: CommandStartedEvent) -> None:
        # A transaction is committed in `admin`, where others are busy too.
        if event.database_name == self._database or event.command_name == "commitTransaction":
            self.sent[event.command_name].append(dict(event.command))

    def succeeded(self, event: Any) -> None:
        """Of no interest."""

    def failed(self, event: Any) -> None:
        """Of no interest."""


def _insert_and_count(uri: str) -> int:
    with MongoClient(uri) as client:
        client.kept.things.insert_one({})
        return client.kept.things.count_documents({})


def _server_pid(uri: str) -> int:
    with MongoClient(uri) as client:
        return int(client.admin.command("serverStatus")["pid"])


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def test_it_is_a_replica_set_with_change_streams_and_transactions(mongo_uri: str, database_name: str) -> None:
    """The two things the service needs a replica set for work at once, with the URI as it is handed out."""

    def use() -> str:
        with MongoClient(mongo_uri) as client:
            things = client[database_name].things
            with things.watch() as stream, client.start_session() as session:
                session.with_transaction(lambda s: things.insert_one({"n": 1}, session=s))
                return str(next(stream)["operationType"])

    assert await anyio.to_thread.run_sync(use) == "insert"


async def test_the_options_of_the_uri_hold_for_no_transaction(mongo_uri: str, database_name: str) -> None:
    """Nor for any other operation: reads of the primary, writes that a majority has."""
    commands = _Commands(database_name)
    register(commands)
    async with connect(f"{mongo_uri}&readPreference=secondaryPreferred&w=1", database_name) as database:
        things = database.collection("things")

        async def body(session: Any) -> None:
            await things.find_one({}, session=session)
            await things.insert_one({"n": 1}, session=session)

        await database.transaction(body)
        await database.call(things.insert_one, {"n": 2})
    inserted, committed, alone = (commands.sent[name] for name in ("insert", "commitTransaction", "insert"))
    assert [command["n"] for command in (inserted[0]["documents"][0], alone[1]["documents"][0])] == [1, 2]
    for command in (committed[0], alone[1]):
        assert command["writeConcern"] == {"w": "majority", "j": True}


async def test_data_survive_a_restart_on_another_port(tmp_path: Path) -> None:
    """A named data directory keeps its documents, whatever port it is served on the next time."""
    counts, ports = [], set()
    port = 0
    for _ in range(3):  # The third time on the second's port: nothing is left to re-configure.
        async with embedded_mongo(port, data_dir=tmp_path / "data") as uri:
            counts.append(await anyio.to_thread.run_sync(_insert_and_count, uri))
            ports.add(uri)
            port = int(uri.split(":")[2].split("/")[0]) if len(ports) == 2 else 0
    assert counts == [1, 2, 3]
    assert len(ports) == 2


async def test_a_temporary_directory_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a data directory nothing stays behind on the disk."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    async with embedded_mongo():
        assert _names(tmp_path)
    assert not _names(tmp_path)


async def test_data_in_use_are_refused(tmp_path: Path) -> None:
    """A second server on the same data ends with a message that names them; the first goes on."""
    async with embedded_mongo(data_dir=tmp_path) as uri:
        with pytest.raises(EmbeddedMongoError, match=rf"{tmp_path} is in use by another MongoDB server"):
            async with embedded_mongo(data_dir=tmp_path):
                pass
        assert await anyio.to_thread.run_sync(_insert_and_count, uri) == 1


async def test_a_taken_port_is_named() -> None:
    """A port that was asked for and is taken is an error, never silently another port."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(EmbeddedMongoError, match=f"port {port} on 127.0.0.1 is taken"):
            async with embedded_mongo(port):
                pass


async def test_a_cancelled_start_leaves_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C before the server is ready stops the server too: the data are free at once."""
    scope = anyio.CancelScope()
    with monkeypatch.context() as patch, scope:

        def cancel_instead(port: int, pid: int) -> bool:
            anyio.from_thread.run_sync(scope.cancel)
            return False

        patch.setattr("handlers.store.replica_set.become_primary", cancel_instead)
        async with embedded_mongo(data_dir=tmp_path):
            pytest.fail("the server was ready before it was cancelled")
    assert scope.cancelled_caught
    async with embedded_mongo(data_dir=tmp_path) as uri:
        assert await anyio.to_thread.run_sync(_insert_and_count, uri) == 1


def test_a_killed_parent_leaves_no_server(tmp_path: Path) -> None:
    """SIGKILL gives us no time to stop the server: the kernel does it."""
    code = f"""
import anyio, pathlib
from service.embedded import embedded_mongo
async def main():
    async with embedded_mongo(data_dir=pathlib.Path({str(tmp_path)!r})) as uri:
        print(uri, flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server = os.pidfd_open(_server_pid(parent.stdout.readline().strip()))
        try:
            assert not select.select([server], [], [], 0)[0], "the server ended before its parent"
            parent.kill()
            assert select.select([server], [], [], 60)[0], "the server still runs 60 s after its parent's end"
        finally:
            os.close(server)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'exploded' >&2; exit 3", r"ended with code 3; the last lines of .*mongod\.log:\n  exploded"),
        (
            "echo 'mongod: error while loading shared libraries: libcurl.so.4: cannot open shared object file' >&2; "
            "exit 127",
            r"libcurl\.so\.4, which is missing: apt-get install libcurl4",
        ),
    ],
)
async def test_a_server_that_does_not_start_says_why(
    script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error quotes the server's own last words, or names the Debian package that is missing."""
    mongod = tmp_path / "mongod"
    mongod.write_text(f"#!/bin/sh\n{script}\n")
    mongod.chmod(0o755)
    monkeypatch.setattr(embedded, "_WHEEL", "no-such-wheel")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(EmbeddedMongoError, match=message):
        async with embedded_mongo(data_dir=tmp_path / "data"):
            pass


def test_no_server_at_all_names_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no mongod can be found, the message names DLTASK_MONGODB_URI."""
    monkeypatch.setattr(embedded, "_WHEEL", "no-such-wheel")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedMongoError, match="DLTASK_MONGODB_URI"):
        embedded.find_mongod()
