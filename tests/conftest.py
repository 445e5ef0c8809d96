"""What the tests share: one real replica set for the whole run, a database for each test."""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal
from pymongo import MongoClient
from pymongo.database import Database

from service.embedded import embedded_mongo
from tests.helpers import Service, services

if "PYTEST_XDIST_WORKER" in os.environ:
    # Other tests run beside: torch's threads, which wait for each other, would take the cores from them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """PyMongo's asynchronous client needs asyncio."""
    return "asyncio"


@pytest.fixture(scope="session")
def mongo_uri() -> Iterator[str]:
    """The URI of a one-node replica set. Where it cannot start, the tests that need it fail: none is skipped."""
    with start_blocking_portal("asyncio") as portal, portal.wrap_async_context_manager(embedded_mongo()) as uri:
        yield uri


@pytest.fixture
def roomy(mongo_uri: str) -> Iterator[None]:
    """More memory for the server that all tests share: its own is small, and gives way under documents of 16 MB."""
    with MongoClient(mongo_uri) as client:
        client.admin.command("setParameter", 1, wiredTigerEngineRuntimeConfig="cache_size=1500M")
        yield
        client.admin.command("setParameter", 1, wiredTigerEngineRuntimeConfig="cache_size=256M")


@pytest.fixture
def database_name(mongo_uri: str) -> Iterator[str]:
    """The name of a database of the test's own, dropped after it."""
    name = f"test_{uuid.uuid4().hex[:16]}"
    yield name
    with MongoClient(mongo_uri) as client:
        client.drop_database(name)


@pytest.fixture
def dltask_env(mongo_uri: str, database_name: str, tmp_path: Path) -> dict[str, str]:
    """The environment for a `dltask` that is run as a program, on the test's own database and cache."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("DLTASK_")}
    return env | {
        "DLTASK_MONGODB_URI": mongo_uri,
        "DLTASK_DATABASE": database_name,
        "DLTASK_CACHE_DIR": str(tmp_path / "cache"),
        "DLTASK_HTTP_PORT": "off",  # many workers, one machine
    }


@pytest.fixture(scope="session")
def shared_datasets() -> Path:
    """The folder of real data sets beside the checkout; only a developer's machine may lack it."""
    path = Path(__file__).resolve().parents[2] / "shared" / "datasets"
    if not path.is_dir():
        reason = f"the data sets are not at {path}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture
def db(mongo_uri: str, database_name: str) -> Iterator[Database[dict[str, Any]]]:
    """The test's database as a client sees it."""
    with MongoClient(mongo_uri, tz_aware=True) as client:
        yield client[database_name]


@pytest.fixture
def serve(dltask_env: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Starts services, see `helpers.services`; they end with the test."""
    with services(dltask_env, tmp_path, "service") as start:
        yield start
