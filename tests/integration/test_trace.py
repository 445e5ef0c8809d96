"""A client's trace goes with its task: into every log line of its attempts, and into the child's environment."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bson import ObjectId
from pymongo.database import Database

from tests.helpers import Service, ended, running, train_request, wait_for

Db = Database[dict[str, Any]]
Serve = Callable[..., Service]

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
FIELDS = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "congo=t61rcWkgMzE"}


def lines_of(service: Service, task_id: str) -> list[dict[str, Any]]:
    lines = map(json.loads, service.log.read_text().splitlines())
    return [line for line in lines if line.get("task_id") == task_id]


def jobs(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["job"] for line in (tmp_path / "children.jsonl").read_text().splitlines()]


def test_every_line_of_a_task_carries_its_trace(
    db: Db, serve: Serve, image_ids: list[ObjectId], tmp_path: Path
) -> None:
    """Admission, attempt, the child's output; stored lines too. The document keeps what the client wrote."""
    service = serve()
    db.DL_TASK.insert_one(train_request(1, **FIELDS))
    document = ended(db, 1)
    db.DL_TASK.insert_one(train_request(2))
    ended(db, 2)
    assert {name: document[name] for name in FIELDS} == FIELDS
    assert service.stop() == 0
    lines = lines_of(service, "1")
    assert {"task admitted", "task claimed", "child started", "child output", "task succeeded"} <= {
        line["event"] for line in lines
    }
    assert {(line["trace_id"], line["span_id"]) for line in lines} == {(TRACE, SPAN)}
    stored = db.DL_TASK_LOG.find_one({"_id": 1})
    assert stored is not None
    assert {json.loads(line)["trace_id"] for line in stored["lines"]} == {TRACE}
    assert not any("trace_id" in line for line in lines_of(service, "2"))
    traced, untraced = jobs(tmp_path)
    assert traced["environment"] == {"TRACEPARENT": FIELDS["traceparent"], "TRACESTATE": FIELDS["tracestate"]}
    assert untraced["environment"] == {}


def test_a_rejected_task_has_its_trace_in_the_log(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """Whoever looks at the trace finds out why nothing came of it."""
    service = serve()
    db.DL_TASK.insert_one({**train_request(1, **FIELDS), "task_type": "PRUNE"})
    assert ended(db, 1)["status"] == "REJECTED"
    service.stop()
    [line] = lines_of(service, "1")
    assert (line["event"], line["trace_id"]) == ("task rejected", TRACE)


def test_the_loss_of_a_worker_is_part_of_the_trace(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """The worker that takes the task back says it, and the next attempt goes on with the trace."""
    first = serve(lease_seconds=3)
    db.DL_TASK.insert_one(train_request(1, iterations=200, **FIELDS))
    running(db, 1)
    first.kill()
    second = serve(lease_seconds=3)
    ended(db, 1, seconds=90)
    second.stop()
    lines = lines_of(second, "1")
    assert lines[0]["event"] == "task taken back"
    assert {line["trace_id"] for line in lines} == {TRACE}


def test_what_is_no_trace_is_noted_and_the_task_runs(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """Unknown fields of documents are never a reason to reject one; the task's own log says what was wrong."""
    service = serve()
    for number, bad in enumerate(("nonsense", 5, "x" * 2_000_000, {"deep": [1] * 5000}), 1):
        db.DL_TASK.insert_one(train_request(number, traceparent=bad, tracestate=bad))
        document = ended(db, number)
        assert (document["status"], document["traceparent"]) == ("SUCCEEDED", bad)
        [noted] = [line for line in lines_of(service, str(number)) if line["event"] == "trace ignored"]
        assert noted["reason"].startswith("traceparent is ")
        assert "trace_id" not in noted
        wait_for(lambda number=number: "trace ignored" in str(db.DL_TASK_LOG.find_one({"_id": number})))
