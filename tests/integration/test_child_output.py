"""Whatever a child says, the worker lives, its other tasks go on, and no file but the child's own is touched."""

import copy
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bson import Decimal128, ObjectId
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pymongo.database import Database

from handlers.errors import PermanentError
from handlers.test import _rows
from schemas.message import MAX_CLASS_NAME, MAX_CLASSES
from schemas.task import Task
from tests.helpers import Service, ended, running, train_request, wait_for

Db = Database[dict[str, Any]]
Serve = Callable[..., Service]

SCRIPTED = f"{sys.executable} {Path(__file__).parents[1] / 'scripted_child.py'}"
SHA256 = hashlib.sha256(b"made by the child").hexdigest()
PER_CLASS = {"class_id": 1, "class_name": "a", "map": 0.5, "map_50": 0.5, "instances": 1, "detections": 1}
METRICS = {"map": 0.5, "map_50": 0.75, "map_75": 0.5, "per_class": [], "on": "val"}
#: One good event of each kind.
EVENTS: list[dict[str, Any]] = [
    {"event": "started", "device": "cpu", "initial_weights": "x", "iteration": 0},
    {
        "event": "progress",
        "iteration": 1,
        "max_num_iters": 3,
        "loss": 0.5,
        "learning_rate": 0.1,
        "images_per_second": 1.0,
        "eta_seconds": 1.0,
    },
    {"event": "measured", "iteration": 1, "values": {"loss": 0.5}},
    {"event": "note", "message": "a note"},
    {"event": "snapshot", "path": "{out}/file", "iteration": 1, "sha256": SHA256},
    {
        "event": "trained",
        "onnx": "{out}/file",
        "sha256": SHA256,
        "class_names": ["a"],
        "input_size": 320,
        "iterations": 3,
        "best_iteration": 3,
        "resumed_from_iteration": None,
        "initial_weights": "x",
        "data_fingerprint": "x",
        "device": "cpu",
        "metrics": METRICS
        | {
            "per_class": [
                PER_CLASS
                | {"precision": 1.0, "recall": 0.5, "f1": 0.75, "threshold": 0.5, "precision_at_recall": [1.0] * 21}
            ],
            "threshold": 0.5,
            "f1": 0.75,
            "confusion": {"iou": 0.5, "threshold": 0.5, "labels": ["a", "background"], "counts": [[1, 0], [0, 0]]},
            "size": {"small": None, "medium": 0.5, "large": 0.5},
            "worst": [{"img_id": "x", "missed": 1, "false": 0}],
        },
        "images": {"used": 1, "skipped": 1, "skipped_examples": [{"img_id": "x", "reason": "y"}]},
        "reports": {"a.png": "{out}/file"},
    },
    {
        "event": "tested",
        "detections": "{out}/file",
        "detection_count": 1,
        "images_per_second": 1.0,
        "device": "cpu",
        "metrics": None,
        "images": {"used": 1, "skipped": 0},
        "reports": {},
    },
    {"event": "stopped", "iteration": 1},
    {"event": "failed", "kind": "data", "message": "made up", "field": None},
]
NASTY: list[Any] = [
    10**30,
    2**63,
    -1,
    float("nan"),
    float("inf"),
    1e308,
    "\0",
    "$where",
    "a.b",
    "",
    "x" * 100_000,
    "/etc/passwd",
    "{out}/../../../../canary",
    "{out}/link",
    "{out}/folder",
    "{out}/missing",
    "{out}/" + "x" * 5000,
    None,
    True,
    [],
    {},
    {"$set": {"a": 1}},
    {"\0": 1.0},
    {"_id": 1.0},
    {"a\0b": "{out}/link", "$x": "/etc/passwd"},
    [[[[[[]]]]]],
]


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that is none of the child's business."""
    path = tmp_path / "canary"
    path.write_bytes(b"not the child's")
    return path


@pytest.fixture
def scripts(tmp_path: Path, dltask_env: dict[str, str], canary: Path) -> Path:
    """The folder of what children are to say."""
    folder = tmp_path / "lines"
    folder.mkdir()
    dltask_env |= {"SCRIPTED_LINES": str(folder), "SCRIPTED_CANARY": str(canary)}
    return folder


def paths_in(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside `value`."""
    if isinstance(value, dict):
        here: list[tuple[Any, Any]] = [(value, key) for key in value]
    elif isinstance(value, list):
        here = [(value, index) for index in range(len(value))]
    else:
        return []
    return here + [place for container, key in here for place in paths_in(container[key])]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good event with one to three values or names replaced, a line cut or bytes swapped, or anything at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200)).replace(b"\n", b" ")
    event = copy.deepcopy(draw(st.sampled_from(EVENTS)))
    for _ in range(draw(st.integers(0, 3))):
        places = paths_in(event)
        container, key = draw(st.sampled_from(places)) if places else (event, "event")
        match draw(st.integers(0, 3)):
            case 0 if isinstance(container, dict):
                container[draw(st.sampled_from(["\0", "$a", "a.b", "_id", "x" * 300, "more"]))] = container.pop(key)
            case 1:
                del container[key]
            case _:
                container[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
    line = json.dumps(event, ensure_ascii=draw(st.booleans()))
    if draw(st.integers(0, 19)) == 0:
        line = line.replace('"x"', r'"\ud800"')
    raw = line.encode(errors="surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        raw = raw[: draw(st.integers(0, len(raw)))]
    return raw


def test_random_and_mutated_events(
    db: Db, serve: Serve, image_ids: list[ObjectId], scripts: Path, canary: Path, tmp_path: Path
) -> None:
    """Every task ends, in whatever state its child talked it into; the worker is the same process to the end, and a
    file outside the child's folder is neither uploaded nor deleted.
    """
    service = serve(child_command=SCRIPTED, cpu_devices=3)
    numbers = iter(range(1, 10_000))

    @settings(
        max_examples=25,
        phases=[Phase.generate],  # a smaller example would cost a task for each try
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.lists(st.lists(mutated(), min_size=1, max_size=30), min_size=3, max_size=3))
    def run(saying: list[list[bytes]]) -> None:
        tasks = [(next(numbers), lines) for lines in saying]
        for number, lines in tasks:
            (scripts / str(number)).write_bytes(b"".join(line + b"\n" for line in lines))
            db.DL_TASK.insert_one(train_request(number, max_attempts=1))
        for number, _ in tasks:
            ended(db, number)
        assert service.process.poll() is None

    run()
    good = next(numbers)
    (scripts / str(good)).write_bytes(json.dumps(EVENTS[5]).encode() + b"\n")
    db.DL_TASK.insert_one(train_request(good))
    assert ended(db, good)["status"] == "SUCCEEDED"
    assert canary.read_bytes() == b"not the child's"
    for bucket in ("models", "reports"):
        assert {chunk["data"] for chunk in db[f"{bucket}.chunks"].find()} <= {b"made by the child"}
    assert "bug" not in {(task.get("error") or {}).get("kind") for task in db.DL_TASK.find()}
    assert service.stop() == 0


def test_what_mongodb_cannot_hold_is_no_event(db: Db, serve: Serve, image_ids: list[ObjectId], scripts: Path) -> None:
    """Also while the lease is being renewed with it."""
    service = serve(child_command=SCRIPTED, cpu_devices=3)
    events = [
        EVENTS[1] | {"iteration": 10**30},
        EVENTS[2] | {"values": {"a\0b": 1.0}},
        EVENTS[2] | {"iteration": 2**64 - 1},
    ]
    for number, event in enumerate(events):
        # Long enough for a renewal.
        script = f"say({json.dumps(event)!r}); time.sleep(3); say({json.dumps(EVENTS[5])!r})"
        (scripts / f"{number}.py").write_text(script)
        db.DL_TASK.insert_one(train_request(number, max_attempts=1))
    for number in range(3):
        assert ended(db, number)["status"] == "SUCCEEDED"
    assert service.process.poll() is None
    assert service.log.read_text().count("child line ignored") == 3


def test_the_largest_number_of_iterations(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """2^64-1 is in the interface: its progress is stored, and the worker lives."""
    service = serve()
    request = train_request(1)
    request["param_request"]["max_num_iters"] = Decimal128(str(2**64 - 1))
    db.DL_TASK.insert_one(request)
    task = running(db, 1)
    assert str(task["progress"]["max_num_iters"]) == str(2**64 - 1)
    assert service.process.poll() is None
    db.DL_TASK.update_one({"task_id": 1}, {"$set": {"cancel_requested": True}})
    assert ended(db, 1)["status"] == "CANCELLED"


@pytest.mark.parametrize(
    "rows",
    [
        b"not json\n",
        b"[]\n",
        b"{}\n",
        b'{"image_id": 99, "detections": []}\n',
        b'{"image_id": 1000000000000000000000000000000, "detections": []}\n',
        b'{"image_id": 1, "detections": [{"class_id": 1, "class_name": "a", "score": NaN, "bbox": [0, 0, 1, 1]}]}\n',
        b'{"image_id": 1, "detections": [{"class_id": 1, "class_name": "a", "score": 1, "bbox": [0, 0, 1]}]}\n',
        b'{"image_id": 1, "detections": [{"class_id": 1, "class_name": "a", "score": 1, "bbox": [], "$a": 1}]}\n',
        b'{"image_id": 1, "detections"',
        b"\xff\xfe\n",
        b"[" * 6_000_000,
    ],
    ids=range(11),
)  # fmt: skip
def test_garbage_for_detections(tmp_path: Path, rows: bytes) -> None:
    """The error names the line: FAILED with kind `output` (see `test_garbage_for_detections_fails_the_task`)."""
    task = Task.model_construct(task_id=1, attempt=1)
    (tmp_path / "refs").write_text(json.dumps({"id": 1, "mongodb_id": "0" * 24}) + "\n")
    good = b'{"image_id": 1, "detections": [{"class_id": 1, "class_name": "a", "score": 1, "bbox": [0, 0, 1, 1]}]}\n'
    (tmp_path / "rows").write_bytes(good + rows)
    with pytest.raises(PermanentError, match=r"line 2 of the child's detections is ") as raised:
        list(_rows(task, tmp_path / "rows", tmp_path / "refs"))
    assert raised.value.kind == "output"
    assert len(str(raised.value)) < 1000


def test_garbage_for_detections_fails_the_task(db: Db, serve: Serve, image_ids: list[ObjectId], scripts: Path) -> None:
    """FAILED at once with a clear kind; the worker goes on."""
    service = serve(child_command=SCRIPTED)
    (scripts / "1").write_bytes(json.dumps(EVENTS[5]).encode() + b"\n")
    (scripts / "2").write_bytes(json.dumps(EVENTS[6]).encode() + b"\n")
    db.DL_TASK.insert_one(train_request(1))
    assert ended(db, 1)["status"] == "SUCCEEDED"
    test = {"task_type": "TEST", "dataset": "toy", "split": "train"}
    db.DL_TASK.insert_one({"task_id": 2, **test, "param_request": {"model_name": "ok", "device_type": "CPU"}})
    document = ended(db, 2)
    assert (document["status"], document["attempt"], document["error"]["kind"]) == ("FAILED", 1, "output")
    assert "line 1 of the child's detections is b'made by the child'" in document["error"]["message"]
    assert service.process.poll() is None


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_line_without_end(db: Db, serve: Serve, image_ids: list[ObjectId], scripts: Path, stream: str) -> None:
    """100 MB without a line end: the worker's memory stays bounded, the log gets one line for it, the task goes on."""
    service = serve(child_command=SCRIPTED)
    before = peak_memory(service)
    (scripts / "1.py").write_text(
        f"for _ in range(100): sys.{stream}.write('x' * 1_000_000)\n"
        f"print(file=sys.{stream}, flush=True)\nsay({json.dumps(EVENTS[5])!r})"
    )
    db.DL_TASK.insert_one(train_request(1))
    assert ended(db, 1)["status"] == "SUCCEEDED"
    # Of the 100; what is kept of a line, 8 MiB, is copied as it grows.
    assert peak_memory(service) - before < 70_000_000
    lines = [line for line in service.log.read_text().splitlines() if "xxxxxxxxxx" in line]
    assert len(lines) == 1
    assert len(lines[0]) < 5000


def test_the_longest_names_of_classes(db: Db, serve: Serve, image_ids: list[ObjectId], scripts: Path) -> None:
    """As many and as long as a request message may have them: the last event is read whole, the model is registered."""
    serve(child_command=SCRIPTED)
    names = [f"{number:04}".ljust(MAX_CLASS_NAME, "\N{GRINNING FACE}") for number in range(MAX_CLASSES)]
    (scripts / "1").write_text(json.dumps(EVENTS[5] | {"class_names": names}, ensure_ascii=False) + "\n")
    db.DL_TASK.insert_one(train_request(1))
    assert ended(db, 1)["status"] == "SUCCEEDED"
    registered = db.DL_MODEL.find_one({"task_id": 1})
    assert registered is not None
    assert registered["class_names"] == names


def test_a_flood_of_notes_and_of_nonsense(db: Db, serve: Serve, image_ids: list[ObjectId], scripts: Path) -> None:
    """Notes and complaints are bounded in number and length, measurements are stored, the task SUCCEEDS."""
    service = serve(child_command=SCRIPTED)
    note = json.dumps({"event": "note", "message": "n" * 10_000})
    lines = [note] * 500 + ["nonsense"] * 5000 + [json.dumps(EVENTS[2] | {"iteration": n}) for n in range(20_000)]
    (scripts / "1").write_text("\n".join([*lines, json.dumps(EVENTS[5])]) + "\n")
    db.DL_TASK.insert_one(train_request(1))
    document = ended(db, 1)
    assert document["status"] == "SUCCEEDED"
    assert 0 < len(document["result"]["notes"]) <= 50
    assert max(map(len, document["result"]["notes"])) <= 3000
    assert service.log.read_text().count("nonsense") <= 100
    wait_for(lambda: db.DL_TASK_METRIC.count_documents({}) >= 1000)
    assert service.process.poll() is None


def peak_memory(service: Service) -> int:
    """Bytes that the process has held at most."""
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
