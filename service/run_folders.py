"""The folder in which a worker's attempts work, held by a lock, so that what a dead worker left can be told apart."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def run_folder(cache_dir: Path, owner: str) -> Iterator[Path]:
    """`cache_dir/runs/owner`, removed at the end; so are the folders of workers that died without doing so.

    A lock, not a process number: several containers can share the volume, and their numbers mean nothing to others.
    """
    runs = cache_dir / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    for lock in runs.glob("*.lock"):
        held = _lock(lock)
        if held is not None:
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
            os.close(held)
    own = runs / f"{owner}.lock"
    held = _lock(own)
    folder = own.with_suffix("")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        own.unlink(missing_ok=True)
        if held is not None:
            os.close(held)


def _lock(path: Path) -> int | None:
    """An open, locked descriptor, or None if somebody holds it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
