"""What nvidia-smi says is read without trust, and it is never waited for. No GPU is needed, and none was there."""

import os
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

import service.gpus
from service.gpus import Gpus, GpuUse, parse
from service.metrics import Metrics
from tests.helpers import alive
from tests.scrape import parsed

#: In the form that `nvidia-smi --query-gpu=… --format=csv,noheader,nounits` documents: MiB and percent.
TWO = """0, GPU-8f6d2b1c-93c4-11ee-b9d1-0242ac120002, 81559, 40321, 97
1, GPU-91aa7e20-93c4-11ee-b9d1-0242ac120002, 81559, 4, 0
"""


def test_two_gpus() -> None:
    first, second = parse(TWO)
    assert first == GpuUse("0", "GPU-8f6d2b1c-93c4-11ee-b9d1-0242ac120002", 81559, 40321, 97)
    assert (second.index, second.used_mib, second.busy_percent) == ("1", 4, 0)


@pytest.mark.parametrize(
    "unknown", ["[N/A]", "N/A", "[Not Supported]", "[Unknown Error]", "[GPU requires reset]", "ERR!", "", "nan", "-1"]
)
def test_values_that_are_not_known(unknown: str) -> None:
    """With MIG there is no utilisation; a broken GPU says other things. The values beside are kept."""
    (gpu,) = parse(f"0, GPU-1, 40960, 13, {unknown}\n")
    assert (gpu.memory_mib, gpu.used_mib, gpu.busy_percent) == (40960, 13, None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No devices were found\n",
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n",
        "Unable to determine the device handle for GPU 0000:3B:00.0: Unknown Error\n",
        "index, uuid, memory.total [MiB], memory.used [MiB], utilization.gpu [%]\n",
        '0, GPU"\n{}, 1, 1, 1\n',
        "0, GPU-1, 1, 1\n",
        "99999999, GPU-1, 1, 1, 1\n",
        "\x00\xff\n" * 1000,
    ],
)
def test_what_is_no_gpu(text: str) -> None:
    """It is passed over, and so is nothing that stands beside it."""
    assert parse(text) == ()
    assert len(parse(text + TWO)) == 2


def test_they_are_shown_in_bytes_and_shares() -> None:
    metrics = Metrics()
    metrics.gpus(parse(TWO))
    seen = parsed(metrics.text()[0].decode())
    assert seen("gpu_memory_bytes", gpu="0") == 81559 * 2**20
    assert seen("gpu_memory_used_bytes", gpu="1") == 4 * 2**20
    assert seen("gpu_busy_ratio", gpu="0") == 0.97
    # One that is gone, or does not know its use any more, leaves no old value behind.
    metrics.gpus(parse("1, GPU-1, 81559, 4, [N/A]"))
    seen = parsed(metrics.text()[0].decode())
    assert (seen("gpu_memory_bytes"), seen.has("gpu_busy_ratio")) == (81559 * 2**20, False)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A stand-in for nvidia-smi, first on PATH; a test says what it does."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = tmp_path / "nvidia-smi"

    def do(script: str) -> None:
        path.write_text(script)
        path.chmod(0o755)

    return do


async def test_it_is_asked_once_in_a_while(program: Callable[[str], None], tmp_path: Path) -> None:
    """However many scrape at once."""
    program(f"#!/bin/sh\necho asked $MARK >> {tmp_path}/asked\necho '0, GPU-1, 100, 50, 10'\n")
    gpus = Gpus({"MARK": "here", "PATH": os.environ["PATH"]})
    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(gpus.read)
    assert [gpu.used_mib for gpu in await gpus.read()] == [50]
    assert (tmp_path / "asked").read_text() == "asked here\n"


async def test_without_the_program_there_are_none() -> None:
    assert await Gpus(os.environ, program="no-such-program-as-this").read() == ()


@pytest.mark.parametrize(
    "script", ["echo '0, GPU-1, 100, 50, 10'; exit 9", "kill -9 $$", "exec /no/such/program 2>/dev/null"]
)
async def test_a_program_that_fails(program: Callable[[str], None], script: str) -> None:
    """What a driver in trouble says is not believed."""
    program(f"#!/bin/sh\n{script}\n")
    assert await Gpus(os.environ).read() == ()


async def test_a_program_that_is_none(program: Callable[[str], None]) -> None:
    program("\x7fELF but no program")
    assert await Gpus(os.environ).read() == ()


async def test_a_program_that_hangs(
    program: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed, and the scrape goes on without it."""
    monkeypatch.setattr(service.gpus, "_PATIENCE_SECONDS", 0.5)
    program(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    with anyio.fail_after(30):
        assert await Gpus(os.environ).read() == ()
    assert not alive(int((tmp_path / "pid").read_text()))


async def test_a_program_that_never_stops_talking(
    program: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more of it is kept than any machine has to say."""
    monkeypatch.setattr(service.gpus, "_PATIENCE_SECONDS", 0.5)
    program("#!/bin/sh\nexec yes '0, GPU-1, 100, 50, 10'\n")
    assert await Gpus(os.environ).read() == ()
