"""Which devices this worker has, and which of them are free."""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import anyio.to_thread
import structlog

from service.secrecy import child_environment
from service.settings import Settings

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_COUNT = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"


class Devices:
    """The worker's devices by torch name, handed out to one attempt at a time.

    A task asks for a kind, CPU or GPU. On a worker without GPUs that may fall back, both kinds draw on the CPUs.
    """

    def __init__(self, *, cpus: int, gpus: int, fallback: bool) -> None:
        cpu_pool, gpu_pool = ["cpu"] * cpus, [f"cuda:{index}" for index in range(gpus)]
        self.fallback = fallback and not gpus
        self._free = {"CPU": cpu_pool, "GPU": cpu_pool if self.fallback else gpu_pool}
        self.total: Mapping[str, int] = {kind: len(pool) for kind, pool in self._free.items()}

    def free(self) -> dict[str, int]:
        """How many devices of each kind are free."""
        return {kind: len(pool) for kind, pool in self._free.items()}

    def take(self, kind: str, number: int) -> tuple[str, ...]:
        """Take `number` free devices of `kind`."""
        pool = self._free[kind]
        taken = tuple(pool[:number])
        del pool[:number]
        return taken

    def give_back(self, kind: str, devices: tuple[str, ...]) -> None:
        """Give back what `take` gave."""
        # Sorted, so that the lowest numbers are used first: an operator reads the log more easily.
        pool = self._free[kind]
        pool.extend(devices)
        pool.sort()

    def named(self, kind: str, device: str) -> str:
        """`device` as results state it: a GPU task that ran on the CPU says so."""
        return f"{device} (fallback)" if kind == "GPU" and self.fallback else device


async def find_devices(settings: Settings) -> Devices:
    """The devices that `settings` allow and this machine has."""
    gpus = settings.gpu_devices
    if gpus is None:
        environment = child_environment(settings.mongodb_uri.get_secret_value())
        gpus = await anyio.to_thread.run_sync(_count_gpus, environment)
    return Devices(cpus=settings.cpu_devices, gpus=gpus, fallback=settings.gpu_fallback == "cpu")


def _count_gpus(environment: Mapping[str, str]) -> int:
    """The number of GPUs that torch can use, asked of a process of its own: the service never imports torch."""
    if shutil.which("nvidia-smi") is None and not Path("/dev/nvidiactl").exists():
        return 0
    asked = subprocess.run(
        [sys.executable, "-c", _COUNT], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    if asked.returncode != 0 or not asked.stdout.strip().isdigit():
        log.error("torch cannot count the GPUs, using none", reason=asked.stderr.strip().splitlines()[-1:])
        return 0
    return int(asked.stdout)
