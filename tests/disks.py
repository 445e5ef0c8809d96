"""A disk of a few megabytes, to be really full."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[Path]:
    """A tmpfs at `path`. Where mounting is not permitted (it takes root) the test fails in CI, and skips elsewhere."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = f"no tmpfs can be mounted here: {done.stderr.strip()}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def resize(path: Path, megabytes: int) -> None:
    """Give the disk another size."""
    subprocess.run(["mount", "-o", f"remount,size={megabytes}m", str(path)], check=True)


def fill(path: Path, *, leave: int) -> Path:
    """Fill the disk at `path` up to `leave` bytes; returns the file that fills it."""
    filler = path / "filler"
    status = os.statvfs(path)
    filler.write_bytes(bytes(max(status.f_bavail * status.f_frsize - leave, 0)))
    return filler
