"""A start that cannot succeed: exit code 2 and one line that says why and what to do; the doctor says the same."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient
from pymongo.errors import PyMongoError

from service.embedded import find_mongod
from tests import gpu_machines as machines
from tests.helpers import wait_for
from tests.integration.greeting import greeting_server

#: An operation gives up after 20 s; two are enough to see how.
_SHORT = "import handlers.store.database as d; d.OPERATION_TIMEOUT_MS = 2000; from service.cli.main import main; main()"

#: Runs `dltask` with these settings; returns exit code, stdout and stderr.
Dltask = Callable[..., tuple[int, str, str]]
#: Starts a `mongod` that nobody has made a replica set of; returns its port.
Bare = Callable[..., int]


@pytest.fixture
def dltask(tmp_path: Path) -> Dltask:
    """See Dltask."""

    def run(command: str, *arguments: str, path: str = os.environ["PATH"], **settings: Any) -> tuple[int, str, str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("DLTASK_")}
        env |= {"DLTASK_CACHE_DIR": str(tmp_path / "cache"), "DLTASK_HTTP_PORT": "off", "DLTASK_LOG_FORMAT": "json"}
        env |= {f"DLTASK_{name.upper()}": str(value) for name, value in settings.items()} | {"PATH": path}
        done = subprocess.run(
            [sys.executable, "-c", _SHORT, command, *arguments],
            **{"env": env, "capture_output": True, "text": True, "timeout": 120, "check": False},
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def reason(dltask: Dltask) -> Callable[..., str]:
    """Why `dltask serve` ended with exit code 2: the one line that it printed."""

    def run(**settings: Any) -> str:
        code, out, err = dltask("serve", **settings)
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        line = json.loads(err)
        assert (line["event"], line["level"]) == ("cannot start", "error")
        return str(line["reason"])

    return run


def diagnosis(dltask: Dltask, name: str, **settings: Any) -> dict[str, Any]:
    """What `dltask doctor` says of one thing."""
    code, out, _ = dltask("doctor", "--json", **settings)
    (check,) = (check for check in json.loads(out) if check["name"] == name)
    assert code == (2 if any(not each["ok"] for each in json.loads(out)) else 0)
    return dict(check)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    """See Bare."""
    with ExitStack() as running:

        def start(*options: str) -> int:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port: int = probe.getsockname()[1]
            folder = tmp_path_factory.mktemp("mongod")
            command = [str(find_mongod()), "--dbpath", str(folder), "--port", str(port), "--bind_ip", "127.0.0.1"]
            command += ["--nounixsocket", "--quiet", "--wiredTigerCacheSizeGB", "0.25", *options]
            log = running.enter_context(Path(folder / "mongod.log").open("wb"))
            process = running.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
            running.callback(process.kill)

            def answers() -> bool:
                with MongoClient("127.0.0.1", port, directConnection=True, serverSelectionTimeoutMS=200) as client:
                    try:
                        return bool(client.admin.command("ping"))
                    except PyMongoError:
                        return False

            wait_for(answers, 60)
            return port

        yield start


def test_a_server_of_its_own(bare: Bare, reason: Callable[..., str], dltask: Dltask) -> None:
    """Whether or not the URI names a set: the very commands that make it one."""
    port = bare()
    for options in ("", "?replicaSet=rs7"):
        name = "rs7" if options else "rs0"
        found = f"MongoDB at 127.0.0.1:{port} runs without a replica set, which change streams need"
        fix = (
            f"start it as `mongod --replSet {name} …` and run `mongosh --host 127.0.0.1 --port {port} --eval "
            "'rs.initiate()'` once (one member is enough)"
        )
        uri = f"mongodb://127.0.0.1:{port}/{options}"
        assert reason(mongodb_uri=uri) == f"{found}; {fix}"
        check = diagnosis(dltask, "database", mongodb_uri=uri, child_command="/bin/true")
        assert (check["state"], check["found"], check["fix"]) == ("failed", found, fix)


def test_a_set_that_was_never_initiated(bare: Bare, reason: Callable[..., str]) -> None:
    """It answers, and has no primary: the one command that is missing."""
    port = bare("--replSet", "rs0")
    for options in ("", "?replicaSet=rs0"):
        assert reason(mongodb_uri=f"mongodb://127.0.0.1:{port}/{options}") == (
            f"the replica set of MongoDB at 127.0.0.1:{port} has never been initiated; run "
            f"`mongosh --host 127.0.0.1 --port {port} --eval 'rs.initiate()'` once"
        )


def test_a_set_of_another_name(mongo_uri: str, reason: Callable[..., str]) -> None:
    """The URI's and the real one."""
    said = reason(mongodb_uri=mongo_uri.replace("replicaSet=rs0", "replicaSet=prod"))
    assert "is called 'rs0'; DLTASK_MONGODB_URI says replicaSet=prod: expected replicaSet=rs0" in said


def test_a_set_without_a_primary(reason: Callable[..., str]) -> None:
    """Too few members, or a primary whose name leads nowhere from here, as of a set inside containers."""
    second = {"isWritablePrimary": False, "ismaster": False, "secondary": True}
    with greeting_server("6.0.5", 17, **second, primary=None) as uri:
        assert "the replica set 'rs0' has no primary; more than half of its members must be up" in reason(
            mongodb_uri=uri
        )
    with greeting_server(
        "6.0.5", 17, **second, primary="mongo-0.invalid:27017", hosts=["mongo-0.invalid:27017"]
    ) as uri:
        assert "calls itself mongo-0.invalid:27017, and does not answer from here" in reason(mongodb_uri=uri)


def test_an_old_server(reason: Callable[..., str], dltask: Dltask) -> None:
    """Its version, and the oldest that will do."""
    with greeting_server("4.4.29", 9) as uri:
        said = reason(mongodb_uri=uri)
        check = diagnosis(dltask, "database", mongodb_uri=uri, child_command="/bin/true")
    assert said == "MongoDB is 4.4.29; expected 5.0 or newer: upgrade the server"
    assert check["found"] == "MongoDB is 4.4.29"


def test_a_server_too_old_for_the_driver(reason: Callable[..., str]) -> None:
    """PyMongo itself turns it away, in its own words."""
    with greeting_server("4.2.24", 8) as uri:
        assert "is older than 5.0; expected 5.0 or newer: upgrade the server" in reason(mongodb_uri=uri)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        (
            "mongodb://no-such-host.invalid:27017/?replicaSet=rs0",
            "MongoDB does not answer: no such host: no-such-host",
        ),
        ("mongodb://127.0.0.1:1/?replicaSet=rs0", "MongoDB does not answer: nothing listens there: 127.0.0.1:1"),
        ("http://127.0.0.1/", "DLTASK_MONGODB_URI is not a MongoDB URI"),
        ("mongodb://127.0.0.1:port/", "DLTASK_MONGODB_URI is not a MongoDB URI"),
        ("mongodb://127.0.0.1:1/?tlsCAFile=/nowhere.pem&tls=true", "DLTASK_MONGODB_URI names a certificate"),
    ],
)
def test_a_wrong_uri(reason: Callable[..., str], dltask: Dltask, uri: str, said: str) -> None:
    """Host, port or form: each in words, with what to look at; the doctor goes on with the machine after it."""
    assert reason(mongodb_uri=uri).startswith(said)
    check = diagnosis(dltask, "database", mongodb_uri=uri, child_command="/bin/true")
    assert check["found"].startswith(said)
    assert check["fix"]


def test_no_tls_where_it_is_asked_for(mongo_uri: str, reason: Callable[..., str]) -> None:
    """The other way round is in test_security.py."""
    assert reason(mongodb_uri=f"{mongo_uri}&tls=true").startswith("MongoDB speaks no TLS: ")


def test_sigterm_before_it_is_ready(tmp_path: Path) -> None:
    """It ends in order. The first process of a container would not hear it otherwise, and go on to claim tasks."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        env = {name: value for name, value in os.environ.items() if not name.startswith("DLTASK_")}
        env |= {"DLTASK_MONGODB_URI": f"mongodb://127.0.0.1:{silent.getsockname()[1]}/", "DLTASK_LOG_FORMAT": "json"}
        command = [sys.executable, "-m", "service.cli", "serve"]
        worker = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        status = Path(f"/proc/{worker.pid}/status")

        def listens() -> bool:
            (caught,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigCgt"))
            return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)

        wait_for(listens)
        worker.send_signal(signal.SIGTERM)
        _, err = worker.communicate(timeout=30)
    assert worker.returncode == 0, err
    assert json.loads(err)["event"] == "service stopped"


def test_a_cache_folder_that_cannot_be_written(mongo_uri: str, reason: Callable[..., str], tmp_path: Path) -> None:
    """The folder, why, and the setting."""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "cache", "/proc/dltask"):
        said = reason(mongodb_uri=mongo_uri, database="test_start_up", cache_dir=folder)
        assert said.startswith(f"{folder} cannot be written: ")
        assert said.endswith("make it writable for this user, or set DLTASK_CACHE_DIR to a folder that is")


def test_a_child_that_cannot_be_started(mongo_uri: str, reason: Callable[..., str]) -> None:
    """The setting, and why."""
    said = reason(mongodb_uri=mongo_uri, database="test_start_up", child_command="/nowhere/python -m x", gpu_devices=0)
    assert said.startswith("DLTASK_CHILD_COMMAND cannot be started: ")
    assert "/nowhere/python" in said


def test_gpus_that_are_asked_for(mongo_uri: str, reason: Callable[..., str], tmp_path: Path) -> None:
    """A driver too old for torch; a driver that fails; nothing there: one line each, from a real start."""
    facts = {**machines.GOOD, "gpus": 0, "cuda_error": machines.TORCH["old"]}
    child = f"{machines.python(tmp_path / 'child', facts)} -m handlers.detection"
    settings = {"mongodb_uri": mongo_uri, "database": "test_start_up", "child_command": child}
    path = machines.nvidia_smi(tmp_path / "bin", machines.LIST, machines.table("550.54.14", "12.4"))
    assert reason(path=path, **settings) == (
        "driver 550.54.14 is too old for torch 2.14.1+cu130: it supports CUDA 12.4, torch is built for CUDA 13.0; "
        "install driver 580.65.06 or newer, or a torch built for CUDA 12; DLTASK_GPU_DEVICES=0 serves CPU tasks only"
    )
    text, code = machines.FAILING["no driver"]
    path = machines.nvidia_smi(tmp_path / "bin", text, code=code)
    assert "modprobe nvidia" in reason(path=path, gpu_devices=1, **settings)
    if not Path("/dev/nvidiactl").exists():
        said = reason(path="/usr/bin:/bin", gpu_devices=1, **settings)
        assert said.startswith("DLTASK_GPU_DEVICES is 1, and this machine shows no GPU")


def test_the_doctor_of_a_healthy_machine(mongo_uri: str, database_name: str, dltask: Dltask) -> None:
    """Each check is there, none has failed, and what to do stands beside what is not as it should be."""
    code, out, _ = dltask("doctor", "--json", mongodb_uri=mongo_uri, database=database_name)
    checks = {check["name"]: check for check in json.loads(out)}
    assert code == 0, out
    expected = "settings database indexes clock workers cache memory processors child weights GPU http"
    assert set(checks) == {*expected.split(), "shared memory"}
    assert checks["database"]["found"].startswith("MongoDB 6.")
    assert checks["database"]["found"].endswith("replica set rs0 of 1")
    assert checks["clock"]["found"] == "agrees with the server's"
    assert checks["child"]["found"].startswith("Python 3.")
    assert all(check["fix"] for check in checks.values() if check["state"] != "ok")
    code, out, _ = dltask("doctor", mongodb_uri=mongo_uri, database=database_name)
    assert code == 0
    assert "→ `dltask serve` creates them" in out


def test_the_doctor_looks_at_the_fleet(mongo_uri: str, database_name: str, dltask: Dltask) -> None:
    """Workers of another version or lease, and tasks that nobody here understands."""
    settings = {"mongodb_uri": mongo_uri, "database": database_name, "child_command": "/bin/true"}
    with MongoClient(mongo_uri) as client:
        workers, tasks = client[database_name].DL_WORKER, client[database_name].DL_TASK
        workers.insert_one({"_id": "first", "version": "0.1.0", "devices": {"CPU": 1}})
        check = diagnosis(dltask, "workers", **settings)
        assert (check["state"], "1 of 0.1.0" in check["found"]) == ("warning", True)
        assert "docs/upgrading.md" in check["fix"]
        workers.insert_one({"_id": "odd", "version": [1], "lease_seconds": 12, "devices": "x"})
        check = diagnosis(dltask, "workers", **settings)
        assert check["state"] == "warning"
        assert check["found"] == "2 alive; DLTASK_LEASE_SECONDS is 45 here and 12 there"
        tasks.insert_one({"task_id": 1, "status": "PENDING", "error_code": 0, "schema_version": 99})
        assert diagnosis(dltask, "newer tasks", **settings)["state"] == "warning"
