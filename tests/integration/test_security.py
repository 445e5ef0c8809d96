"""MongoDB as it is run in earnest: TLS, users, the least privileges; and what must not get out of the service."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from bson import ObjectId
from gridfs import GridFSBucket
from pymongo import MongoClient
from pymongo.database import Database
from pymongo.errors import OperationFailure

from handlers.errors import StartupError
from handlers.store.database import connect
from handlers.store.privileges import WORKER
from tests.helpers import STANDIN, Service, ended, running, train_request, wait_for
from tests.integration.secured import Secured, make_authority, secured_mongo
from tests.scrape import address, scrape

Db = Database[dict[str, Any]]
#: Starts a service as the user `worker`, with more settings and variables of the environment.
Serve = Callable[..., Service]
#: Runs `dltask` as some user; returns exit code, stdout and stderr.
Dltask = Callable[..., tuple[int, str, str]]

ROLES = Path(__file__).resolve().parents[2] / "docs" / "roles.json"
PASSWORDS = {
    "worker": "w0rker/s3cr@t:pass",
    "client": "cl1ent-password",
    "importer": "imp0rter-password",
    "nobody": "n0body-password",
}
#: Each part of the worker's password, in any form.
PARTS = re.compile("w0rker|s3cr|t:pass|t%3Apass")

#: An operation gives up after 20 s; a second is enough to see how.
_SHORT = "import handlers.store.database as d; d.OPERATION_TIMEOUT_MS = 1000; from service.cli.main import main; main()"


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """The server, with the roles of docs/roles.json and a user for each."""
    with secured_mongo(tmp_path_factory.mktemp("secured")) as server:
        with MongoClient(server.admin_uri) as client:
            for command in json.loads(ROLES.read_text()):
                client.dl.command(command)
            for user, password in PASSWORDS.items():
                roles = {"worker": ["dltaskWorker"], "client": ["dltaskClient"], "importer": ["dltaskImport"]}
                client.dl.command("createUser", user, pwd=password, roles=roles.get(user, []))
        yield server


@pytest.fixture
def db(secured: Secured) -> Iterator[Db]:
    """The database `dl` as its administrator sees it: new, with the indexes that docs/roles.json makes."""
    with MongoClient(secured.admin_uri, tz_aware=True) as client:
        client.drop_database("dl")
        for command in json.loads(ROLES.read_text()):
            if "createIndexes" in command:
                client.dl.command(command)
        yield client.dl


@pytest.fixture
def images(db: Db) -> list[ObjectId]:
    """Three images of the data set `toy`, with a label each."""
    ids = []
    for number in range(3):
        file_id = GridFSBucket(db, "images").upload_from_stream(f"{number}.jpg", b"not really a picture")
        image = {"file_name": f"{number}.jpg", "width": 32, "height": 32, "file_id": file_id, "dataset": "toy"}
        image_id = db.IMG_INFO.insert_one({**image, "split": "train"}).inserted_id
        db.IMG_LAB_INFO.insert_one({"img_id": image_id, "class_name": "a", "bbox": [1, 1, 8, 8]})
        ids.append(image_id)
    return ids


def uri_of(secured: Secured, user: str, **options: Any) -> str:
    return secured.uri(user, PASSWORDS[user], source="dl", **options)


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """What every process gets; the URI comes by itself."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DLTASK_")}
    return inherited | {"DLTASK_CACHE_DIR": str(tmp_path / "cache"), "DLTASK_LOG_FORMAT": "json"}


@pytest.fixture
def serve(secured: Secured, db: Db, env: dict[str, str], tmp_path: Path) -> Iterator[Serve]:
    """Services end with the test. The URI is in a file, as secrets are mounted, unless `uri_in_file` is false."""
    started: list[Service] = []
    secret = tmp_path / "uri"
    secret.write_text(uri_of(secured, "worker") + "\n")
    with contextlib.ExitStack() as files:

        def start(*, uri_in_file: bool = True, **variables: str) -> Service:
            uri = {"DLTASK_MONGODB_URI_FILE": str(secret)}
            if not uri_in_file:
                uri = {"DLTASK_MONGODB_URI": uri_of(secured, "worker")}
            settings = {"DLTASK_CHILD_COMMAND": STANDIN, "DLTASK_SWEEP_SECONDS": "1", "DLTASK_GRACE_SECONDS": "5"}
            log = tmp_path / f"service-{len(started)}.log"
            out = files.enter_context(log.open("wb"))
            process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", "serve"],
                env={**env, **uri, **settings, "STANDIN_LOG": str(tmp_path / "children.jsonl"), **variables},
                stderr=out,
            )
            started.append(Service(process, log))
            wait_for(lambda: "service ready" in log.read_text() or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            return started[-1]

        yield start
        for service in started:
            if service.process.poll() is None:
                service.stop()


@pytest.fixture
def dltask(secured: Secured, db: Db, env: dict[str, str]) -> Dltask:
    """See Dltask."""

    def run(user: str, *arguments: Any) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "service.cli", *map(str, arguments)],
            env={**env, "DLTASK_MONGODB_URI": uri_of(secured, user)},
            **{"capture_output": True, "text": True, "timeout": 120, "check": False},
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    return run


# ---- a start that cannot succeed


def reason(env: dict[str, str], uri: str) -> str:
    """Why `dltask serve` ended: the one line that it printed, with exit code 2 and no part of the password."""
    done = subprocess.run(
        [sys.executable, "-c", _SHORT, "serve"],
        env={**env, "DLTASK_MONGODB_URI": uri},
        **{"capture_output": True, "text": True, "timeout": 60, "check": False},
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 2, printed
    assert len(printed.splitlines()) == 1, printed
    assert not PARTS.search(printed.replace("'worker'", "")), printed
    line = json.loads(printed)
    assert (line["event"], line["level"]) == ("cannot start", "error")
    return str(line["reason"])


def test_a_user_that_is_refused(secured: Secured, env: dict[str, str]) -> None:
    """A wrong password and a wrong authSource look the same to the server: both are named."""
    for uri in (
        secured.uri("worker", "w0rker-wr0ng", source="dl"),
        secured.uri("worker", PASSWORDS["worker"], source="admin"),
    ):
        said = reason(env, uri)
        assert said.startswith("MongoDB refuses the user: authentication failed; check user, password and authSource")
        assert said.endswith("in DLTASK_MONGODB_URI")


def test_no_user_at_all(secured: Secured, env: dict[str, str]) -> None:
    """A server with access control tells so only when it is asked for something."""
    uri = re.sub("//.*@", "//", uri_of(secured, "worker")).replace("authSource=dl&", "")
    said = reason(env, uri)
    assert "requires authentication" in said
    assert "expected DLTASK_MONGODB_URI with user:password@ and authSource" in said


def test_a_certificate_of_an_unknown_authority(secured: Secured, env: dict[str, str], tmp_path: Path) -> None:
    """Signed by somebody else, or signed for another host."""
    stranger = make_authority(tmp_path / "stranger")
    said = reason(env, uri_of(secured, "worker", authority=stranger))
    assert said.startswith("MongoDB's certificate is not trusted: ")
    assert "check tlsCAFile in DLTASK_MONGODB_URI" in said
    said = reason(env, uri_of(secured, "worker").replace("@127.0.0.1", "@localhost"))
    assert "not valid for 'localhost'" in said
    assert "the host is named as in the certificate" in said


def test_an_authority_that_cannot_be_read(secured: Secured, env: dict[str, str], tmp_path: Path) -> None:
    """No such file, or one that is no certificate."""
    said = reason(env, uri_of(secured, "worker", authority=tmp_path / "nowhere.pem"))
    assert f"{tmp_path}/nowhere.pem: No such file or directory" in said
    assert "expected PEM files that can be read as tlsCAFile" in said
    (tmp_path / "text.pem").write_text("no certificate")
    assert "certificate that cannot be used" in reason(env, uri_of(secured, "worker", authority=tmp_path / "text.pem"))


def test_no_tls(secured: Secured, env: dict[str, str]) -> None:
    """The server closes the connection without a word, so the message says what that can mean."""
    said = reason(env, uri_of(secured, "worker").partition("&tls=")[0])
    assert re.search("closed|reset", said)
    assert "tls=true" in said


def test_a_user_without_privileges(secured: Secured, env: dict[str, str]) -> None:
    """Some of what it may not do, and the role that would let it."""
    said = reason(env, uri_of(secured, "nobody"))
    assert said.startswith("MongoDB does not allow the user 'nobody' in the database 'dl': changeStream on the data")
    assert said.endswith("more; grant it the role dltaskWorker (docs/security.md)")


# ---- the least privileges


def role(name: str) -> dict[str, set[str]]:
    """The actions by collection of a role of docs/roles.json."""
    command = next(c for c in json.loads(ROLES.read_text()) if c.get("createRole") == name)
    assert {privilege["resource"]["db"] for privilege in command["privileges"]} == {"dl"}
    return {p["resource"]["collection"]: set(p["actions"]) for p in command["privileges"]}


def used(db: Db, user: str) -> dict[str, set[str]]:
    """The actions by collection that `user` needed for what the profiler saw of it."""
    needed: dict[str, set[str]] = {}
    for seen in db["system.profile"].find({"user": f"{user}@dl"}):
        name, command = seen["ns"].partition(".")[2], seen.get("command", {})
        first = next(iter(command), None)
        if seen["op"] == "update" or first == "findAndModify":
            needed.setdefault(name, set()).update(("update", "insert") if command.get("upsert") else ("update",))
        elif seen["op"] in ("insert", "remove"):
            needed.setdefault(name, set()).add(seen["op"])
        elif first in ("createIndexes", "listIndexes"):
            needed.setdefault(name, set()).add({"createIndexes": "createIndex"}.get(first, first))
        elif seen["op"] == "query" or first == "aggregate":
            # In the role on the whole database, as the change stream needs it.
            needed.setdefault("", set()).add("find")
        else:
            assert seen["op"] == "getmore", f"another kind of command, to be looked at here: {seen}"
    return needed


def has_change_stream(db: Db) -> bool:
    """Whether somebody holds a change stream on the database open; the profiler sees none of them."""
    operations = db.client.admin.aggregate([{"$currentOp": {"allUsers": True, "idleCursors": True}}])
    started = [operation.get("cursor", {}).get("originatingCommand", {}) for operation in operations]
    return any(command.get("aggregate") == 1 and "$changeStream" in command["pipeline"][0] for command in started)


def refusals(secured: Secured) -> int:
    """How often the server has refused anything to anybody, by its own log."""
    return secured.log.read_text().count("Checking authorization failed")


def test_the_service_under_the_least_privileges(
    secured: Secured, db: Db, images: list[ObjectId], serve: Serve, tmp_path: Path
) -> None:
    """A whole life under the role of docs/roles.json: nothing is refused, and nothing of the role is left unused.

    Over TLS as a user: admission, a rejection, a training with snapshots and pictures, a test, a cancel of a running
    and of a waiting task, a task given back and resumed, the sweep, the janitor.
    """
    db.create_collection("system.profile", capped=True, size=64 << 20)
    db.command("profile", 2)
    refused = refusals(secured)
    assert not has_change_stream(db)
    first = serve(DLTASK_HTTP_PORT="0")
    wait_for(lambda: has_change_stream(db))
    # The look at the queue that the metrics rest on.
    wait_for(lambda: scrape(address(first))("database_up"))
    db.DL_TASK.insert_one(train_request(1, model_name="pictures", iterations=201))
    db.DL_TASK.insert_one(train_request(2, iterations=-1))
    db.DL_TASK.insert_one(train_request(3))
    trained = ended(db, 1)
    assert trained["status"] == "SUCCEEDED", trained
    assert list(trained["result"]["reports"]) == ["curve"]
    assert ended(db, 2)["status"] == "REJECTED"
    assert ended(db, 3)["result"]["version"] == 1
    test = {"task_id": 4, "task_type": "TEST", "img_mongodb_ids": images}
    db.DL_TASK.insert_one({**test, "param_request": {"model_name": "pictures", "device_type": "CPU"}})
    assert ended(db, 4)["status"] == "SUCCEEDED"
    assert db.DL_TEST_RESULT.count_documents({}) == 3
    db.DL_TASK.insert_one(train_request(5, iterations=10_000))
    running(db, 5)
    db.DL_TASK.insert_one(train_request(6))
    wait_for(lambda: db.DL_TASK.find_one({"task_id": 6, "status": "PENDING"}))
    for task_id in (6, 5):
        db.DL_TASK.update_one({"task_id": task_id}, {"$set": {"cancel_requested": True}})
        assert ended(db, task_id)["status"] == "CANCELLED"
    db.DL_TASK.insert_one(train_request(7, iterations=150))
    running(db, 7)
    assert first.stop() == 0

    # What a crash leaves, for the next service's janitor. Not earlier: a bucket's first file makes its indexes.
    long_ago = trained["create_time"].replace(year=2020)
    orphan = {"uploadDate": long_ago, "metadata": {"task_id": 99, "orphan_since": long_ago}, "length": 0}
    for bucket in ("messages", "models", "reports"):
        db[f"{bucket}.files"].insert_one({**orphan, "filename": "orphan", "chunkSize": 1})
    for bucket in ("messages", "models", "reports", "images"):
        chunk = {"_id": ObjectId("5" * 24), "files_id": ObjectId(), "n": 0, "data": b"", "orphan_since": long_ago}
        db[f"{bucket}.chunks"].insert_one(chunk)
    second = serve()
    resumed = ended(db, 7)
    assert (resumed["status"], resumed["attempt"]) == ("SUCCEEDED", 2)
    assert resumed["result"]["resumed_from_iteration"]
    wait_for(lambda: '"files": 6, "event": "orphaned files removed"' in second.log.read_text())
    assert second.stop() == 0
    db.command("profile", 0)
    assert db["images.chunks"].count_documents({"_id": ObjectId("5" * 24)}) == 1

    assert refusals(secured) == refused
    logs = first.log.read_text() + second.log.read_text()
    assert "not authorized" not in logs
    assert not [line for line in logs.splitlines() if json.loads(line)["level"] == "error"]
    assert not PARTS.search(logs)
    needed = used(db, "worker")
    needed[""].add("changeStream")
    assert needed == role("dltaskWorker")


def test_the_role_is_what_the_code_asks_for() -> None:
    """The table that a start checks, and the file that an administrator applies."""
    assert role("dltaskWorker") == WORKER


async def test_each_privilege_that_is_left_out_is_named_at_the_start(secured: Secured, db: Db) -> None:
    """One at a time: a worker that could not, say, register a model would learn it only after hours of training."""
    uri = uri_of(secured, "worker")
    async with connect(uri, "dl") as database:
        await database.check()
    whole = role("dltaskWorker")

    def grant(actions: dict[str, set[str]]) -> None:
        privileges = [
            {"resource": {"db": "dl", "collection": name}, "actions": sorted(some)}
            for name, some in actions.items()
            if some
        ]
        db.command("updateRole", "dltaskWorker", privileges=privileges)

    try:
        for name, actions in whole.items():
            for action in actions:
                grant({**whole, name: actions - {action}})
                async with connect(uri, "dl") as database:
                    with pytest.raises(StartupError, match=f": {action} on {name or 'the database'}; grant it"):
                        await database.check()
    finally:
        grant(whole)


async def test_a_worker_may_end_the_session_of_another(secured: Secured, db: Db) -> None:
    """Both are the same user, so it takes no privilege. If the worker lives, its transaction begins anew."""
    async with connect(uri_of(secured, "worker"), "dl") as lost, connect(uri_of(secured, "worker"), "dl") as other:
        tries = 0

        async def body(session: Any) -> None:
            nonlocal tries
            tries += 1
            await lost.collection("DL_WORKER").insert_one({"_id": tries}, session=session)
            if tries == 1:
                await other.end_session(lost.session_id)
            await lost.collection("DL_WORKER").insert_one({"_id": "last"}, session=session)

        await lost.transaction(body)
    assert {worker["_id"] for worker in db.DL_WORKER.find()} == {2, "last"}


async def test_wider_roles_will_do_too(secured: Secured, db: Db) -> None:
    """MongoDB's own: readWrite on the database, readWriteAnyDatabase, root; but not readWrite on another one."""
    for roles, enough in (
        ([{"role": "readWrite", "db": "dl"}], True),
        ([{"role": "readWriteAnyDatabase", "db": "admin"}], True),
        ([{"role": "root", "db": "admin"}], True),
        ([{"role": "__system", "db": "admin"}], True),
        ([{"role": "readWrite", "db": "other"}], False),
        ([{"role": "read", "db": "dl"}], False),
    ):
        db.client.admin.command("createUser", "some", pwd="some-password", roles=roles)
        try:
            async with connect(secured.uri("some", "some-password"), "dl") as database:
                if enough:
                    await database.check()
                else:
                    with pytest.raises(StartupError, match="grant it the role dltaskWorker"):
                        await database.check()
        finally:
            db.client.admin.command("dropUser", "some")


def allowed(operation: Callable[..., Any], *arguments: Any, **options: Any) -> bool:
    """Whether the server lets a user do this."""
    try:
        operation(*arguments, **options)
    except OperationFailure as error:
        if error.code != 13:
            raise
        return False
    return True


def test_the_worker_cannot_change_what_belongs_to_the_platform(
    secured: Secured, db: Db, images: list[ObjectId]
) -> None:
    """Images, labels and image files are read only, also by the detour of an index or of a drop."""
    with MongoClient(uri_of(secured, "worker"), tz_aware=True) as client:
        tasks = client.dl.DL_TASK
        for name in ("IMG_INFO", "IMG_LAB_INFO", "images.files", "images.chunks"):
            table, before = client.dl[name], list(db[name].find())
            assert list(table.find()) == before
            assert not allowed(table.insert_one, {})
            assert not allowed(table.update_one, {}, {"$set": {"width": 1}})
            assert not allowed(table.replace_one, {}, {})
            assert not allowed(table.delete_one, {})
            assert not allowed(table.create_index, "seen", expireAfterSeconds=0)
            assert not allowed(table.drop)
            assert not allowed(table.rename, "gone")
            assert not allowed(tasks.aggregate, [{"$out": name}])
            assert not allowed(tasks.aggregate, [{"$merge": name}])
            assert list(db[name].find()) == before
        # Nor what a client asks for, nor other databases, nor users.
        assert not allowed(tasks.insert_one, {})
        assert not allowed(tasks.delete_one, {})
        assert not allowed(client.other.things.find_one)
        assert not allowed(client.dl.command, "createUser", "x", pwd="x", roles=[])


def test_a_client_and_an_import_under_their_roles(
    secured: Secured, db: Db, serve: Serve, dltask: Dltask, tmp_path: Path
) -> None:
    """The roles do for `dltask` what they are for, and for nothing else."""
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    for number in range(3):
        cv2.imwrite(str(source / "images" / f"{number}.png"), np.full((8, 8, 3), number, np.uint8))
    coco = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 8, "height": 8} for n in range(3)],
        "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, 4, 4]} for n in range(3)],
        "categories": [{"id": 1, "name": "a"}],
    }
    (source / "annotations.json").write_text(json.dumps(coco))
    arguments = ("dataset", "import", source, "--format", "coco", "--name", "toy")
    assert dltask("importer", *arguments)[0] == 0
    assert db.IMG_INFO.count_documents({}) == 3
    assert dltask("importer", "dataset", "export", "--format", "coco", "toy", tmp_path / "copy")[0] == 0
    code, out, err = dltask("client", *arguments, "--split", "x")
    assert (code, out) == (2, "")
    assert "not authorized" in err

    refused = refusals(secured)
    serve()
    submit = ("submit", "train", "--model-name", "pictures", "--dataset", "toy", "--param", "device_type=CPU")
    code, out, err = dltask("client", *submit, "--param", "max_num_iters=3", "--task-id", 1, "--wait", "--json")
    assert (code, json.loads(out)["status"]) == (0, "SUCCEEDED"), err
    assert dltask("client", "report", 1, tmp_path / "report")[0] == 0
    assert (tmp_path / "report" / "curve.png").read_bytes() == b"no real picture"
    assert dltask("client", "models", "export", "pictures", tmp_path / "model")[0] == 0
    assert dltask("client", "cancel", 1)[0] == 0
    for command in (("status",), ("logs", 1), ("workers",)):
        assert dltask("client", *command)[0] == 0
    assert refusals(secured) == refused

    with MongoClient(uri_of(secured, "client")) as client:
        assert not allowed(client.dl.DL_TASK.delete_one, {})
        for name in ("DL_MODEL", "DL_TEST_RESULT", "IMG_INFO", "IMG_LAB_INFO", "models.files", "images.chunks"):
            assert not allowed(client.dl[name].insert_one, {})
            assert not allowed(client.dl[name].update_one, {}, {"$set": {"x": 1}})
            assert not allowed(client.dl[name].delete_one, {})
    with MongoClient(uri_of(secured, "importer")) as client:
        assert not allowed(client.dl.DL_TASK.insert_one, {})
        assert not allowed(client.dl.DL_TASK.find_one)
        assert not allowed(client.dl.IMG_INFO.delete_one, {})


def test_a_client_that_comes_before_the_first_worker(db: Db, dltask: Dltask) -> None:
    """It may not make the index that keeps task ids unique: what to do is said, and nothing is inserted."""
    code, out, err = dltask("client", "submit", "train", "--model-name", "m", "--dataset", "toy")
    assert (code, out) == (2, "")
    assert err == (
        "dltask: cannot create index DL_TASK.task_id: not authorized on dl to execute command "
        '{ createIndexes: "DL_TASK", … }; let a user create it that may (docs/security.md)\n'
    )
    assert db.DL_TASK.count_documents({}) == 0


def test_doctor_tells_of_privileges(dltask: Dltask) -> None:
    """All well for the worker; for others what is lacking."""
    code, out, _ = dltask("worker", "doctor", "--json")
    assert code == 0, out
    assert not PARTS.search(out.replace("worker:***", ""))
    code, out, _ = dltask("client", "doctor", "--json")
    (database,) = (check for check in json.loads(out) if check["name"] == "database")
    assert (code, database["ok"]) == (2, False)
    assert "changeStream on the database" in database["found"]
    assert database["fix"] == "grant it the role dltaskWorker (docs/security.md)"


# ---- what the child gets


def sockets(pid: int) -> set[str]:
    """The inodes of the sockets that a process has open."""
    links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
    return {link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:[")}


def connections_to(port: int) -> set[str]:
    """The inodes of this machine's sockets that are connected to this port."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {row[9] for row in rows if row[2].endswith(f":{port:04X}") and row[9] != "0"}


def assert_nothing_secret(pid: int, port: int) -> None:
    """No part of a password in environment or arguments, and no connection to MongoDB."""
    environ = Path(f"/proc/{pid}/environ").read_bytes().decode()
    said = environ + Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    # Only what was found is shown: the rest is the environment of whoever runs the tests.
    found = [*PARTS.findall(said), *re.findall(f":{port}", said)]
    assert not found
    names = {entry.partition("=")[0] for entry in environ.split("\0")}
    assert not names & {"MONGODB_URI", "BACKUP_TARGET", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY"}
    assert not any(name.startswith("DLTASK_") for name in names)
    assert {"PATH", "HARMLESS"} <= names
    assert connections_to(port)
    assert not sockets(pid) & connections_to(port)


def test_no_credentials_reach_the_child(
    secured: Secured, db: Db, images: list[ObjectId], serve: Serve, tmp_path: Path
) -> None:
    """Neither by its environment, under whatever name, nor its arguments, files or descriptors; read while it runs."""
    uri = uri_of(secured, "worker")
    service = serve(
        uri_in_file=False,
        MONGODB_URI=uri,
        BACKUP_TARGET=f"password is {PASSWORDS['worker']}",
        AWS_SECRET_ACCESS_KEY="aws",
        HTTPS_PROXY="http://me:mine@proxy:3128",
        HARMLESS="1",
    )
    db.DL_TASK.insert_one(train_request(1, iterations=10_000))
    running(db, 1)
    (child,) = (json.loads(line) for line in (tmp_path / "children.jsonl").read_text().splitlines())
    assert_nothing_secret(child["pid"], secured.port)
    files = [path for path in (tmp_path / "cache" / "runs").rglob("*") if path.is_file()]
    assert {"job.json", "message.json", "images.jsonl"} <= {path.name for path in files}
    assert not any(PARTS.search(path.read_bytes().decode(errors="replace")) for path in files)
    service.stop()
    # Nor anything that the service leaves: its log, and what it wrote into the database.
    assert not PARTS.search(service.log.read_text())
    kept = [str(document) for name in ("DL_TASK", "DL_TASK_LOG", "DL_WORKER") for document in db[name].find()]
    assert kept
    assert not any(PARTS.search(document) for document in kept)


def test_no_credentials_reach_the_real_child(secured: Secured, serve: Serve) -> None:
    """The one that is kept warm, from its first moment on."""
    command = f"{sys.executable} -m handlers.detection"
    variables = {"MONGODB_URI": uri_of(secured, "worker"), "HARMLESS": "1", "DLTASK_CHILD_COMMAND": command}
    service = serve(uri_in_file=False, **variables)

    def children() -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(path.read_text().rpartition(")")[2].split()[1]) == service.process.pid:
                    found.append(int(path.parent.name))
        return found

    (child,) = wait_for(children)
    wait_for(lambda: b"handlers.detection" in Path(f"/proc/{child}/cmdline").read_bytes())
    assert_nothing_secret(child, secured.port)


# ---- files and names


def test_an_exchanged_model_is_not_run(
    db: Db, images: list[ObjectId], serve: Serve, dltask: Dltask, tmp_path: Path
) -> None:
    """Neither tested nor exported, if its bytes are not those that were registered, and the file says they are."""
    serve()
    db.DL_TASK.insert_one(train_request(1))
    assert ended(db, 1)["status"] == "SUCCEEDED"
    registered = db.DL_MODEL.find_one({"task_id": 1})
    assert registered is not None
    devil, file_id = b"no real devil", registered["file_id"]
    db["models.chunks"].update_one({"files_id": file_id}, {"$set": {"data": devil}})
    forged = {"metadata.sha256": hashlib.sha256(devil).hexdigest()}
    db["models.files"].update_one({"_id": file_id}, {"$set": forged})
    test = {"task_id": 2, "task_type": "TEST", "img_mongodb_ids": images}
    db.DL_TASK.insert_one({**test, "param_request": {"model_name": "ok", "device_type": "CPU"}})
    failed = ended(db, 2)
    assert (failed["status"], failed["error_code"], failed["error"]["kind"]) == ("FAILED", 8, "model")
    assert f"expected {registered['sha256']}" in failed["error"]["message"]
    # No child was given it: the only one so far is that of the training.
    assert len((tmp_path / "children.jsonl").read_text().splitlines()) == 1
    code, out, err = dltask("client", "models", "export", "ok", tmp_path / "model")
    assert (code, out) == (2, "")
    assert "is damaged" in err
    assert not (tmp_path / "model" / "model.onnx").exists()


def test_hostile_names_stay_in_the_folder(db: Db, dltask: Dltask, tmp_path: Path) -> None:
    """Names out of documents become file names inside DIR, or none at all."""
    names = ("../../escaped", "/escaped", "..", ".hidden", "a/../../escaped", "nul\x01", "C:\\escaped", "")
    # What the server stores: names of fields, which may hold anything but a leading $ and a NUL.
    picture = str(GridFSBucket(db, "reports").upload_from_stream("../../escaped", b"picture"))
    db.DL_TASK.insert_one({"task_id": 1, "result": {"reports": dict.fromkeys(names, picture)}})
    folder = tmp_path / "deep" / "down" / "pictures"
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert dltask("client", "report", 1, folder)[0] == 0
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert written
    assert {path.parent for path in written} == {folder}
    assert all(path.suffix == ".png" and path.read_bytes() == b"picture" for path in written)

    file_id = GridFSBucket(db, "models").upload_from_stream("../../escaped.onnx", b"model")
    model = {"version": 1, "file_id": file_id, "input_size": 320, "class_names": ["../a"]}
    sha256 = hashlib.sha256(b"model").hexdigest()
    db.DL_MODEL.insert_one({**model, "model_name": "../../escaped", "sha256": sha256})
    for reference in ("../../escaped", "/etc/passwd"):
        code, out, err = dltask("client", "models", "export", reference, folder)
        assert (code, out) == (2, "")
        assert "expected 1 to 128 letters" in err
    db.DL_MODEL.insert_one({**model, "model_name": "fine", "task_id": 2, "sha256": sha256})
    assert dltask("client", "models", "export", "fine", tmp_path / "model")[0] == 0
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.onnx", "classes.json", "model_card.md"}
    assert not list(tmp_path.parent.rglob("escaped*"))


def test_no_model_gets_a_hostile_name(db: Db, images: list[ObjectId], serve: Serve) -> None:
    """It would stand in file names of whoever copies models out of GridFS: admission says no."""
    serve()
    names = ("../../escaped", "/etc/cron.d/x", "..", "a/b", "a\\b", "x\x00y", "x\ny", ".hidden", "-rf", "a:../1")
    db.DL_TASK.insert_many([train_request(number, model_name=name) for number, name in enumerate(names)])
    for number in range(len(names)):
        rejected = ended(db, number)
        assert (rejected["status"], rejected["error_code"]) == ("REJECTED", 7)
        assert rejected["error"]["field"] == "param_request.model_name"
