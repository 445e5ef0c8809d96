"""`dltask` without a database: usage errors, settings, and how documents are shown."""

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import Decimal128, Int64, ObjectId
from bson.datetime_ms import DatetimeMS
from rich.console import Console

from service.cli.fetch import _safe
from service.cli.main import main
from service.cli.show import table, task_table, tasks_table
from service.show import (
    json_text,
    log_text,
    outcome_text,
    printable,
    progress_text,
    state,
    why_waiting,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dltask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process; returns exit code, stdout and stderr."""

    def run(*arguments: str, **settings: str) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["dltask", *arguments])
            # The log is the whole process's: set up here, it would outlive the test.
            patch.setattr("service.logs.configure", lambda *_, **__: None)
            for name, value in settings.items():
                patch.setenv(f"DLTASK_{name.upper()}", value)
            with pytest.raises(SystemExit) as ended:
                main()
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    return run


def test_help_waits_for_no_heavy_import() -> None:
    """The command line starts without the database driver, OpenCV, numpy or torch."""
    heavy = {"pymongo", "bson", "cv2", "numpy", "torch"}
    code = f"import sys, service.cli.main; print(sorted({heavy} & sys.modules.keys()))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_help_names_every_command(dltask: Run) -> None:
    """The table of the contract."""
    code, out, _ = dltask("--help")
    assert code == 0
    commands = "serve demo mongo dataset submit status wait cancel logs report models workers doctor"
    for command in commands.split():
        assert f"  {command} " in out
        assert dltask(command, "--help")[0] == 0
    for nested in (("dataset", "import"), ("dataset", "list"), ("dataset", "export"), ("models", "export")):
        assert dltask(*nested, "--help")[0] == 0


SUBMIT = ("submit", "train", "--model-name", "m", "--dataset", "d")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nonsense",), "No such command"),
        (("status", "x"), "valid integer"),
        (("status", "-1"), "-1"),
        (("wait", str(2**64)), "less than or equal to 18446744073709551615"),
        (("submit", "train", "--dataset", "d"), "--model-name"),
        (("submit", "prune", *SUBMIT[2:]), "expected train or test"),
        ((*SUBMIT, "--param", "batch_size"), "expected field=value"),
        ((*SUBMIT, "--param", "bathc_size=3"), "snap_shot_ivterval"),
        ((*SUBMIT, "--param", "batch_size=3", "--param", "batch_size=4"), "given twice"),
        ((*SUBMIT, "--param", "snap_shot_interval=3", "--param", "snap_shot_ivterval=4"), "given twice"),
        ((*SUBMIT, "--param", "model_name=x"), "is --model-name"),
        (("dataset", "import", "/", "--name", "n", "--format", "yolo"), "expected coco or voc"),
        (("dataset", "import", "/nowhere", "--name", "n", "--format", "coco"), "is no folder"),
        (
            ("dataset", "import", "/", "--name", "n", "--format", "coco", "--split", "s", "--split-file", "f"),
            "expected one of them",
        ),
        (("dataset", "export", "--format", "voc", "n", "/nowhere"), "expected coco"),
    ],
)
def test_wrong_usage_ends_with_2(dltask: Run, arguments: tuple[str, ...], said: str) -> None:
    """What was wrong and what was expected goes to stderr, and nothing to stdout."""
    code, out, err = dltask(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", [("status",), ("serve",), ("doctor",)])
def test_a_wrong_setting_is_one_line(dltask: Run, command: tuple[str, ...]) -> None:
    """Variable, value and expectation."""
    code, out, err = dltask(*command, grace_seconds="soon")
    assert (code, out) == (2, "")
    expected = "expected a valid number, unable to parse string as a number"
    assert err == f"dltask: DLTASK_GRACE_SECONDS is 'soon'; {expected}\n"
    code, out, err = dltask(*command, gpu_fallback="yes")
    assert (code, err) == (2, "dltask: DLTASK_GPU_FALLBACK is 'yes'; expected 'none' or 'cpu'\n")


def test_a_password_is_never_shown(dltask: Run) -> None:
    """A URI that cannot be read is answered without the password in it."""
    code, out, err = dltask("status", mongodb_uri="mongodb://me:geh@eim@host")
    assert (code, out) == (2, "")
    assert "DLTASK_MONGODB_URI is not a MongoDB URI" in err
    assert "eim" not in err.replace("***", "")


def test_documents_as_json() -> None:
    """Ids as hex, times in UTC, 64-bit numbers as numbers, and nothing that is no JSON."""
    oid = ObjectId()
    document = {
        "_id": oid,
        "task_id": Decimal128(str(2**64 - 1)),
        "n": Int64(2**63 - 1),
        "time": NOW,
        "odd": DatetimeMS(2**60),
        "nan": float("nan"),
        "half": Decimal128("0.5"),
        "huge": Decimal128("1E+6000"),
        "bytes": b"\x00\xff",
        "list": [{"a": None}, True, "ü"],
    }
    assert json.loads(json_text(document)) == {
        "_id": str(oid),
        "task_id": 2**64 - 1,
        "n": 2**63 - 1,
        "time": "2026-01-02T03:04:05.000Z",
        "odd": 2**60,
        "nan": None,
        "half": "0.5",
        "huge": "1E+6000",
        "bytes": "00ff",
        "list": [{"a": None}, True, "ü"],
    }


def task(status: str = "PENDING", **fields: Any) -> dict[str, Any]:
    key = ObjectId()
    params = {"model_name": "m", "device_type": "GPU", "device_num": 2}
    return {
        "_id": key,
        "admitted_id": key,
        "task_id": 1,
        "task_type": "TRAIN",
        "status": status,
        "priority": 0,
        "create_time": NOW,
        "param_request": params,
        **fields,
    }


def test_why_a_task_waits() -> None:
    """Each reason in words; a task that runs waits for nothing."""

    def why(document: Any, queue: list[Any], workers: list[Any], *, waiting: int | None = None) -> str:
        return why_waiting(document, queue, workers, NOW, waiting=len(queue) if waiting is None else waiting)

    able, unable = {"_id": "w", "devices": {"CPU": 8, "GPU": 2}}, {"_id": "v", "devices": {"CPU": 8, "GPU": 1}}
    urgent, late = task(priority=5), task()
    first = task()
    queue = [urgent, first, late]
    assert why(first, queue, [able]) == "position 2 of 3 in the queue"
    assert why(first, queue, [able], waiting=5000) == "position 2 of 5000 in the queue"
    assert why(task(), queue, [able], waiting=5000) == "in the queue, behind the first 3 of 5000"
    busy, idle = {**able, "free": {"CPU": 8, "GPU": 1}}, {**able, "free": {"CPU": 8, "GPU": 2}}
    picky = {"_id": "p", "devices": {"GPU": 8}, "free": {"GPU": 8}, "min_device_num": 5}
    assert why(first, queue, [busy, unable]).endswith("in the queue, and no worker has 2 GPU free")
    assert why(first, queue, [busy, idle]).endswith("devices are free: about to be claimed, or kept for one before it")
    assert why(urgent, queue, [busy, idle]) == "position 1 of 3 in the queue"
    assert why(first, queue, [busy, picky]).endswith("take no task for 2 (DLTASK_MIN_DEVICE_NUM)")
    assert why(first, queue, [unable]) == "needs 2 GPU; no live worker has them"
    assert why(first, queue, []) == "no worker is alive"
    assert "rests" in why(first, queue, [{**able, "resting": True}, unable])
    assert "runs nothing else" in why({**first, "runs_alone": True}, queue, [able])
    retry = task(not_before=NOW + timedelta(seconds=60), failures=1)
    assert why(retry, [retry], [able]) == "retry at 2026-01-02T03:05:05.000Z after 1 faults"
    assert why(task(cancel_requested=True), [], [able]) == "is being cancelled"
    assert why(task("RUNNING"), [], [able]) == ""
    new = task(admitted_id=ObjectId())
    assert state(new) == "NEW"
    assert why(new, [], []) == "no worker is alive to admit it"
    assert why(new, [], [able]) == "not looked at yet"


def test_nothing_of_a_document_controls_the_terminal() -> None:
    """Escape sequences, changes of direction and Rich's markup in documents are shown, not obeyed."""
    evil = "\x1b[31m[bold]x[/bold]\u202e\x9b\n\ud800"
    assert printable(evil) == "?[31m[bold]x[/bold]?? ?"
    console = Console(width=200, record=True, file=None, stderr=True)
    fields = {"param_request": {"model_name": evil}, "error": {"kind": evil, "message": evil}, "dataset": evil}
    for shown in (
        tasks_table(
            [task("FAILED", **fields), {"task_id": evil, "param_request": evil, "error": evil}], [], [], waiting=0
        ),
        task_table(task("FAILED", **fields, history=[{"status": evil, "at": NOW}]), [], [], waiting=0),
        table(("A",), [[evil]]),
    ):
        console.print(shown)
    text = console.export_text()
    assert "[bold]x[/bold]" in text
    assert not any(c in text for c in ("\x1b", "\u202e", "\x9b"))


def test_documents_of_any_shape_can_be_shown() -> None:
    """A client may have written anything into any field of a document, until it is admitted, or rejected."""
    console = Console(width=200, record=True, stderr=True)
    workers = [{"_id": "w", "devices": {"GPU": 8}}]
    clients = ["task_id", "task_type", "param_request", "dataset", "split", "json_mongodb_id", "priority"]
    services = ["status", "error_code", "error", "attempt", "owner", "progress", "history", "result"]
    services += ["create_time", "end_time", "not_before"]
    for junk in (None, 5, "x", [], {}, [1], {"a": 1}, NOW, ObjectId(), float("nan")):
        new = task() | dict.fromkeys(clients + services, junk) | {"admitted_id": junk}
        rejected = task("REJECTED", history=[]) | dict.fromkeys(clients, junk)
        for document in (new, rejected):
            console.print(tasks_table([document], [document, task()], workers, waiting=2))
            console.print(task_table(document, [], workers, waiting=0))
            console.print(progress_text(document), outcome_text(document))
    assert "REJECTED" in console.export_text()


def test_log_lines() -> None:
    """A stored JSON line reads as one line of text; one that was cut off stays as it is."""
    line = {
        "event": "child output",
        "level": "info",
        "timestamp": "2026-01-02T03:04:05Z",
        "task_id": "1",
        "line": "a\nb",
    }
    assert log_text(json.dumps(line)) == "2026-01-02T03:04:05Z info      child output line=a b"
    assert log_text('{"event": "cut o') == '{"event": "cut o'
    assert log_text("[1]") == "[1]"


@pytest.mark.parametrize(
    ("name", "file"),
    [("curves", "curves"), ("curves.png", "curves"), ("../../x", "_.._x"), ("a/b", "a_b"), ("..", "_"), ("", "_")],
)
def test_pictures_get_safe_file_names(name: str, file: str) -> None:
    """A name from a document cannot leave the folder."""
    assert _safe(name) == file
