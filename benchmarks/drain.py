"""How fast workers drain a queue of tasks that do nothing, each of one device: 1, 2, 4 and 16 of them.

    python benchmarks/drain.py [--tasks 500] [--rounds 2] [--workers 1 2 4 16] [--celery-python PATH]

Prints tasks a second, from the moment that all workers are connected until the last task has ended. Ours is the
dispatcher in a process for each worker: it claims, checks the document and takes the device as in `dltask serve`, and
the attempt that it starts is a stub that ends the task as SUCCEEDED. The floor is a bare loop in as many processes,
by `AsyncMongoClient`: it makes the same claim and the same end (both recorded from ours) and looks at nothing. The
tasks are copies of one that admission has answered. No task may run twice, or the script fails.

Celery has as many processes in one worker, its default settings and results in Redis, which writes nothing to disk:
unlike ours, it loses its tasks with the machine, and those that run with a worker.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from bson import ObjectId
from celery_peer import Peer, celery_peer, celery_python
from figures import figure, in_turn
from pymongo import AsyncMongoClient, MongoClient, ReturnDocument
from pymongo.monitoring import CommandFailedEvent, CommandListener, CommandStartedEvent, CommandSucceededEvent, register

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a request, as the tests make it

from handlers.admission import admit
from handlers.store import Store, connect_store
from handlers.store.indexes import INDEXES
from schemas.enums import TaskStatus
from schemas.task import Task
from service import logs
from service.devices import Devices
from service.dispatcher import Dispatcher
from service.embedded import embedded_mongo
from service.metrics import Metrics
from tests.helpers import train_request

Document = dict[str, Any]

#: Until all processes are connected: one that has failed would be waited for without end.
_SECONDS_TO_START = 120
_PUBLISH = "import sys; from peer import begun; [begun.delay() for _ in range(int(sys.argv[1]))]"
_AWAIT = """
import json, sys, time
from peer import app
redis, count = app.backend.client, int(sys.argv[1])
while len(keys := redis.keys("celery-task-meta-*")) < count:
    time.sleep(0.2)
begun = [json.loads(result)["result"] for result in redis.mget(keys)]
redis.flushdb()
print(count / (max(begun) - min(begun)))
"""


class Stub:
    """An attempt without a child: it ends its task at once. Has what the dispatcher asks of one."""

    machine_failed = False

    def __init__(self, task: Task, devices: tuple[str, ...], store: Store, tell: Callable[[int], None]) -> None:
        self.task, self.devices = task, devices
        self._store, self._tell = store, tell

    def end(self, ending: object) -> None:
        """Nothing: it ends by itself."""

    async def run(self) -> None:
        """End the task."""
        await self._store.tasks.finish(self.task, TaskStatus.SUCCEEDED, result={})
        self._tell(self.task.task_id)


class Crew:
    """What the processes of one run share."""

    def __init__(self, workers: int, tasks: int) -> None:
        context = multiprocessing.get_context("forkserver")
        self.begin = context.Barrier(workers + 1)
        self.ran = context.SimpleQueue()
        self._tasks = tasks
        self._done, self._last = context.Value("l", 0), context.Value("d", 0.0)

    def tell(self) -> None:
        """One task has ended."""
        with self._done.get_lock():
            self._done.value += 1
            self._last.value = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether all have."""
        return self._done.value >= self._tasks

    @property
    def last(self) -> float:
        """When the last one did."""
        return self._last.value

    def start(self, run: Callable[["Crew"], None], workers: int) -> list[multiprocessing.process.BaseProcess]:
        """The processes."""
        context = multiprocessing.get_context("forkserver")
        processes = [context.Process(target=run, args=(self,)) for _ in range(workers)]
        for process in processes:
            process.start()
        return processes


def ours(uri: str, name: str, crew: Crew) -> None:
    """One worker: the dispatcher until there is nothing more to do."""
    ran: list[int] = []

    def tell(task_id: int) -> None:
        ran.append(task_id)
        crew.tell()

    async def main() -> None:
        async with connect_store(uri, name) as store, anyio.create_task_group() as group:
            dispatcher = Dispatcher(
                store,
                Devices(cpus=1, gpus=0, fallback=False),
                owner=f"drain-{os.getpid()}",
                poll_seconds=5,
                make_attempt=lambda task, devices: Stub(task, devices, store, tell),
                metrics=Metrics(),
            )
            await store.tasks.not_understood()  # connects
            crew.begin.wait()
            group.start_soon(dispatcher.run)
            while not crew.over:  # noqa: ASYNC110  # another process has no event of ours to set
                await anyio.sleep(0.1)
            dispatcher.drain()

    anyio.run(main)
    crew.ran.put(ran)


def bare(commands: Sequence[Document], uri: str, name: str, crew: Crew) -> None:
    """One process of the floor."""
    claim, end = commands[0], commands[1]["updates"][0]
    ran: list[int] = []

    async def main() -> None:
        async with AsyncMongoClient[Document](uri) as client:
            tasks = client[name].DL_TASK
            await tasks.find_one()
            crew.begin.wait()
            while claimed := await tasks.find_one_and_update(
                claim["query"],
                claim["update"],
                sort=claim["sort"],
                projection=claim["fields"],
                hint=claim["hint"],
                return_document=ReturnDocument.AFTER,
            ):
                fence = {key: claimed[key] for key in ("_id", "create_time", "attempt")}
                await tasks.update_one(end["q"] | fence, end["u"])
                ran.append(claimed["task_id"])
                crew.tell()

    anyio.run(main)
    crew.ran.put(ran)


def drain(uri: str, template: Document, run: Callable[[str, str, Crew], None], count: int, workers: int) -> float:
    """Tasks a second of `workers` processes on `count` copies of `template`, in a database of their own."""
    name = f"drain_{time.monotonic_ns()}"
    with MongoClient[Document](uri) as client:
        tasks = client[name].DL_TASK
        tasks.create_indexes(INDEXES["DL_TASK"])
        for first in range(0, count, 1000):
            tasks.insert_many(_copy(template, number) for number in range(first, min(first + 1000, count)))
        crew = Crew(workers, count)
        processes = crew.start(partial(run, uri, name), workers)
        crew.begin.wait(_SECONDS_TO_START)
        began = time.monotonic()
        ran = [task_id for _ in processes for task_id in crew.ran.get()]
        for process in processes:
            process.join()
        assert sorted(ran) == list(range(count)), "a task ran twice, or not at all"
        once = {"status": "SUCCEEDED", "attempt": 1, "history": {"$size": 3}, "history.1.status": "RUNNING"}
        assert tasks.count_documents(once) == count, "a task was claimed twice"
        client.drop_database(name)
    return count / (crew.last - began)


def _copy(template: Document, number: int) -> Document:
    key = ObjectId()
    age = template["create_time"] + timedelta(milliseconds=number)
    return template | {"_id": key, "admitted_id": key, "task_id": number, "create_time": age}


class _Recorder(CommandListener):
    """Keeps the commands that change DL_TASK."""

    def __init__(self) -> None:
        self.commands: list[Document] = []

    def started(self, event: CommandStartedEvent) -> None:
        if event.command_name in ("findAndModify", "update"):
            self.commands.append(dict(event.command))

    def succeeded(self, event: CommandSucceededEvent) -> None:
        """Of no interest."""

    def failed(self, event: CommandFailedEvent) -> None:
        """Of no interest."""


async def record(uri: str) -> tuple[Document, list[Document]]:
    """A task as admission leaves it, and the commands with which ours claims and ends it."""
    name, recorder = "drain_recorded", _Recorder()
    register(recorder)  # for clients from now on, since `connect_store` takes no listener
    async with connect_store(uri, name) as store:
        db = store.database.db
        await db.DL_TASK.create_indexes(INDEXES["DL_TASK"])  # else a claim asks twice: with its index, and without
        image = (await db.IMG_INFO.insert_one({"file_name": "a", "dataset": "toy"})).inserted_id
        await db.IMG_LAB_INFO.insert_one({"img_id": image, "class_name": "c", "bbox": [0, 0, 1, 1]})
        key = (await db.DL_TASK.insert_one(train_request(0))).inserted_id
        await admit(store, key)
        template = await db.DL_TASK.find_one({"_id": key})
        assert template is not None
        recorder.commands.clear()
        claimed = await store.tasks.claim("drain", {"CPU": 1})
        assert claimed is not None
        await store.tasks.finish(Task.from_document(claimed), TaskStatus.SUCCEEDED, result={})
    return template, recorder.commands


def of_celery(peer: Peer, count: int, workers: int) -> float:
    """Tasks a second of Celery, from the begin of its first task to that of its last."""
    peer.client(_PUBLISH, count)
    with peer.worker(workers):
        return float(peer.client(_AWAIT, count))


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 16])
    parser.add_argument("--celery-python", help="a Python that has celery[redis]")
    arguments = parser.parse_args()
    count, python = arguments.tasks, celery_python(arguments.celery_python)
    logs.configure("text", "warning", mask=str)
    async with embedded_mongo() as uri:
        template, commands = await record(uri)
        with celery_peer(python) if python else nullcontext() as peer:
            for workers in arguments.workers:
                runs = {
                    "ours": partial(drain, uri, template, ours, count, workers),
                    "floor": partial(drain, uri, template, partial(bare, commands), count, workers),
                }
                if peer is not None:
                    runs["celery"] = partial(of_celery, peer, count, workers)
                found = in_turn(runs, arguments.rounds)
                figure(
                    f"tasks drained by {workers} worker{'s' * (workers > 1)}",
                    "tasks/s",
                    found["ours"],
                    floor=found["floor"],
                    floor_is="bare claim and end",
                    peer=found.get("celery", ()),
                    peer_is="Celery, Redis",
                    reach=">= 0.7 x floor, none twice",
                )


if __name__ == "__main__":
    anyio.run(main)
