"""Which devices this worker has, and which of them are free."""

import sys
from collections.abc import Mapping
from functools import partial

import anyio.to_thread
import structlog

from handlers.errors import StartupError
from service.checks.gpu import ask_child, child_python, why_no_gpu
from service.checks.nvidia import ask_driver, has_gpu
from service.secrecy import child_environment
from service.settings import Settings

log: structlog.stdlib.BoundLogger = structlog.get_logger()


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
    """The devices that `settings` allow and this machine has. Raises StartupError for GPUs that cannot be used.

    Where GPUs are there and none can be used, a worker that went on without would look healthy and take no GPU task;
    only who allowed the CPU instead gets that.
    """
    gpus = await anyio.to_thread.run_sync(partial(_count_gpus, settings))
    return Devices(cpus=settings.cpu_devices, gpus=gpus, fallback=settings.gpu_fallback == "cpu")


def _count_gpus(settings: Settings) -> int:
    """The number of GPUs, asked of a process of its own: the service never imports torch."""
    wanted, python = settings.gpu_devices, child_python(settings.child_command)
    if wanted == 0 or (wanted is not None and python is None):
        return wanted  # what a child that is not ours can use, only its operator knows
    less = "DLTASK_GPU_DEVICES=0 serves CPU tasks only"
    if not has_gpu():
        if wanted is not None:
            raise StartupError(
                f"DLTASK_GPU_DEVICES is {wanted}, and this machine shows no GPU (no nvidia-smi, no /dev/nvidiactl); "
                f"install the driver, or give the container its GPUs; {less}"
            )
        return 0
    environment = child_environment(settings.mongodb_uri.get_secret_value())
    facts = ask_child(python or sys.executable, environment, run=False)
    if (problem := why_no_gpu(facts, ask_driver(environment))) is not None:
        if wanted is None and settings.gpu_fallback == "cpu":
            log.warning("gpus not usable", reason=problem[0], fix=problem[1])
            return 0
        raise StartupError(f"{problem[0]}; {problem[1]}; {less}")
    assert not isinstance(facts, str)
    if wanted is not None and wanted > facts.gpus:
        raise StartupError(f"DLTASK_GPU_DEVICES is {wanted}, and torch can use {facts.gpus}; set it to what is there")
    return facts.gpus if wanted is None else wanted
