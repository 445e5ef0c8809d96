"""Several devices: one process (rank) each, started by torch's elastic launcher, averaging their gradients.

One device is the same code with one rank: `Ranks` of size 1 asks nobody.
"""

import logging
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

#: Within this time every rank must come to the next common point; rank 0's measuring at the end is the longest wait.
_TIMEOUT = timedelta(hours=2)
_END = "\n"


class Ranks:
    """This process among its peers."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    def parallel(self, network: nn.Module) -> nn.Module:
        """`network` as this rank trains it: backward() averages the gradients over the ranks."""
        return DistributedDataParallel(network) if self.size > 1 else network

    def share(self, batch_size: int) -> range:
        """The places of a batch that this rank prepares; one at least."""
        batch_size = max(batch_size, self.size)
        return range(self.rank * batch_size // self.size, (self.rank + 1) * batch_size // self.size)

    def agree(self, stop: bool, loss: float) -> tuple[bool, float]:
        """(whether any rank wants to stop, the mean of the losses): the same in all ranks."""
        if self.size == 1:
            return stop, loss
        # On the CPU, over gloo: nothing of it has to wait for a GPU.
        told = torch.tensor([float(stop), loss], dtype=torch.float64)
        dist.all_reduce(told)
        return bool(told[0] > 0), float(told[1]) / self.size

    def total(self, *numbers: int) -> list[int]:
        """The sum of each of `numbers` over the ranks."""
        if self.size == 1:
            return list(numbers)
        totals = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(totals)
        found: list[int] = totals.tolist()
        return found

    def gather(self, value: T) -> list[T]:
        """The `value` of every rank, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def join(device: torch.device) -> Ranks:
    """Become one of the ranks that the launcher started, on `device`. To be left by `leave`."""
    # gloo beside nccl, so that flags and Python objects need no GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Close the connections to the other ranks, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether `error` says that another rank no longer answers. Those of gloo have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def launch(
    count: int,
    run: Callable[..., None],
    arguments: tuple[object, ...],
    out: Path,
    write: Callable[[str], None],
    watch: Callable[[], None],
) -> bool:
    """Run `run(fifo, *arguments)` in `count` processes; each line they write to the pipe `fifo` goes to `write`.

    `watch` is called ten times a second. Returns whether all of them ended well. `run` must be importable: the
    processes are spawned, since a forked one could not use CUDA. To be called from the main thread, which goes on
    hearing signals.
    """
    fifo = out / "events.fifo"
    fifo.unlink(missing_ok=True)
    os.mkfifo(fifo)
    # Opened for both directions, the pipe neither blocks here nor ends when a rank closes its side.
    with os.fdopen(os.open(fifo, os.O_RDWR), "r", encoding="utf-8") as reader:
        thread = threading.Thread(target=_copy_lines, args=(reader, write), name="events of the ranks")
        thread.start()
        try:
            # A thread of its own, since the agent takes SIGTERM for itself in the main thread, and ends the ranks by
            # it. They must not be ended but stop together, see `Ranks.agree`.
            return _in_thread(lambda: _run_agent(count, run, (str(fifo), *arguments)), watch)
        finally:
            os.write(reader.fileno(), _END.encode())
            thread.join()
            fifo.unlink()


def _copy_lines(reader: Any, write: Callable[[str], None]) -> None:
    while (line := reader.readline()) != _END:
        write(line)


def _in_thread(work: Callable[[], bool], watch: Callable[[], None]) -> bool:
    result: list[bool | BaseException] = []

    def target() -> None:
        try:
            result.append(work())
        except BaseException as error:  # noqa: BLE001  Carried over to the caller's thread.
            result.append(error)

    thread = threading.Thread(target=target, name="agent")
    thread.start()
    while thread.is_alive():
        # With a time-out, so that Python runs the signal handler in between.
        thread.join(0.1)
        watch()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def _run_agent(count: int, run: Callable[..., None], arguments: tuple[object, ...]) -> bool:
    # What it logs of ranks that fail is in their own tracebacks.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    try:
        elastic_launch(config, run)(*arguments)
    except ChildFailedError:
        return False
    return True
