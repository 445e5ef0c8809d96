"""Containers of the image, held as tight as a cluster holds its pods, and what a client sees of their work."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from pymongo import MongoClient

from tests.image.build import IMAGE, ROOT
from tests.image.engine import Engine, Failed

#: Neither root nor the image's own user: OpenShift gives each namespace a range of its own.
USER = "54321"
MEMORY = 4 * 2**30

#: As the pods of k8s/ are held.
TIGHT = (
    "--read-only",
    "--tmpfs=/tmp:rw,size=2g,mode=1777",
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
    f"--user={USER}:0",
    f"--memory={MEMORY}",
    "--network=host",
)

Document = dict[str, Any]


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 300) -> Any:
    """The first true value of `condition`. Raises Failed after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)  # a poll on other processes, which cannot wake this one
    raise Failed(f"waited {seconds:g} s in vain for {what}")


class Bench:
    """The engine, a MongoDB outside of all containers, and a client of it."""

    def __init__(self, engine: Engine, uri: str, database: str) -> None:
        self.engine = engine
        self.uri = uri
        self.database = database
        self._client: MongoClient[Document] = MongoClient(uri)
        self.tasks = self._client[database]["DL_TASK"]

    def close(self) -> None:
        """Close the client."""
        self._client.close()

    def environment(self, **settings: Any) -> list[str]:
        """Options that give a container its settings."""
        given = {"MONGODB_URI": self.uri, "DATABASE": self.database, "GRACE_SECONDS": 60, **settings}
        return [f"--env=DLTASK_{name.upper()}={value}" for name, value in given.items()]

    def start(self, name: str, *command: str, **settings: Any) -> "Container":
        """Start a container of the image in the background."""
        options = [*TIGHT, *self.environment(**settings), f"--name={name}", "--detach", "--stop-timeout=90"]
        began = time.monotonic()
        self.engine.podman("run", *options, IMAGE, *command)
        return Container(self.engine, name, began)

    def client(self, *command: str) -> Any:
        """`dltask …` of the checkout, outside of all containers; returns what it prints as JSON."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("DLTASK_")}
        env |= {"DLTASK_MONGODB_URI": self.uri, "DLTASK_DATABASE": self.database}
        done = subprocess.run(
            [sys.executable, "-m", "service.cli", *command, "--json"],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise Failed(f"dltask {' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
        return json.loads(done.stdout)

    def submit(self, kind: str, **parameters: Any) -> int:
        """Insert a task on the blood cells; returns its number."""
        split = "train" if kind == "train" else "test"
        given = {"device_type": "CPU", **parameters}
        task = self.client(
            *("submit", kind, "--model-name", "cells", "--dataset", "bccd", "--split", split),
            *(f"--param={name}={value}" for name, value in given.items()),
        )
        return int(task["task_id"])

    def task(self, task_id: int) -> Document:
        """The task's document."""
        document = self.tasks.find_one({"task_id": task_id})
        if document is None:
            raise Failed(f"task {task_id} is gone")
        return document

    def succeeded(self, task_id: int) -> Document:
        """The result of a task, once it has ended. Raises Failed if that is no success."""
        document = wait_for(
            f"the end of task {task_id}",
            lambda: (found := self.task(task_id)).get("end_time") and found,
            900,
        )
        if document["status"] != "SUCCEEDED":
            raise Failed(f"task {task_id} is {document['status']}: {document.get('error')}")
        result: Document = document["result"]
        return result


class Container:
    """One that runs in the background."""

    def __init__(self, engine: Engine, name: str, began: float) -> None:
        self._engine = engine
        self._name = name
        self._began = began

    def log(self) -> str:
        """Everything it has said so far."""
        return self._engine.attempt("podman", "logs", self._name).stderr

    def ready(self) -> float:
        """Wait until its service is; returns the seconds since its start."""
        wait_for("service ready", lambda: "service ready" in self.log() or not self._runs(), 300)
        if "service ready" not in self.log():
            raise Failed(f"the container has ended:\n{self.log()[-2000:]}")
        return time.monotonic() - self._began

    def execute(self, *command: str) -> str:
        """Run a command in it; returns stdout. Raises Failed."""
        return self._engine.podman("exec", self._name, *command)

    def fails(self, *command: str) -> bool:
        """Whether a command in it fails."""
        return self._engine.attempt("podman", "exec", self._name, *command).returncode != 0

    def health(self) -> bool:
        """What the image's own check says."""
        return self._engine.attempt("podman", "healthcheck", "run", self._name).returncode == 0

    def terminate(self) -> int:
        """SIGTERM, as a cluster stops it; returns the exit code once it has ended."""
        self._engine.podman("kill", "--signal=TERM", self._name)
        return self.wait()

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        return int(self._engine.podman("wait", self._name).splitlines()[-1])

    def remove(self) -> None:
        """Remove it."""
        self._engine.podman("rm", "--force", self._name)

    def _runs(self) -> bool:
        return self._engine.podman("inspect", "--format={{.State.Running}}", self._name) == "true"
