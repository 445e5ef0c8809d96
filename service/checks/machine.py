"""What a worker needs of its machine: folder, memory, processors, a port."""

import os
import shutil
import socket
import tempfile
from pathlib import Path

from handlers.errors import StartupError
from service.checks import Check
from service.settings import Settings

_GIB = 2**30

#: Free space that images and the folders of running attempts need at the very least.
_LEAST_DISK = 1 * _GIB

#: What one training takes at the default parameters, and what it hardly starts without.
TRAINING_BYTES, _LEAST_BYTES = 4 * _GIB, 1 * _GIB

#: Shared memory through which NCCL passes gradients between the GPUs of one training.
_SHM_BYTES = 1 * _GIB

_CGROUP = Path("/sys/fs/cgroup")
_SHM = Path("/dev", "shm")


def why_no_cache(folder: Path) -> str | None:
    """Why nothing can be written below `folder`, which need not be there yet; None if it can."""
    # The nearest that exists: the service makes the rest. Tried, since root may write where the bits say no, and nobody
    # where the file system is read-only.
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror}" + (f" ({there})" if there != folder else "")


def require_cache(folder: Path) -> None:
    """Raise StartupError unless `folder` can be written."""
    if (problem := why_no_cache(folder)) is not None:
        raise StartupError(f"{problem}; make it writable for this user, or set DLTASK_CACHE_DIR to a folder that is")


def cache(settings: Settings) -> Check:
    """The cache folder: writable, and on a disk with room."""
    folder = settings.cache_dir
    if (problem := why_no_cache(folder)) is not None:
        return Check("cache", "failed", problem, "make it writable for this user, or set DLTASK_CACHE_DIR")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    found = f"{folder}, {_gib(free)} free"
    if free < _LEAST_DISK:
        return Check("cache", "failed", found, "free at least 1 GiB, or set DLTASK_CACHE_DIR to another disk")
    if free < settings.cache_bytes:
        fix = f"DLTASK_CACHE_BYTES is {_gib(settings.cache_bytes)}: set it below what the disk can give"
        return Check("cache", "warning", found, fix)
    return Check("cache", "ok", found)


def shared_memory(gpus: int, folder: Path = _SHM) -> Check:
    """The shared memory that trainings on several GPUs need."""
    try:
        total = shutil.disk_usage(folder).total
    except OSError:
        total = 0
    found = f"{folder}, {_gib(total)}" if total else f"there is no {folder}"
    if gpus > 1 and total < _SHM_BYTES:
        fix = "trainings with device_num above 1 need 1 GiB (docker --shm-size=1g; in Kubernetes an emptyDir in Memory)"
        return Check("shared memory", "warning", found, fix)
    return Check("shared memory", "ok", found)


def memory(tasks: int, cgroup: Path = _CGROUP) -> Check:
    """Memory for as many tasks at once as this worker has devices; a container's limit counts, not the machine's."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _limit(cgroup)
    total = min(machine, limit or machine)
    found = f"{_gib(total)}{' (limit of the container)' if limit and limit < machine else ''}"
    found += f" for {tasks} task{'s' if tasks != 1 else ''} at once"
    fix = (
        f"a training takes about {_gib(TRAINING_BYTES)}: raise the limit, or lower DLTASK_CPU_DEVICES or the batch size"
    )
    if total < _LEAST_BYTES:
        return Check("memory", "failed", found, fix)
    return Check("memory", "ok", found) if total >= tasks * TRAINING_BYTES else Check("memory", "warning", found, fix)


def processors(settings: Settings, cgroup: Path = _CGROUP) -> Check:
    """Processor cores against the tasks that share them; a container's quota counts."""
    cores = float(len(os.sched_getaffinity(0)))
    quota = _quota(cgroup)
    found = f"{min(cores, quota or cores):g} core{'s' if min(cores, quota or cores) != 1 else ''}"
    found += " (quota of the container)" if quota and quota < cores else ""
    if settings.cpu_devices > min(cores, quota or cores):
        fix = f"DLTASK_CPU_DEVICES is {settings.cpu_devices}: more CPU tasks at once than cores only slow each other"
        return Check("processors", "warning", found, fix)
    return Check("processors", "ok", found)


def http_port(settings: Settings) -> Check:
    """The port of probes, metrics and page: free, or served by a worker already."""
    if settings.http_port in ("off", 0):
        return Check("http", "ok", "off" if settings.http_port == "off" else "any free port")
    where = f"{settings.http_host}:{settings.http_port}"
    try:
        family = socket.AF_INET6 if ":" in settings.http_host else socket.AF_INET
        socket.create_server((settings.http_host, settings.http_port), family=family).close()
    except OSError as error:
        fix = "where a worker runs already it is that one's; else set DLTASK_HTTP_PORT (0: any free one)"
        why = str(error.strerror).partition(" (while")[0]
        return Check("http", "warning", f"{where} cannot be had: {why}", fix)
    return Check("http", "ok", f"{where} is free")


def _limit(cgroup: Path) -> int | None:
    """Bytes that this container may use; None without a limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _read(cgroup / name)
        # Version 1 writes a number beyond any memory where there is no limit.
        if text.isdigit() and int(text) < 2**60:
            return int(text)
    return None


def _quota(cgroup: Path) -> float | None:
    """Cores that this container may use; None without a quota."""
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(cgroup / "cpu/cpu.cfs_quota_us"), _read(cgroup / "cpu/cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _gib(number: float) -> str:
    return f"{number / _GIB:.1f} GiB"
