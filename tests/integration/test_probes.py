"""The probes of Kubernetes: alive is that the event loop turns, ready is that this worker takes work."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from pymongo.database import Database

from tests.failpoints import away, on_command
from tests.helpers import Service, running, train_request, wait_for
from tests.scrape import address, get

Db = Database[dict[str, Any]]
Serve = Callable[..., Service]


@pytest.fixture(scope="module")
def mongo_uri(start_mongod: Callable[..., str]) -> str:
    """A server that fails on command, instead of the one that all tests share."""
    return start_mongod("--setParameter", "enableTestCommands=1")


def ready(url: str) -> None:
    """Wait until the worker takes work."""
    wait_for(lambda: get(f"{url}/readyz") == (200, "ok\n"), 60)


def test_a_drained_worker_is_not_ready(db: Db, serve: Serve, image_ids: list[ObjectId]) -> None:
    """Ready once it serves; not while it drains, when it is still alive."""
    service = serve(http_port=0, grace_seconds=60)
    url = address(service)
    ready(url)
    assert get(f"{url}/livez") == (200, "ok\n")
    db.DL_TASK.insert_one(train_request(1, model_name="deaf", iterations=1000))
    running(db, 1)
    ready(url)
    service.process.send_signal(signal.SIGTERM)
    wait_for(lambda: get(f"{url}/readyz") == (503, "draining\n"))
    assert get(f"{url}/livez") == (200, "ok\n")
    service.kill()


def test_without_the_database_it_is_alive_and_not_ready(db: Db, serve: Serve) -> None:
    """A restart would mend nothing; it is ready by itself when the database is back."""
    url = address(serve(http_port=0))
    ready(url)
    with away(db):
        wait_for(lambda: get(f"{url}/readyz") == (503, "the database does not answer\n"), 60)
        assert get(f"{url}/livez") == (200, "ok\n")
    ready(url)


def test_without_the_change_stream_it_is_not_ready(db: Db, serve: Serve) -> None:
    """Work goes on by the sweep, but new documents wait for it: whoever rolls out a new version should know."""
    url = address(serve(http_port=0, sweep_seconds=600))
    ready(url)
    # NotWritablePrimary would be resumed by the driver; a refusal of each new stream cannot be.
    with on_command(db, "getMore", "aggregate", errorCode=13):
        wait_for(lambda: get(f"{url}/readyz") == (503, "the change stream is not open\n"), 60)
        assert get(f"{url}/livez") == (200, "ok\n")
    ready(url)


def test_a_worker_whose_machine_failed_is_not_ready(
    db: Db, serve: Serve, image_ids: list[ObjectId], dltask_env: dict[str, str]
) -> None:
    """It claims nothing for a while, and says so."""
    cache = Path(dltask_env["DLTASK_CACHE_DIR"])
    cache.mkdir()
    (cache / "images").write_text("a file where a folder belongs")
    url = address(serve(http_port=0))
    ready(url)
    db.DL_TASK.insert_one(train_request(1))
    wait_for(lambda: get(f"{url}/readyz") == (503, "resting after a fault of this machine\n"))
    assert get(f"{url}/livez") == (200, "ok\n")
    ready(url)
