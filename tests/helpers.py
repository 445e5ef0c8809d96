"""What tests of running services have in common."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pymongo.database import Database

STANDIN = f"{sys.executable} {Path(__file__).parent / 'standin_child.py'}"
END_STATES = ("SUCCEEDED", "FAILED", "CANCELLED", "REJECTED")


def train_request(task_id: Any, *, model_name: str = "ok", iterations: int = 3, **fields: Any) -> dict[str, Any]:
    """A training of the toy data, as a client inserts it; `model_name` is what the stand-in child does."""
    params = {"model_name": model_name, "device_type": "CPU", "max_num_iters": iterations, "snap_shot_ivterval": 50}
    return {"task_id": task_id, "task_type": "TRAIN", "dataset": "toy", "param_request": params, **fields}


@dataclass
class Service:
    """A running `dltask serve`."""

    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> int:
        """SIGTERM, and wait until it is gone; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(10)


@contextlib.contextmanager
def services(
    env: Mapping[str, str], folder: Path, name: str, cwd: Path | None = None
) -> Iterator[Callable[..., Service]]:
    """Starts `dltask serve` as often as it is called, of the version in `cwd`, with the stand-in child unless they get
    another; settings are given as `cpu_devices=2`, options of the command as they are. They end with the context.
    """
    started: list[Service] = []
    with contextlib.ExitStack() as files:

        def start(*options: str, **settings: Any) -> Service:
            own = {
                "DLTASK_CHILD_COMMAND": STANDIN,
                "STANDIN_LOG": str(folder / "children.jsonl"),
                "DLTASK_LOG_FORMAT": "json",
                "DLTASK_SWEEP_SECONDS": "1",
                "DLTASK_GRACE_SECONDS": "5",
            }
            own |= {f"DLTASK_{setting.upper()}": str(value) for setting, value in settings.items()}
            log = folder / f"{name}-{len(started)}.log"
            out = files.enter_context(log.open("wb"))
            command = [sys.executable, "-m", "service.cli", "serve", *options]
            service = Service(subprocess.Popen(command, env={**env, **own}, cwd=cwd, stderr=out), log)
            started.append(service)
            wait_for(lambda: "service ready" in log.read_text() or service.process.poll() is not None)
            return service

        try:
            yield start
        finally:
            for service in started:
                if service.process.poll() is None:
                    service.stop()


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """The first true value of `condition`; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)  # a poll on a process of its own, which cannot wake this one
    pytest.fail(f"waited {seconds} s in vain")


def ended(db: Database[dict[str, Any]], task_id: Any, seconds: float = 30) -> dict[str, Any]:
    """The task document once it has ended."""
    document: dict[str, Any] = wait_for(
        lambda: db.DL_TASK.find_one({"task_id": task_id, "status": {"$in": END_STATES}}), seconds
    )
    return document


def running(db: Database[dict[str, Any]], task_id: Any) -> dict[str, Any]:
    """The task document once it runs and has reported progress."""
    document: dict[str, Any] = wait_for(
        lambda: db.DL_TASK.find_one({"task_id": task_id, "status": "RUNNING", "progress.iteration": {"$gt": 0}})
    )
    return document


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
