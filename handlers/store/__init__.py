"""Every MongoDB call, one file a collection. The only package that imports pymongo."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from handlers.store.database import Database, StoreError, connect
from handlers.store.files import Files
from handlers.store.indexes import Indexes
from handlers.store.models import Models
from handlers.store.overview import Overview
from handlers.store.records import Records
from handlers.store.results import TestResults
from handlers.store.tasks import LEASE_SECONDS, Tasks
from handlers.store.traces import Traces
from handlers.store.workers import Workers


@dataclass(frozen=True)
class Store:
    """The collections, wired to one database."""

    database: Database
    indexes: Indexes
    tasks: Tasks
    overview: Overview
    records: Records
    models: Models
    results: TestResults
    traces: Traces
    workers: Workers
    files: Files


def open_store(database: Database, *, lease_seconds: float = LEASE_SECONDS) -> Store:
    """The store over `database`."""
    return Store(
        database=database,
        indexes=Indexes(database),
        tasks=Tasks(database, lease_seconds=lease_seconds),
        overview=Overview(database),
        records=Records(database),
        models=Models(database),
        results=TestResults(database),
        traces=Traces(database),
        workers=Workers(database),
        files=Files(database),
    )


@asynccontextmanager
async def connect_store(
    uri: str,
    name: str,
    *,
    lease_seconds: float = LEASE_SECONDS,
    failed: Callable[[StoreError], None] = lambda error: None,
) -> AsyncIterator[Store]:
    """The store over the database `name` at `uri`, closed at the end. Raises StartupError for a URI that is none.

    `failed` is told of every operation that raises, whatever becomes of it.
    """
    async with connect(uri, name, failed=failed) as database:
        yield open_store(database, lease_seconds=lease_seconds)
