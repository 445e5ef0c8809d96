"""While the database is away the page says so, the worker works on, and all is well when it is back."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect
from pymongo import MongoClient

from tests.helpers import Service, running, train_request
from tests.page.conftest import Looker, OwnDatabase, address


@pytest.fixture
def dltask_env(dltask_env: dict[str, str], own_database: OwnDatabase) -> dict[str, str]:
    """On the database that can go away."""
    return dltask_env | {"DLTASK_MONGODB_URI": own_database.uri}


def test_the_page_says_that_the_database_is_away(
    own_database: OwnDatabase, database_name: str, serve: Callable[..., Service], look: Callable[..., Looker]
) -> None:
    """503 and a sentence; an open page keeps what it shows and says that it is old; then it moves again."""
    with MongoClient(own_database.uri) as client:
        db = client[database_name]
        image: dict[str, Any] = {"file_name": "a", "width": 1, "height": 1, "dataset": "toy", "split": "train"}
        from gridfs import GridFSBucket

        image["file_id"] = GridFSBucket(db, "images").upload_from_stream("a", b"x")
        image_id = db.IMG_INFO.insert_one(image).inserted_id
        db.IMG_LAB_INFO.insert_one({"img_id": image_id, "class_name": "a", "bbox": [0, 0, 1, 1]})
        service = serve(http_port=0)
        db.DL_TASK.insert_one(train_request(1, iterations=100_000))
        before = running(db, 1)
        site = address(service)
        looker = look()
        page = looker.page
        page.goto(f"{site}/tasks/1")
        expect(page.locator("#live")).to_have_text("Live")
        own_database.silent()
        try:
            away = page.get_by_role("alert")
            expect(away).to_contain_text("The database does not answer")
            expect(page.locator("h1")).to_contain_text("Task 1")
            for path in ("/", "/tasks/1", "/models", "/workers", "/reports/000000000000000000000000"):
                with pytest.raises(urllib.error.HTTPError) as refused:
                    urllib.request.urlopen(site + path)
                assert refused.value.code == 503
                assert refused.value.headers["retry-after"]
                assert "The database does not answer" in refused.value.read().decode()
            with urllib.request.urlopen(f"{site}/livez") as answer:
                assert answer.status == 200
        finally:
            own_database.back()
        expect(away).to_be_empty()
        value = float(page.locator("progress").first.get_attribute("value") or 0)
        page.wait_for_function("value => document.querySelector('progress').value > value", arg=value)
        after = running(db, 1)
        # The same attempt at the same task: nobody's look has cost it anything.
        assert (after["attempt"], after["owner"]) == (before["attempt"], before["owner"])
        assert service.process.poll() is None
        lines = [json.loads(line) for line in service.log.read_text().splitlines()]
        assert not [line for line in lines if "bug" in line["event"]]
        assert [line for line in lines if line["event"] == "page not read"]
