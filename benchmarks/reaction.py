"""How soon a client learns that its task was admitted, and that it runs: beside the floor, a poller and Celery.

    python benchmarks/reaction.py [--count 100] [--rounds 3] [--celery-python PATH]

Prints p50 and p99 of milliseconds from a task's insert to PENDING and to RUNNING, as the client's own change stream
shows them; tasks come one by one to one idle worker. Ours is a real `dltask serve` with the tests' stand-in child. For
one task it sees the event, reads the document, asks whether the number is free (DL_MODEL), the tables are filled (two
reads) and the data set has images, admits by an update, and claims by a find-and-modify.

The floor is a process of its own with a bare `AsyncMongoClient` that makes the same round trips in the same order:
the event, the document, the four reads at once, one find_one_and_update to PENDING, one to RUNNING. A further line is
without the reads, which is the least that any service would do. The poller is that without a change stream, looking
once a second, as FiftyOne, ClearML and Geti do. For Celery (default settings, Redis without any disk) the time is
from before `delay()` to the first line of the task, so that no news has to come back to its client.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from celery_peer import Peer, celery_peer, celery_python
from figures import figure, in_turn
from pymongo import MongoClient
from pymongo.collection import Collection

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stand-in child of the tests

from service.embedded import embedded_mongo
from tests.helpers import services, train_request

STATES = ("PENDING", "RUNNING")
_SCRIPT = """
import asyncio, sys
from pymongo import AsyncMongoClient

async def answer(tasks, query):
    found = await tasks.find_one_and_update(query, {"$set": {"status": "PENDING"}})
    if found:
        fields = {"status": "RUNNING", "owner": "bare", "attempt": 1}
        await tasks.find_one_and_update({"_id": found["_id"], "status": "PENDING"}, {"$set": fields})
    return found

async def main():
    tasks = AsyncMongoClient(sys.argv[1])[sys.argv[2]].DL_TASK
"""
_WATCH = """
    pipeline = [{"$match": {"operationType": "insert"}}, {"$project": {"documentKey": 1}}]
    async with await tasks.watch(pipeline) as stream:
        print("ready", flush=True)
        async for event in stream:
            READ
            await answer(tasks, event["documentKey"])

asyncio.run(main())
"""
_READ = """
            found, db = await tasks.find_one(event["documentKey"]), tasks.database
            await asyncio.gather(
                db.DL_MODEL.find_one({"task_id": found["task_id"]}),
                db.IMG_INFO.find_one({}, {"_id": True}),
                db.IMG_LAB_INFO.find_one({}, {"_id": True}),
                db.IMG_INFO.find_one({"dataset": found["dataset"], "split": {"$ne": "test"}}, {"_id": True}),
            )
"""
WATCH_AND_READ = _SCRIPT + _WATCH.replace("            READ\n", _READ)
WATCH = _SCRIPT + _WATCH.replace("            READ\n", "")
POLL = f"""{_SCRIPT}
    print("ready", flush=True)
    while True:
        while await answer(tasks, {{"status": None}}):
            pass
        await asyncio.sleep(1)

asyncio.run(main())
"""
CELERY = """
import json, random, sys, time
from peer import begun
found = []
begun.delay().get()  # connects
for _ in range(int(sys.argv[1])):
    at = time.monotonic()
    found.append((begun.delay().get() - at) * 1000)
    time.sleep(random.uniform(0.05, 0.1))
print(json.dumps(found))
"""


@contextmanager
def bare(code: str, uri: str, name: str) -> Iterator[None]:
    """A process that answers tasks, until the end."""
    process = subprocess.Popen([sys.executable, "-c", code, uri, name], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", "it ended"
        yield
    finally:
        process.kill()
        process.communicate()


@contextmanager
def ours(uri: str, name: str) -> Iterator[None]:
    """A `dltask serve` with its defaults but for the child, until the end."""
    with tempfile.TemporaryDirectory(prefix="dltask-reaction-") as folder:
        env = {key: value for key, value in os.environ.items() if not key.startswith("DLTASK_")}
        env |= {"DLTASK_MONGODB_URI": uri, "DLTASK_DATABASE": name, "DLTASK_CACHE_DIR": folder}
        with services(env, Path(folder), name) as start:
            start(sweep_seconds=5, http_port=0, gpu_devices=0)
            yield


def latencies(
    tasks: Collection[dict[str, Any]], count: int, *, ends: bool, pause_seconds: float
) -> dict[str, list[float]]:
    """Milliseconds from the insert to each of the states, of `count` tasks one after the other, with random pauses.

    `ends`: a task ends by itself, and the next one comes once its worker is idle again.
    """
    found: dict[str, list[float]] = {state: [] for state in STATES}
    field = "updateDescription.updatedFields.status"
    awaited = [*STATES, *(["SUCCEEDED"] if ends else [])]
    pipeline = [{"$match": {"operationType": "update", field: {"$in": awaited}}}, {"$project": {field: 1}}]
    with tasks.watch(pipeline) as stream:
        for number in range(count):
            request = train_request(number, iterations=1)
            began = time.perf_counter()
            tasks.insert_one(request)
            for state in awaited:
                status = next(stream)["updateDescription"]["updatedFields"]["status"]
                assert status == state, f"{status}; expected {state}"
                if state in STATES:
                    found[state].append((time.perf_counter() - began) * 1000)
            # At least until the next child is warm: the stand-in starts in a tenth of a second.
            time.sleep(random.uniform(0.15, 0.15 + pause_seconds))
    return found


def measure(
    uri: str, service: Callable[[str, str], Any], count: int, *, ends: bool = False, pause_seconds: float = 0.05
) -> dict[str, list[float]]:
    """The latencies while `service` answers, in a database of its own."""
    name = f"reaction_{time.monotonic_ns()}"
    with MongoClient[dict[str, Any]](uri) as client:
        db = client[name]
        image = db.IMG_INFO.insert_one({"file_name": "a", "dataset": "toy"}).inserted_id
        db.IMG_LAB_INFO.insert_one({"img_id": image, "class_name": "c", "bbox": [0, 0, 1, 1]})
        db.create_collection("DL_TASK")
        try:
            with service(uri, name):
                time.sleep(1)
                return latencies(db.DL_TASK, count, ends=ends, pause_seconds=pause_seconds)
        finally:
            client.drop_database(name)


def of_celery(peer: Peer, count: int) -> dict[str, list[float]]:
    """The same of a Celery worker with one process: RUNNING only."""
    with peer.worker(1):
        return {"RUNNING": json.loads(peer.client(CELERY, count))}


def percentile(values: list[float], share: float) -> float:
    """The least of `values` that so much of them does not exceed (nearest rank)."""
    return sorted(values)[math.ceil(len(values) * share) - 1]


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="tasks in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--celery-python", help="a Python that has celery[redis]")
    arguments = parser.parse_args()
    count, python = arguments.count, celery_python(arguments.celery_python)
    async with embedded_mongo() as uri:
        with celery_peer(python) if python else nullcontext() as peer:
            measures: dict[str, Callable[[], dict[str, list[float]]]] = {
                "ours": partial(measure, uri, ours, count, ends=True),
                "floor": partial(measure, uri, partial(bare, WATCH_AND_READ), count),
                "no reads": partial(measure, uri, partial(bare, WATCH), count),
                # Pauses as long as its own, or each task would come right after a look.
                "poller": partial(measure, uri, partial(bare, POLL), max(count // 5, 5), pause_seconds=1),
            }
            if peer is not None:
                measures["celery"] = partial(of_celery, peer, count)
            found: dict[str, list[dict[str, list[float]]]] = {name: [] for name in measures}

            def run(name: str) -> float:
                found[name].append(measures[name]())
                return statistics.median(found[name][-1]["RUNNING"])

            in_turn({name: partial(run, name) for name in measures}, arguments.rounds)
    for state, peer_name, aim in (("PENDING", "poller", 2), ("RUNNING", "celery", 4)):
        for what, share, reach in (("p50", 0.5, f"<= {aim} x floor"), ("p99", 0.99, "<= 20 ms")):
            values = {
                name: [percentile(one[state], share) for one in rounds]
                for name, rounds in found.items()
                if state in rounds[0]
            }
            figure(
                f"insert to {state}, {what}",
                "ms",
                values["ours"],
                floor=values["floor"],
                floor_is="bare AsyncMongoClient, the same round trips",
                peer=values.get(peer_name, ()),
                peer_is={"poller": "poller at 1 s", "celery": "Celery, Redis"}[peer_name],
                reach=reach,
            )
            ratios = [mine / bare for mine, bare in zip(values["ours"], values["no reads"], strict=True)]
            least = statistics.median(values["no reads"])
            print(f"  without any reads: {least:.3g} ms, ratio {statistics.median(ratios):.3g}", flush=True)
            if peer_name != "poller":
                print(f"  poller at 1 s: {statistics.median(values['poller']):.0f} ms", flush=True)


if __name__ == "__main__":
    anyio.run(main)
