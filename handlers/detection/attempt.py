"""One attempt at a job, in this process or in one for each device; every way in which it can end is an event."""

import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

# First, since it sets OpenCV's limit before OpenCV is loaded.
import handlers.detection.data  # noqa: F401  # isort: skip
import cv2
import torch

from handlers.detection.devices import is_device_fault, is_out_of_memory, keep_freed_memory, open_device
from handlers.detection.errors import (
    DataError,
    LossError,
    OutOfMemory,
    SnapshotError,
    StoppedEarly,
    machine_fault,
)
from handlers.detection.job import EVENT, Event, Failed, Job, Stopped
from handlers.detection.predict import run_test
from handlers.detection.ranks import Ranks, is_lost_peer, join, launch, leave
from handlers.detection.train import train

Emit = Callable[[Event], None]

#: Asks the ranks to stop: a file in the job's folder, since signals to them are the launcher's.
_STOP_FILE = "stop"

#: A rank's message to the launcher must be written whole: a pipe promises that for 4096 bytes.
_MAX_MESSAGE = 3000


def run(path: Path, emit: Emit, stop: threading.Event) -> int:
    """Run the job in file `path`; every way in which it can end is an event. Returns the exit code."""
    return _guarded(lambda: _run(path, emit, stop), emit)


def _run(path: Path, emit: Emit, stop: threading.Event) -> bool:
    job = Job.model_validate_json(path.read_bytes())
    job.out.mkdir(parents=True, exist_ok=True)
    for name, value in job.environment.items():
        os.environ[name] = value
    _prepare_process()
    if job.kind == "TEST":
        # As `open_device` does for a training on the CPU; no test opens one.
        keep_freed_memory()
        emit(run_test(job, emit, stop.is_set))
        return True
    if len(job.devices) == 1:
        trained = train(job, emit, stop.is_set, Ranks())
        assert trained is not None
        emit(trained)
        return True
    return _run_ranks(path, job, emit, stop)


def _run_ranks(path: Path, job: Job, emit: Emit, stop: threading.Event) -> bool:
    """Train in one process for each device, and pass on what they say up to the first final event."""
    ended: list[Event] = []

    def copy(line: str) -> None:
        event = EVENT.validate_json(line)
        if not ended:
            emit(event)
        if event.event in ("trained", "stopped", "failed"):
            ended.append(event)

    def watch() -> None:
        if stop.is_set():
            (job.out / _STOP_FILE).touch()

    (job.out / _STOP_FILE).unlink(missing_ok=True)
    well = launch(len(job.devices), run_rank, (path,), job.out, copy, watch)
    if not ended:
        # Killed, or crashed: the worker sees a child that died, and tries again.
        print("a rank died without a word", file=sys.stderr)
        return False
    return well and ended[0].event != "failed"


def run_rank(fifo: str, path: Path) -> None:
    """One rank of a training, in a process of its own; its events go to the pipe `fifo`."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    job = Job.model_validate_json(path.read_bytes())
    stop_file = job.out / _STOP_FILE
    # Buffered, since a signal can cut a long write short.
    events = os.fdopen(os.open(fifo, os.O_WRONLY), "w", encoding="utf-8", buffering=1)

    def emit(event: Event) -> None:
        write_event(events.write, event)

    def attempt() -> bool:
        _prepare_process()
        rank = int(os.environ["LOCAL_RANK"])
        # Each would take all cores otherwise.
        torch.set_num_threads(max(1, torch.get_num_threads() // len(job.devices)))
        device = open_device(job.devices[rank])
        try:
            trained = train(job, emit, lambda: stop.is_set() or stop_file.exists(), join(device))
        except StoppedEarly:
            if rank == 0:
                raise
            return True  # Rank 0 says it, once its snapshot is written.
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            # What became of the other one, it says itself, or can no longer say.
            traceback.print_exc()
            return False
        finally:
            leave()
        if trained is not None:
            emit(trained)
        return True

    code = _guarded(attempt, emit)
    if code:
        sys.exit(code)


def _guarded(work: Callable[[], bool], emit: Emit) -> int:
    """Run `work`; the one place where every error becomes an event. Returns the exit code."""
    try:
        return 0 if work() else 1
    except StoppedEarly as stopped:
        emit(Stopped(iteration=stopped.iteration))
        return 0
    except BrokenPipeError:
        return 1  # The worker is gone, and nobody listens.
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        emit(_failed(error))
        return 1


def _failed(error: Exception) -> Failed:
    message = str(error)[:_MAX_MESSAGE]
    if fault := machine_fault(error):
        return Failed(kind="machine", message=str(fault)[:_MAX_MESSAGE])
    if isinstance(error, DataError):
        return Failed(kind="data", message=message, field=error.field)
    if isinstance(error, LossError):
        return Failed(kind="loss", message=message)
    if isinstance(error, SnapshotError):
        return Failed(kind="snapshot", message=message)
    if isinstance(error, OutOfMemory) or is_out_of_memory(error):
        return Failed(kind="memory", message=message)
    if is_device_fault(error):
        return Failed(kind="machine", message=message)
    return Failed(kind="bug", message=f"{type(error).__name__}: {message}")


def write_event(write: Callable[[str], object], event: Event) -> None:
    """Hand `event` to `write` as one JSON line."""
    write(event.model_dump_json() + "\n")


def _prepare_process() -> None:
    # The threads that read images are the parallelism; OpenCV's own would come on top of them.
    cv2.setNumThreads(0)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however it dies (prctl(2), PR_SET_PDEATHSIG)."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        # It died before the call. If it did so before this function, stdin is at its end.
        sys.exit(1)
