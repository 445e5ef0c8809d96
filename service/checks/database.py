"""What a service needs of its database, and what the workers in it say of themselves."""

from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from handlers.errors import StartupError
from handlers.store import Store
from handlers.store.database import Document, StoreError, brief, masked
from schemas.version import SCHEMA_VERSION
from service.checks import Check, halves
from service.settings import Settings

#: Seconds by which a clock may be off before it is worth a word. Nothing but log lines goes by it.
_CLOCK_SECONDS = 5.0


async def database(store: Store, settings: Settings) -> list[Check]:
    """Server, rights, indexes, clocks, workers; only the first where it cannot be used."""
    uri = settings.mongodb_uri.get_secret_value()
    try:
        server = await store.database.check()
        checks = [Check("database", "ok", server)]
        missing = await store.indexes.missing()
        now, workers = await store.database.now(), await store.workers.all()
        newer = await store.tasks.not_understood()
    except StartupError as error:
        return [Check("database", "failed", *halves(masked(str(error), uri)))]
    except StoreError as error:
        fix = "give the user of DLTASK_MONGODB_URI the role dltaskWorker of docs/roles.json (docs/security.md)"
        return [Check("database", "failed", masked(brief(error), uri), fix)]
    return [*checks, _indexes(missing), _clock(now), _workers(workers, settings), *_newer(newer)]


def _indexes(missing: list[str]) -> Check:
    if missing:
        # Not a fault: a new database has none, and the service creates them when it starts.
        return Check("indexes", "ok", f"missing {', '.join(missing)}", "`dltask serve` creates them")
    return Check("indexes", "ok", "all there")


def _clock(now: datetime) -> Check:
    seconds = (datetime.now(UTC) - now).total_seconds()
    if abs(seconds) < _CLOCK_SECONDS:
        return Check("clock", "ok", "agrees with the server's")
    way = "ahead of" if seconds > 0 else "behind"
    found = f"{abs(seconds):.0f} s {way} the server's; no task depends on it, but log lines have that time"
    return Check("clock", "warning", found, "let chrony or systemd-timesyncd set it")


def _workers(workers: list[Document], settings: Settings) -> Check:
    if not workers:
        return Check("workers", "ok", "none alive", "start one with `dltask serve`")
    found = f"{len(workers)} alive"
    leases = {worker["lease_seconds"] for worker in workers if isinstance(worker.get("lease_seconds"), int | float)}
    if odd := sorted(leases - {settings.lease_seconds}):
        others = ", ".join(f"{seconds:g}" for seconds in odd)
        found += f"; DLTASK_LEASE_SECONDS is {settings.lease_seconds:g} here and {others} there"
        fix = "set it alike in the whole fleet: a worker with a shorter one takes tasks from workers that live"
        return Check("workers", "warning", found, fix)
    versions = Counter(str(worker.get("version"))[:50] for worker in workers)
    if set(versions) - {version("dltask")} or any(_schema(worker) != SCHEMA_VERSION for worker in workers):
        listed = ", ".join(f"{count} of {name}" for name, count in sorted(versions.items()))
        found += f" ({listed}; this is {version('dltask')})"
        return Check("workers", "warning", found, "as in a rolling upgrade: finish it soon (docs/upgrading.md)")
    return Check("workers", "ok", found)


def _schema(worker: Document) -> Any:
    return worker.get("schema_version", 1)


def _newer(tasks: int) -> list[Check]:
    if not tasks:
        return []
    found = f"{tasks} waiting or running tasks were written by a newer version and are left alone"
    return [Check("newer tasks", "warning", found, "upgrade the workers (docs/upgrading.md)")]
