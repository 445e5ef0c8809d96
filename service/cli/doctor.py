"""`dltask doctor`: what a service needs, checked one by one, each with what to do about it."""

import os
import shutil
import subprocess
from dataclasses import dataclass

import anyio.to_thread

from handlers.errors import StartupError
from handlers.store import Store, connect_store
from handlers.store.database import StoreError, brief, masked
from service.secrecy import child_environment
from service.settings import Settings


@dataclass(frozen=True)
class Check:
    """One thing looked at. `fix` says what to do, and is empty where there is nothing to do."""

    name: str
    ok: bool
    found: str
    fix: str = ""


async def examine(settings: Settings) -> list[Check]:
    """Every check, in the order in which they should be mended."""
    uri = settings.mongodb_uri.get_secret_value()
    checks = [Check("settings", True, f"database {settings.database} at {masked(uri, uri)}")]
    try:
        async with connect_store(uri, settings.database) as store:
            checks += await _database(store, uri)
    except StartupError as error:
        checks.append(Check("database", False, masked(str(error), uri), "set DLTASK_MONGODB_URI"))
    checks.append(_cache(settings))
    checks.append(await anyio.to_thread.run_sync(_gpu, settings))
    return checks


async def _database(store: Store, uri: str) -> list[Check]:
    try:
        await store.database.check()
        checks = [Check("database", True, "answers; a replica set, 5.0 or newer")]
        missing = await store.database.missing_indexes()
        workers = await store.workers.all()
    except StartupError as error:
        return [Check("database", False, *_halves(masked(str(error), uri)))]
    except StoreError as error:
        fix = "give the user of DLTASK_MONGODB_URI the role readWrite on the database"
        return [Check("database", False, masked(brief(error), uri), fix)]
    if missing:
        # Not a fault: a new database has none, and the service creates them when it starts.
        checks.append(Check("indexes", True, f"missing {', '.join(missing)}", "`dltask serve` creates them"))
    else:
        checks.append(Check("indexes", True, "all there"))
    alive = f"{len(workers)} alive" if workers else "none alive"
    checks.append(Check("workers", True, alive, "" if workers else "start one with `dltask serve`"))
    return checks


def _halves(message: str) -> tuple[str, str]:
    found, _, fix = message.partition("; ")
    return found, fix


def _cache(settings: Settings) -> Check:
    # The nearest folder that exists: the service makes the rest.
    folder = next(path for path in (settings.cache_dir, *settings.cache_dir.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    fix = "make it writable, or set DLTASK_CACHE_DIR"
    if not os.access(folder, os.W_OK):
        return Check("cache", False, f"{settings.cache_dir} cannot be written", fix)
    found = f"{settings.cache_dir}, {free / 2**30:.1f} GiB free"
    if free < 2**30:
        return Check("cache", False, found, "free at least 1 GiB, or set DLTASK_CACHE_DIR")
    return Check("cache", True, found)


def _gpu(settings: Settings) -> Check:
    fallback = settings.gpu_fallback == "cpu"
    without = "" if fallback else "tasks for a GPU wait for another worker; DLTASK_GPU_FALLBACK=cpu runs them here"
    program = shutil.which("nvidia-smi")
    if program is None:
        return Check("GPU", True, "none (no nvidia-smi)" + (", falls back to the CPU" if fallback else ""), without)
    try:
        environment = child_environment(settings.mongodb_uri.get_secret_value())
        listed = subprocess.run(
            [program, "-L"], env=environment, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("GPU", False, f"nvidia-smi does not answer: {error}", "look after the driver")
    gpus = [line.split(" (UUID")[0] for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    if listed.returncode != 0:
        said = (listed.stderr or listed.stdout).strip().splitlines()
        return Check("GPU", False, f"nvidia-smi: {said[0] if said else listed.returncode}", "look after the driver")
    return Check("GPU", True, "; ".join(gpus)) if gpus else Check("GPU", True, "none", without)
