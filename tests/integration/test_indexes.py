"""Starting: indexes are made once, and what stands in the way is one clear line and exit code 2."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bson import Decimal128, Int64
from pymongo import ASCENDING, MongoClient
from pymongo.database import Database
from pymongo.errors import PyMongoError

from handlers.errors import StartupError
from handlers.store import Store, connect_store
from handlers.store.database import connect, masked
from handlers.store.indexes import INDEXES
from service.embedded import find_mongod
from tests.helpers import wait_for

Db = Database[dict[str, Any]]


async def test_indexes_are_made_once(store: Store, db: Db) -> None:
    """A second start changes nothing; the unique ones are those that the rules rest on."""
    before = {name: db[name].index_information() for name in INDEXES}
    await store.indexes.create()
    assert {name: db[name].index_information() for name in INDEXES} == before
    assert await store.indexes.missing() == []
    unique = {
        (name, *(field for field, _ in index["key"]))
        for name, indexes in before.items()
        for index in indexes.values()
        if index.get("unique")
    }
    assert unique == {
        ("DL_TASK", "task_id"),
        ("DL_MODEL", "model_name", "version"),
        ("DL_MODEL", "task_id"),
        ("DL_TEST_RESULT", "task_id", "attempt", "img_id"),
    }
    assert before["DL_WORKER"]["expiry"]["expireAfterSeconds"] == 60


async def test_several_workers_can_start_at_once(mongo_uri: str, database_name: str) -> None:
    """Eight at the same moment on an empty database."""
    import anyio

    async def start() -> None:
        async with connect_store(mongo_uri, database_name) as store:
            await store.indexes.create()
            assert await store.indexes.missing() == []

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(start)


async def test_duplicates_are_named(mongo_uri: str, database_name: str, db: Db) -> None:
    """Each table's duplicates: field, value and how many; numbers of other types are the same number."""
    db.DL_TASK.insert_many([{"task_id": t} for t in (7, Int64(7), 7.0, Decimal128(str(2**64 - 1)), -1, -1, "x", "x")])
    async with connect_store(mongo_uri, database_name) as store:
        with pytest.raises(StartupError) as refused:
            await store.indexes.create()
        assert "DL_TASK has duplicates" in str(refused.value)
        assert "task_id 7 in 3 documents" in str(refused.value)
        assert "-1" not in str(refused.value)
        assert "\n" not in str(refused.value)
        db.DL_MODEL.drop()
        db.DL_MODEL.insert_many([{"model_name": "m", "version": 2, "task_id": number} for number in range(2)])
        with pytest.raises(StartupError, match=r"task_id 7 in 3 .*; .*model_name m, version 2 in 2 documents"):
            await store.indexes.create()
        db.DL_TASK.delete_many({})
        db.DL_MODEL.delete_many({})
        await store.indexes.create()


async def test_what_can_be_made_is_made(mongo_uri: str, database_name: str, db: Db) -> None:
    """One index that cannot be made keeps none of the others from it, and is named with what to do."""
    db.DL_TASK.insert_many([{"task_id": 7}, {"task_id": 7}])
    async with connect_store(mongo_uri, database_name) as store:
        (problem,) = await store.indexes.mend()
        assert "task_id 7 in 2 documents; remove or renumber them" in problem
        assert await store.indexes.missing() == ["DL_TASK.task_id"]


async def test_an_index_of_the_same_name_that_is_another_one(mongo_uri: str, database_name: str, db: Db) -> None:
    """Somebody made it by hand, otherwise: its name is in the message."""
    db.DL_TASK.create_index([("priority", ASCENDING)], name="queue")
    async with connect_store(mongo_uri, database_name) as store:
        with pytest.raises(StartupError, match=r"cannot create index DL_TASK\.queue"):
            await store.indexes.create()


# ---- as an operator sees it

Serve = Callable[[str], tuple[int, str]]

#: An operation gives up after 20 s; a second is enough to see how.
_SHORT = "import handlers.store.database as d; d.OPERATION_TIMEOUT_MS = 1000; from service.cli.main import main; main()"


@pytest.fixture
def serve_at(dltask_env: dict[str, str]) -> Serve:
    """Runs `dltask serve` to its end; returns the exit code and all that it printed."""

    def run(uri: str) -> tuple[int, str]:
        env = dltask_env | {"DLTASK_MONGODB_URI": uri, "DLTASK_LOG_FORMAT": "json"}
        done = subprocess.run(
            [sys.executable, "-c", _SHORT, "serve"], env=env, capture_output=True, text=True, timeout=60, check=False
        )
        return done.returncode, done.stdout + done.stderr

    return run


def reason(printed: str) -> str:
    """The reason in the one line that was printed."""
    lines = printed.splitlines()
    assert len(lines) == 1, printed
    line = json.loads(lines[0])
    assert (line["event"], line["level"]) == ("cannot start", "error")
    found: str = line["reason"]
    assert "\n" not in found
    return found


def test_duplicates_end_the_start(serve_at: Serve, mongo_uri: str, db: Db) -> None:
    """Exit code 2, and one line that names them."""
    db.DL_TASK.insert_many([{"task_id": 5}, {"task_id": 5}])
    code, printed = serve_at(mongo_uri)
    assert code == 2
    assert "DL_TASK has duplicates of what must be unique: task_id 5 in 2 documents" in reason(printed)


@pytest.fixture
def standalone(tmp_path: Path) -> Iterator[str]:
    """The URI of a server without a replica set."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "data").mkdir()
    command = [str(find_mongod()), "--dbpath", str(tmp_path / "data"), "--port", str(port), "--bind_ip", "127.0.0.1"]
    command += ["--nounixsocket", "--quiet", "--wiredTigerCacheSizeGB", "0.25"]
    with (tmp_path / "mongod.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        uri = f"mongodb://127.0.0.1:{port}/"

        def answers() -> bool:
            with MongoClient(uri, serverSelectionTimeoutMS=200) as client:
                try:
                    return bool(client.admin.command("ping"))
                except PyMongoError:
                    return False

        try:
            wait_for(answers, 60)
            yield uri
        finally:
            process.kill()


def test_a_server_without_a_replica_set(serve_at: Serve, standalone: str) -> None:
    """Exit code 2, and what to do about it."""
    code, printed = serve_at(standalone)
    assert code == 2
    assert "without a replica set" in reason(printed)
    assert "rs.initiate()" in reason(printed)


SECRET = "s3cr%21t/w0rd"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        (f"mongodb://me:{SECRET.replace('/', '%2F')}@127.0.0.1:1/?replicaSet=rs0", "MongoDB does not answer"),
        (f"mongodb://me:{SECRET}@127.0.0.1:1/", "not a MongoDB URI"),
        (f"mongodb://me:{SECRET.replace('/', '@:')}@127.0.0.1:port/", "not a MongoDB URI"),
        ("http://127.0.0.1:27017", "not a MongoDB URI"),
    ],
    ids=["nobody there", "unescaped", "no port", "no scheme"],
)
def test_a_uri_that_leads_nowhere(serve_at: Serve, uri: str, words: str) -> None:
    """Exit code 2, one line, and no part of the password in it."""
    code, printed = serve_at(uri)
    assert code == 2
    assert words in reason(printed)
    assert "DLTASK_MONGODB_URI" in reason(printed)
    assert "s3cr" not in printed
    assert "w0rd" not in printed


def test_a_wrong_password(serve_at: Serve, mongo_uri: str) -> None:
    """The server's refusal, without the password."""
    code, printed = serve_at(mongo_uri.replace("://", "://me:s3cr%21t@"))
    assert code == 2
    assert "uthentication" in reason(printed)
    assert "s3cr" not in printed


@pytest.mark.parametrize(
    ("uri", "forms"),
    [
        ("mongodb://me:pa%40ss%2Fw@h/?x=1", ["pa%40ss%2Fw", "pa@ss/w"]),
        ("mongodb://me:pa@ss:w@h:1,g:2/db", ["pa@ss:w"]),
        ("mongodb+srv://me:pa+ss@no.such.host.invalid/", ["pa+ss", "pa ss"]),
        ("mongodb://h/?tls=true&tlsCertificateKeyFilePassword=pem-word&x=1", ["pem-word"]),
        ("mongodb://k:v@h/?authMechanismProperties=AWS_SESSION_TOKEN:tok-en&authMechanism=MONGODB-AWS", ["tok-en"]),
    ],
)
def test_a_password_is_masked_in_every_form(uri: str, forms: list[str]) -> None:
    """Escaped, unescaped, with an @ in it, in a URI that needs the name service, in an option."""
    for form in [*forms, uri]:
        text = masked(f"before {form} after", uri)
        assert text.startswith("before ")
        assert text.endswith(" after")
        assert "***" in text
        assert not any(secret in text for secret in forms)


def test_a_uri_without_a_password_masks_nothing() -> None:
    """No text is changed by chance."""
    for uri in ("", "mongodb://127.0.0.1:27017/?replicaSet=rs0", "mongodb://me@h/", "mongodb://me:@h/"):
        assert masked(f"the text {uri}", uri) == f"the text {uri}"


async def test_a_server_that_is_too_old_or_no_primary(
    mongo_uri: str, database_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5.0 is the oldest that has what is used."""
    async with connect(mongo_uri, database_name) as database:
        await database.check()

        async def old(*args: Any) -> dict[str, Any]:
            return {"setName": "rs0", "maxWireVersion": 9, "version": "4.4.29"}

        monkeypatch.setattr(database, "call", old)
        with pytest.raises(StartupError, match=r"^MongoDB is 4\.4\.29; expected 5\.0 or newer"):
            await database.check()
