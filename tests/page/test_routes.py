"""What the page answers, as any client sees it: read-only, with its headers, and only what it is meant to serve."""

import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import pytest
from bson import ObjectId
from gridfs import GridFSBucket
from pymongo.database import Database

from service.web.live import MOST_VIEWERS
from tests.helpers import wait_for
from tests.page.documents import ended, result

Db = Database[dict[str, Any]]

PNG = b"\x89PNG\r\n\x1a\n" + b"no real picture"
REPORT = b"<!doctype html>\n<title>x</title>"
PAGES = ("/", "/?state=NEW&page=2", "/tasks/1", "/models", "/workers", "/static/page.css", "/static/page.js")


def asked(url: str, method: str = "GET") -> tuple[int, Message, bytes]:
    """Status, headers and body, whatever the status."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method)) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def test_every_answer_carries_the_policy(db: Db, site: str) -> None:
    """Pages, files and refusals: our own files only, no sniffing, no referrer, in nobody's frame."""
    db.DL_TASK.insert_one(ended(1))
    missing = ("/tasks/2", "/tasks/~x", "/models/none", "/reports/x", "/static/x", "/?state=x", "/?page=0", "/?page=x")
    for path in (*PAGES, *missing):
        status, headers, _ = asked(site + path)
        assert status == (200 if path in PAGES else 404), path
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_no_foreign_name_leads_to_a_page_of_this_machine(site: str) -> None:
    """A site whose name resolves to 127.0.0.1 cannot read the page: it is asked for by an address, or as localhost."""
    port = urlsplit(site).port
    for host, status in ((f"evil.example:{port}", 421), ("localhost", 200), (f"[::1]:{port}", 200), ("10.0.0.1", 200)):
        connection = HTTPConnection(urlsplit(site).netloc)
        connection.request("GET", "/", headers={"Host": host})
        answer = connection.getresponse()
        assert (answer.status, host) == (status, host)
        assert answer.getheader("content-security-policy")
        connection.close()


def test_nothing_can_be_changed(db: Db, site: str) -> None:
    """GET and HEAD, and no other method."""
    db.DL_TASK.insert_one(ended(1))
    for path in (*PAGES, "/events", f"/reports/{ObjectId()}"):
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            assert asked(site + path, method)[0] == 405
    assert asked(f"{site}/tasks/1", "HEAD")[0] == 200
    # Nor is there a form or a link that would.
    for path in ("/", "/tasks/1"):
        html = asked(site + path)[2].decode()
        assert not re.search(r'method="post"', html, re.IGNORECASE)


def test_pages_need_no_other_server(db: Db, site: str) -> None:
    """Each address in a page and its style is one of this worker."""
    db.DL_TASK.insert_one(ended(1))
    for path in PAGES:
        text = asked(site + path)[2].decode()
        assert not re.search(r"(?:src|href|url|@import)\W{1,3}(?:https?:)?//", text)


def test_files_are_kept_while_they_are_the_same(site: str) -> None:
    """Under the address that a page names a file never changes; under its plain name it is asked for again."""
    html = asked(site)[2].decode()
    for address in re.findall(r'"(/static/[^"]+)"', html):
        assert "immutable" in asked(site + address)[1]["cache-control"]
        assert asked(site + address.partition("?")[0])[1]["cache-control"] == "no-cache"
    assert asked(site)[1]["cache-control"] == "no-store"


def test_reports_are_served_by_what_they_are(db: Db, site: str) -> None:
    """A picture as a picture; what somebody calls one, and is none, is a file to save; other buckets are closed."""
    reports, models = GridFSBucket(db, "reports"), GridFSBucket(db, "models")
    picture = reports.upload_from_stream("a.html", PNG, metadata={"contentType": "text/html"})
    status, headers, body = asked(f"{site}/reports/{picture}")
    assert (status, headers["content-type"], body) == (200, "image/png", PNG)
    assert "immutable" in headers["cache-control"]
    for content in (b"<script>alert(1)</script>", b"<svg onload='alert(1)'/>", b""):
        other = reports.upload_from_stream("b.png", content, metadata={"contentType": "image/png"})
        status, headers, body = asked(f"{site}/reports/{other}")
        assert (status, headers["content-type"]) == (200, "application/octet-stream")
        assert headers["content-disposition"].startswith("attachment")
    assert asked(f"{site}/reports/{models.upload_from_stream('model.onnx', b'x')}")[0] == 404
    large = reports.upload_from_stream("large.png", PNG)
    db["reports.files"].update_one({"_id": large}, {"$set": {"length": 2**40}})
    assert asked(f"{site}/reports/{large}")[0] == 404
    db["reports.files"].update_one({"_id": large}, {"$set": {"length": "x"}})
    assert asked(f"{site}/reports/{large}")[0] == 404
    db["reports.chunks"].delete_many({"files_id": picture})
    assert asked(f"{site}/reports/{picture}")[0] == 404
    assert asked(f"{site}/reports/{ObjectId()}")[0] == 404


def test_a_report_has_no_part_in_the_page(db: Db, site: str) -> None:
    """It is shown as the page that it is, in a sandbox: no script, no form, no file of elsewhere, in nobody's frame."""
    report = GridFSBucket(db, "reports").upload_from_stream("report.html", REPORT)
    db.DL_TASK.insert_one(ended(1, result=result(reports={"report.html": str(report), "x.png": str(ObjectId())})))
    html = asked(f"{site}/tasks/1")[2].decode()
    assert f'<a href="/reports/{report}">' in html
    assert f'<img src="/reports/{report}"' not in html
    status, headers, body = asked(f"{site}/reports/{report}")
    assert (status, headers["content-type"], body) == (200, "text/html; charset=utf-8", REPORT)
    policy = [part.strip() for part in headers["content-security-policy"].split(";")]
    assert {"default-src 'none'", "img-src data:", "form-action 'none'", "sandbox"} <= set(policy)
    assert not any("script" in part for part in policy)
    assert headers.get_all("content-security-policy") == [headers["content-security-policy"]]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-disposition"] is None


@pytest.fixture
def streams(site: str) -> Iterator[list[HTTPConnection]]:
    """As many open streams of events as there may be."""
    opened = []
    for _ in range(MOST_VIEWERS):
        connection = HTTPConnection(urlsplit(site).netloc)
        connection.request("GET", "/events?rows=1,2&task=1")
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.getheader("content-type", "").startswith("text/event-stream")
        assert answer.readline() == b"retry: 3000\n"
        opened.append(connection)
    yield opened
    for connection in opened:
        connection.close()


def test_so_many_may_look_and_no_more(site: str, streams: list[HTTPConnection]) -> None:
    """One stream more is refused, pages are still served; when one is closed there is room again."""
    assert asked(f"{site}/events")[0] == 503
    assert asked(site)[0] == 200
    streams.pop().close()

    def room() -> bool:
        connection = HTTPConnection(urlsplit(site).netloc)
        connection.request("GET", "/events")
        status = connection.getresponse().status
        connection.close()
        return status == 200

    assert wait_for(room)


def test_an_address_of_any_form_is_answered(site: str) -> None:
    """Whatever is asked for: an answer, and not a fault of ours."""
    words = ("%00", "%ff", "..%2f..", "%E2%80%AE", "9" * 30, "-1", "1e9", "~" + "A" * 3000, "%3Cscript%3E", "a/b")
    for word in words:
        for path in (f"/tasks/{word}", f"/models/{word}", f"/reports/{word}", f"/?page={word}", f"/?state={word}"):
            assert asked(site + path)[0] == 404, path
        for query in (f"rows={word}&task={word}", f"rows=,,{word},"):
            connection = HTTPConnection(urlsplit(site).netloc)
            connection.request("GET", f"/events?{query}")
            assert connection.getresponse().status == 200
            connection.close()


def test_a_model_s_card_is_shown(db: Db, site: str) -> None:
    """Of the newer of the two versions that are compared; one without a card, or with another thing there, has less."""
    parameters = {"max_num_iters": 300, "dataset_expansion_lst": []}
    card = {"recipe": "SGD, <b>one</b> cycle.", "parameters": parameters, "versions": {"torch": "2.14.1"}}
    for version, more in ((1, {}), (2, {"card": card}), (3, {"card": "x" * 10**6})):
        db.DL_MODEL.insert_one({"model_name": "cells", "version": version, "task_id": version, **more})
    _, _, body = asked(f"{site}/models/cells?a=1&b=2")
    none, number = "<dt>dataset_expansion_lst</dt><dd>none</dd>", "<dt>max_num_iters</dt><dd>300</dd>"
    for words in ("SGD, &lt;b&gt;one&lt;/b&gt; cycle.", none, number, "<dt>torch</dt><dd>2.14.1</dd>"):
        assert words in body.decode()
    for version in (1, 3):
        status, _, body = asked(f"{site}/models/cells?a=2&b={version}")
        assert (status, f"by task {version}" in body.decode(), "Recipe" in body.decode()) == (200, True, False)
