"""Where the secret comes from, and where it does not go."""

import ast
import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from handlers.settings import DatabaseSettings, uri_to_mask
from handlers.task_process import TaskProcess
from service.cli.main import _explained
from service.secrecy import child_environment
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
URI = "mongodb://me:geheim%40wort@host/?replicaSet=rs0"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DLTASK_")]:
        monkeypatch.delenv(name)


def said() -> str:
    """What a person is told of settings that are wrong; no form of the error has the secret in it."""
    for settings in (DatabaseSettings, Settings):
        with pytest.raises(ValidationError) as error:
            settings()
        assert "geheim" not in str(error.value)
    line = _explained(error.value)
    assert line is not None
    assert "geheim" not in line
    assert "\n" not in line
    return line


# ---- a file


@pytest.mark.parametrize("content", [URI, f"{URI}\n", f"{URI}\r\n", f"\n  {URI} \n\n"])
def test_the_uri_comes_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    """Without the end of its line; a secret like the one of a variable, for the service and for TaskProcess."""
    (tmp_path / "uri").write_text(content, newline="")
    monkeypatch.setenv("DLTASK_MONGODB_URI_FILE", str(tmp_path / "uri"))
    monkeypatch.setenv("DLTASK_MONGODB_URI", "")  # as good as not set: Compose and Kubernetes pass empty ones on
    for settings in (Settings(), DatabaseSettings(), TaskProcess()._settings):
        assert settings.mongodb_uri.get_secret_value() == URI
        assert "geheim" not in repr(settings)
    assert uri_to_mask() == URI


def test_a_file_that_holds_no_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, a folder, empty, no text: the variable, the path, and what was expected. The default is not used."""
    empty, binary, missing = tmp_path / "empty", tmp_path / "binary", tmp_path / "missing"
    empty.write_text(" \n")
    binary.write_bytes(b"mongodb://\xff\xfe")
    for path, why in (
        (missing, "expected a file that can be read: No such file or directory"),
        (tmp_path, "expected a file that can be read: Is a directory"),
        (empty, "expected a file with a MongoDB URI in it, and it is empty"),
        (binary, "expected a file with a MongoDB URI in it, and it is no text"),
    ):
        monkeypatch.setenv("DLTASK_MONGODB_URI_FILE", str(path))
        assert said() == f"DLTASK_MONGODB_URI_FILE is '{path}'; {why}"
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", "serve"],
        env={**os.environ, "DLTASK_MONGODB_URI_FILE": str(missing)},
        **{"capture_output": True, "text": True, "timeout": 60, "check": False},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"dltask: DLTASK_MONGODB_URI_FILE is '{missing}'; expected")
    assert len(done.stderr.splitlines()) == 1


def test_a_file_and_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which one is meant cannot be known; neither is shown."""
    (tmp_path / "uri").write_text(URI)
    monkeypatch.setenv("DLTASK_MONGODB_URI", URI)
    monkeypatch.setenv("DLTASK_MONGODB_URI_FILE", str(tmp_path / "uri"))
    assert said() == "DLTASK_MONGODB_URI and DLTASK_MONGODB_URI_FILE are both set; expected one of them"


def test_a_uri_from_a_file_is_masked_too(tmp_path: Path) -> None:
    """As one from a variable is, wherever a command gives up."""
    (tmp_path / "uri").write_text(URI.replace("@host", "@@host"))
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", "status"],
        env={**os.environ, "DLTASK_MONGODB_URI_FILE": str(tmp_path / "uri")},
        **{"capture_output": True, "text": True, "timeout": 60, "check": False},
    )
    assert done.returncode == 2
    assert "is not a MongoDB URI" in done.stderr
    assert "geheim" not in done.stdout + done.stderr


def test_no_command_takes_a_secret_as_an_argument() -> None:
    """Arguments are for everybody on the machine to read."""
    for path in (ROOT / "service" / "cli").glob("*.py"):
        for word in ("--uri", "--mongodb", "--password"):
            assert word not in path.read_text()


# ---- the environment of a child


def test_what_a_child_inherits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No credential by its name, its form or its content; everything else, however odd."""
    withheld = {
        "DLTASK_MONGODB_URI": URI,
        "DLTASK_DATABASE": "dl",
        "MONGODB_URI": URI,
        "SPRING_DATA_URI": "mongodb://another:password@elsewhere/",
        "NOTE": "the password is geheim@wort, keep it",
        "ESCAPED": "geheim%40wort",
        "AWS_ACCESS_KEY_ID": "1",
        "AWS_SECRET_ACCESS_KEY": "1",
        "AWS_SESSION_TOKEN": "1",
        "GH_TOKEN": "1",
        "WANDB_API_KEY": "1",
        "WANDB_APIKEY": "1",
        "PGPASSWORD": "1",
        "MYSQL_PASSWORD": "1",
        "SSH_AUTH_SOCK": "/tmp/agent",
        "GOOGLE_APPLICATION_CREDENTIALS": "/key.json",
        "https_proxy": "http://me:mine@proxy:3128",
    }
    inherited = {
        "CUDA_VISIBLE_DEVICES": "0",
        "LD_LIBRARY_PATH": "/usr/local/cuda/lib64",
        "OMP_NUM_THREADS": "2",
        "NCCL_DEBUG": "INFO",
        "TOKENIZERS_PARALLELISM": "false",
        "KEYBOARD": "de",
        "PWD": "/somewhere",
        "HTTP_PROXY": "http://proxy:3128",
        "MONGODB_HOST": "mongodb://host/",
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "AUTHOR": "me",
        "TIME": "12:30@noon",
    }
    for name, value in {**withheld, **inherited}.items():
        monkeypatch.setenv(name, value)
    environment = child_environment(URI)
    assert not withheld.keys() & environment.keys()
    assert inherited.items() <= environment.items()


def test_a_short_password_takes_nothing_else_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a part of any path; alone it is still the password."""
    monkeypatch.setenv("HOME_OF", "/root/x")
    monkeypatch.setenv("PASSPHRASE_OF", "root")
    monkeypatch.setenv("REPEATED", "root")
    environment = child_environment("mongodb://root:root@host/")
    assert environment["HOME_OF"] == "/root/x"
    assert "REPEATED" not in environment


#: Becomes nobody if it is root, who may read everything; then starts a child that reads what the kernel tells of us.
_PARENT = """
import os, subprocess, sys
from service.secrecy import hide_from_children
import ctypes
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as after an execution by that user
def readable(what):
    return subprocess.run(["/bin/cat", f"/proc/{os.getpid()}/{what}"], capture_output=True).returncode == 0
print([readable("environ"), readable("maps")])
hide_from_children()
print([readable("environ"), readable("maps")])
print(subprocess.run(["/bin/cat", "/proc/self/environ"], capture_output=True).returncode)
"""


def test_a_child_cannot_read_the_workers_environment() -> None:
    """It runs as the same user, to whom the kernel otherwise tells all of a process, its memory too."""
    done = subprocess.run([sys.executable, "-c", _PARENT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[True, True]", "[False, False]", "0"]


def test_the_service_is_hidden_from_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is started, and whatever comes of it."""
    code = (
        "import ctypes, service.app as app; app.anyio.run = lambda *_: None\n"
        "from service.settings import Settings\n"
        "app.run(Settings()); print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"  # PR_GET_DUMPABLE
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
    assert ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) == 1  # not so of this process


# ---- no shell


def test_nothing_is_given_to_a_shell(tmp_path: Path) -> None:
    """Not in the service, its scripts or its tests: by ruff's rules for the standard library, and by our own for anyio.

    anyio's `run_process` and `open_process` take a string for a shell's, without a word like `shell=True`.
    """
    rules = "S602,S604,S605,S609"
    folders = ["schemas", "handlers", "service", "scripts", "benchmarks", "tests"]
    ruff = [str(Path(sys.executable).with_name("ruff")), "check", "--isolated", "--no-cache", "--select", rules]
    done = subprocess.run([*ruff, *folders], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    (tmp_path / "bad.py").write_text("import os, subprocess\nos.system(x)\nsubprocess.run(y, shell=True)\n")
    bad = subprocess.run([*ruff, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "S605" in bad.stdout
    assert "S602" in bad.stdout

    started = 0
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node.func, "attr", "") if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and name in ("run_process", "open_process"):
                started += 1
                assert not isinstance(node.args[0], ast.Constant | ast.JoinedStr | ast.BinOp), (path, node.lineno)
    assert started


def test_a_command_of_the_settings_is_no_shell_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split into words as a shell would, and nothing else of it done."""
    monkeypatch.setenv("DLTASK_CHILD_COMMAND", "python -c 'a b' ; touch $HOME | x")
    assert Settings().child_command == ("python", "-c", "a b", ";", "touch", "$HOME", "|", "x")
