"""What the tests of the page share: a browser, a worker that serves the page, and a database that can go away."""

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from playwright.sync_api import Browser, Page, expect, sync_playwright
from pymongo import MongoClient
from pymongo.database import Database

from handlers.store import replica_set
from service.embedded import find_mongod
from tests.helpers import Service, wait_for

_ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)

#: For what a page is to do or to show, on a machine that has other things to do.
_PATIENCE_MS = 30_000
expect.set_options(timeout=_PATIENCE_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's chromium. Only a developer's machine may lack it."""
    chromium = shutil.which("chromium")
    if chromium is None:
        reason = "there is no chromium (apt-get install chromium fonts-dejavu-core)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    # Ended with each module: while it runs, this thread has an event loop, and asynchronous tests want their own.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(_ARGUMENTS))
        yield browser
        browser.close()


@dataclass
class Looker:
    """A person at the browser, and all that went wrong there."""

    page: Page
    #: Dialogs, errors of scripts, and what the console says: a policy that was violated, a file that is missing.
    trouble: list[str] = field(default_factory=list)


@pytest.fixture
def look(browser: Browser) -> Iterator[Callable[..., Looker]]:
    """Opens a browser window; at the end nothing may have gone wrong in any, but what a test took from `trouble`."""
    lookers: list[Looker] = []
    contexts = []

    def open_window(*, width: int = 1280, height: int = 800, scheme: str = "light") -> Looker:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        looker = Looker(context.new_page())
        lookers.append(looker)
        looker.page.set_default_timeout(_PATIENCE_MS)
        looker.page.on("dialog", lambda dialog: (looker.trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        looker.page.on("pageerror", lambda error: looker.trouble.append(f"error: {error}"))
        looker.page.on("console", lambda message: looker.trouble.append(f"console: {message.text}"))
        return looker

    yield open_window
    for context in contexts:
        context.close()
    assert [trouble for looker in lookers for trouble in looker.trouble] == []


def address(service: Service) -> str:
    """Where a service that was started with `http_port=0` serves its page."""

    def served() -> int | None:
        lines = [json.loads(line) for line in service.log.read_text().splitlines() if '"http served"' in line]
        return lines[0]["port"] if lines else None

    return f"http://127.0.0.1:{wait_for(served)}"


@pytest.fixture
def site(serve: Callable[..., Service]) -> str:
    """The address of a worker's page."""
    return address(serve(http_port=0))


@dataclass
class OwnDatabase:
    """A server of the test's own, which can be made to say nothing."""

    uri: str
    process: subprocess.Popen[bytes]

    def silent(self) -> None:
        """Answer nothing any more."""
        self.process.send_signal(signal.SIGSTOP)

    def back(self) -> None:
        """Answer again."""
        self.process.send_signal(signal.SIGCONT)


@pytest.fixture
def own_database(tmp_path: Path) -> Iterator[OwnDatabase]:
    """A one-node replica set that no other test uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    folder = tmp_path / "mongod"
    folder.mkdir()
    command = [str(find_mongod()), "--dbpath", str(folder), "--port", str(port), "--bind_ip", "127.0.0.1"]
    command += ["--replSet", replica_set.SET_NAME, "--nounixsocket", "--quiet", "--wiredTigerCacheSizeGB", "0.25"]
    with (tmp_path / "mongod.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            wait_for(lambda: replica_set.become_primary(port, process.pid), 60)
            yield OwnDatabase(replica_set.uri_of(port), process)
        finally:
            process.kill()


@pytest.fixture
def image_ids(db: Database[dict[str, Any]]) -> list[ObjectId]:
    """An image of the data set `toy`, with a label."""
    from gridfs import GridFSBucket

    file_id = GridFSBucket(db, "images").upload_from_stream("a.jpg", b"not really a picture")
    image = {"file_name": "a.jpg", "width": 32, "height": 32, "file_id": file_id, "dataset": "toy", "split": "train"}
    image_id = db.IMG_INFO.insert_one(image).inserted_id
    db.IMG_LAB_INFO.insert_one({"img_id": image_id, "class_name": "a", "bbox": [1, 1, 8, 8]})
    return [image_id]


@pytest.fixture
def client(mongo_uri: str) -> Iterator[MongoClient[dict[str, Any]]]:
    """The server that all tests share, as an administrator sees it."""
    with MongoClient(mongo_uri) as client:
        yield client
