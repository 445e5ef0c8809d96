"""Whatever stands in a document, nothing of it runs, nothing breaks the page, and the page is shown."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from bson import Decimal128, Int64, MaxKey, ObjectId, Regex
from gridfs import GridFSBucket
from playwright.sync_api import expect
from pymongo.database import Database

from tests.fuzz.raw_bson import Pairs, old_binary, raw_document, text
from tests.page.conftest import Looker
from tests.page.documents import ended, result

Db = Database[dict[str, Any]]

EVIL = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=alert(3)>"
    "<style>body{display:none}</style>{{ 7 * 7 }}\u202e\u2066\x00\x1b[31m</td></table></main>"
)
TOWER = "Z" + "\u0310\u0311\u0312\u0313" * 200
LONG = "W" * 10_240
RTL = "\u05d0\u05d1\u05d2 123 \u0627\u0628"


def everywhere(value: Any) -> dict[str, Any]:
    """An ended task with `value` in each place where a text belongs."""
    whole = result(model_name=value, notes=[value], initial_weights=value, class_names=[value], device=value)
    whole["metrics"]["on"] = value
    whole["metrics"]["confusion"]["labels"] = [value, value, value, value]
    whole["metrics"]["worst"] = [{"img_id": value, "missed": value, "false": value}]
    for entry in whole["metrics"]["per_class"]:
        entry["class_name"] = value
    whole["images"]["skipped_examples"] = [{"img_id": value, "reason": value}]
    whole["reports"] = {"x" if "\x00" in str(value) else str(value)[:100]: str(ObjectId())}
    return {
        "param_request": {"model_name": value, "net_model": value, "dataset_expansion_lst": [value]},
        "error": {"kind": value, "message": value, "field": value},
        "history": [{"status": value, "at": value, "owner": value, "reason": value, "attempt": value}],
        "owner": value,
        "dataset": value,
        "split": value,
        "json_mongodb_id": value,
        "result": whole,
        "progress": {"iteration": value, "max_num_iters": value},
    }


def log_of(number: int, value: str) -> dict[str, Any]:
    lines = [{"event": value, "level": value, "timestamp": value, "attempt": value, "owner": value, value[:50]: value}]
    return {"_id": number, "lines": [json.dumps(line) for line in lines] + [value]}


PLACES = ["/", "/tasks/1", "/tasks/2", "/tasks/3", "/tasks/4", "/models", "/workers"]


@pytest.mark.parametrize("width", [1280, 360])
def test_hostile_texts_are_shown_and_not_obeyed(db: Db, site: str, look: Callable[..., Looker], width: int) -> None:
    """In each field of a task, a model, a worker and the log: no script, no element, no reversed or endless line."""
    for number, value in enumerate((EVIL, TOWER, LONG, RTL), 1):
        db.DL_TASK.insert_one(ended(number, "SUCCEEDED", kind=value, **everywhere(value)))
        db.DL_TASK_LOG.insert_one(log_of(number, value))
        model = {"model_name": value[:200].replace("\x00", ""), "version": 1, "task_id": number, "net_model": value}
        metrics = {"map": 0.5, "on": value, "per_class": [{"class_name": value, "map": 0.5}]}
        db.DL_MODEL.insert_one({**model, "metrics": metrics, "class_names": [value], "data_fingerprint": value})
        worker = {"_id": f"w{number}", "host": value, "version": value, "devices": {"CPU": value}, "running": [value]}
        db.DL_WORKER.insert_one({**worker, "renewed_at": datetime.now(UTC)})
    looker = look(width=width)
    page = looker.page
    for path in PLACES:
        page.goto(site + path)
        assert page.locator("main").is_visible()
        assert (
            page.evaluate(
                "document.querySelectorAll('main script, main img[src=x], main style, main svg[onload]').length"
            )
            == 0
        )
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        seen = page.locator("body").inner_text()
        assert not any(mark in seen for mark in "\u202e\u2066\x1b\x00")
        assert "49" not in page.locator("h1").inner_text()
    page.goto(f"{site}/tasks/1")
    expect(page.locator("h1")).to_contain_text("<script>alert(1)</script>")
    for link in ("/models",):
        page.goto(site + link)
        page.locator("tbody a").first.click()
        expect(page.locator("h1")).to_be_visible()
    # The picture whose id stands in the documents is nowhere.
    looker.trouble[:] = [trouble for trouble in looker.trouble if "404" not in trouble]


def test_a_hostile_report_is_shown_and_does_nothing(db: Db, site: str, look: Callable[..., Looker]) -> None:
    """Even one whose author escaped nothing: a child that was led astray may write anything."""
    evil = b"<!doctype html>\n<h1>report</h1><script>document.title = 'ran'; parent.ran = true</script>"
    evil += b"<img src='data:,' onerror=\"document.title = 'ran'\"><img src='/static/icon.svg' id='foreign'>"
    report = GridFSBucket(db, "reports").upload_from_stream("report.html", evil)
    db.DL_TASK.insert_one(ended(1, result=result(reports={"report.html": str(report)})))
    looker = look()
    page = looker.page
    page.goto(f"{site}/tasks/1")
    page.get_by_role("link", name="The whole report").click()
    expect(page.locator("h1")).to_have_text("report")
    assert page.title() != "ran"
    assert page.evaluate("document.getElementById('foreign').naturalWidth") == 0
    assert page.evaluate("origin") == "null"
    assert looker.trouble
    looker.trouble.clear()


def test_the_policy_stops_what_escaping_would_let_through(db: Db, site: str, look: Callable[..., Looker]) -> None:
    """Were a script in the page after all, the browser would not run it: nor one of another server, nor a style."""
    looker = look()
    page = looker.page
    page.goto(site)
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend", "<img src='data:,' onerror='window.ran = true'>");
            document.body.insertAdjacentHTML("beforeend", "<p style='color: red' onclick='window.ran = true'>x</p>");
        }"""
    )
    assert page.evaluate("window.ran") is None
    assert len(looker.trouble) >= 3
    assert all("Content Security Policy" in trouble for trouble in looker.trouble)
    looker.trouble.clear()


JUNK: list[Any] = [
    *(None, True, 5, -1, 2**40, 1.5, float("nan"), float("inf"), "x", "", [], {}, [1, [2]], {"a": {"b": 1}}),
    *(Int64(2**63 - 1), Decimal128("NaN"), Decimal128("1E+6000"), datetime(1, 1, 1), datetime(9999, 12, 31)),
    *(ObjectId(), b"\x00\xff", Regex("x"), MaxKey(), text(b"\xff\xfe"), Pairs((("a", 1), ("a", 2)))),
    *([{"map": "x", "precision_at_recall": [1, "x", None]}], {"labels": [1, 2], "counts": [[1, "x"], [None, {}]]}),
    old_binary(99, b"ab"),
]

FIELDS = (
    *("task_type", "status", "error_code", "attempt", "priority", "owner", "create_time", "start_time", "end_time"),
    *("not_before", "cancel_requested", "failures", "param_request", "progress", "history", "result", "error"),
    *("snapshot", "dataset", "split", "runs_alone", "batch_size_limit", "img_mongodb_ids", "traceparent"),
)


def fetched(url: str) -> tuple[int, str]:
    with urllib.request.urlopen(url) as answer:
        return answer.status, answer.read().decode()


def test_documents_of_any_shape_have_their_page(db: Db, site: str, image_ids: list[ObjectId]) -> None:
    """Each field of an ended, a running and a waiting task, and of its result, changed by hand into each type."""
    number = 0
    for value in JUNK:
        for place, name in enumerate(FIELDS):
            number += 1
            document = ended(number, ("SUCCEEDED", "FAILED")[place % 2], result=result())
            db.get_collection("DL_TASK").insert_one(raw_document(document | {name: value}))
        number += 1
        whole = result() | dict.fromkeys(result(), value)
        db.get_collection("DL_TASK").insert_one(raw_document(ended(number, result=whole)))
        number += 1
        metrics = dict.fromkeys(result()["metrics"], value)
        db.get_collection("DL_TASK").insert_one(raw_document(ended(number, result=result(metrics=metrics))))
        number += 1
        entries = [dict.fromkeys(result()["metrics"]["per_class"][0], value)]
        metrics = result()["metrics"] | {"per_class": entries}
        db.get_collection("DL_TASK").insert_one(raw_document(ended(number, result=result(metrics=metrics))))
        db.get_collection("DL_TASK_LOG").insert_one(raw_document({"_id": number, "lines": [value, "{", "[1]", "null"]}))
        measured = {"_id": {"task": number, "iteration": value}, "loss": value, "map": value}
        db.get_collection("DL_TASK_METRIC").insert_one(raw_document(measured))
    for one in range(1, number + 1):
        status, html = fetched(f"{site}/tasks/{one}")
        assert status == 200
        # Of a document that no driver can read, the last of JUNK makes one of each, only its place is known.
        assert f"Task {one}" in html or one > number - len(FIELDS) - 3
    pages = -(-number // 50)
    for one in range(1, pages + 1):
        status, html = fetched(f"{site}/?page={one}")
        assert status == 200
        assert len(html) < 200_000


def test_models_and_workers_of_any_shape(db: Db, site: str) -> None:
    """The same for the registry and the list of workers."""
    for number, value in enumerate(JUNK):
        names = ("net_model", "metrics", "class_names", "parent_version", "create_time", "input_size")
        model = {"model_name": f"m{number}", "version": 1, "task_id": number, **dict.fromkeys(names, value)}
        db.get_collection("DL_MODEL").insert_one(raw_document({"_id": ObjectId(), **model}))
        metrics = {"map": value, "map_50": value, "per_class": [{"class_name": value, "map": value}, value]}
        other = model | {"version": 2, "task_id": 1000 + number, "metrics": metrics}
        db.get_collection("DL_MODEL").insert_one(raw_document({"_id": ObjectId(), **other}))
        odd = {"model_name": value, "version": number, "task_id": 2000 + number}
        db.get_collection("DL_MODEL").insert_one(raw_document({"_id": ObjectId(), **odd}))
        shown = ("host", "version", "devices", "free", "running", "resting", "fallback", "pid")
        worker = {"_id": f"w{number}", **dict.fromkeys(shown, value), "renewed_at": datetime.now(UTC)}
        db.get_collection("DL_WORKER").insert_one(raw_document(worker))
    assert fetched(f"{site}/workers")[0] == 200
    assert fetched(f"{site}/models")[0] == 200
    assert fetched(f"{site}/models?page=2")[0] == 200
    for number in range(len(JUNK) - 1):
        assert fetched(f"{site}/models/m{number}")[0] == 200
    # No driver can read the last one.
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetched(f"{site}/models/m{len(JUNK) - 1}")
    assert fetched(f"{site}/")[0] == 200
