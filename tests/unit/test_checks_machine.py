"""What the doctor makes of a machine: its cache folder, memory, processors, shared memory and port."""

import socket
from pathlib import Path

import pytest

from service.checks import machine
from service.settings import Settings

GIB = 2**30


def test_a_folder_that_can_be_written(tmp_path: Path) -> None:
    """It need not be there yet."""
    check = machine.cache(Settings(cache_dir=tmp_path / "a" / "b", cache_bytes=0))
    assert check.state == "ok"
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", ["file in the way", "kernel's"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, kind: str) -> None:
    """Tried and not asked for, since root is told yes where it cannot."""
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache" if kind == "file in the way" else Path("/proc/dltask/cache")
    check = machine.cache(Settings(cache_dir=folder))
    assert check.state == "failed"
    assert check.found.startswith(f"{folder} cannot be written: ")
    assert "DLTASK_CACHE_DIR" in check.fix


def test_a_cache_larger_than_the_disk(tmp_path: Path) -> None:
    """It would fill the disk before it forgets anything."""
    check = machine.cache(Settings(cache_dir=tmp_path, cache_bytes=2**60))
    assert (check.state, "DLTASK_CACHE_BYTES" in check.fix) == ("warning", True)


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container_counts(tmp_path: Path, version: int) -> None:
    """In both versions of cgroups; without one it is the machine's memory."""
    name = tmp_path / ("memory.max" if version == 2 else "memory/memory.limit_in_bytes")
    name.parent.mkdir(exist_ok=True)
    for limit, state in ((GIB // 2, "failed"), (2 * GIB, "warning"), (4 * GIB, "ok")):
        name.write_text(f"{limit}\n")
        check = machine.memory(1, tmp_path)
        assert (check.state, "limit of the container" in check.found) == (state, True)
    name.write_text("max\n" if version == 2 else "9223372036854771712\n")
    assert "limit of the container" not in machine.memory(1, tmp_path).found
    assert machine.memory(10_000, tmp_path).state == "warning"


@pytest.mark.parametrize("version", [1, 2])
def test_the_quota_of_a_container_counts(tmp_path: Path, version: int) -> None:
    """Half a core for one task is too little, also where the machine has many."""
    if version == 2:
        (tmp_path / "cpu.max").write_text("50000 100000\n")
    else:
        (tmp_path / "cpu").mkdir()
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    check = machine.processors(Settings(cpu_devices=1), tmp_path)
    assert (check.state, check.found) == ("warning", "0.5 cores (quota of the container)")


def test_more_tasks_than_cores(tmp_path: Path) -> None:
    """They would only slow each other down."""
    assert machine.processors(Settings(cpu_devices=1000), tmp_path).state == "warning"
    assert machine.processors(Settings(cpu_devices=0), tmp_path).state == "ok"


def test_shared_memory_matters_to_several_gpus(tmp_path: Path) -> None:
    """Docker gives 64 MB, which NCCL cannot do with."""
    assert machine.shared_memory(2, tmp_path / "none").state == "warning"
    assert machine.shared_memory(1, tmp_path / "none").state == "ok"


def test_the_port() -> None:
    """One that is taken is no reason not to start: it may be that of a worker which runs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check = machine.http_port(Settings(http_port=port))
        assert (check.state, check.found) == ("warning", f"127.0.0.1:{port} cannot be had: Address already in use")
    assert machine.http_port(Settings(http_port=port)).state == "ok"
    assert machine.http_port(Settings(http_port="off")).found == "off"
    assert machine.http_port(Settings(http_port=port, http_host="192.0.2.1")).state == "warning"
