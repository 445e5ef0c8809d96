"""How soon a client learns: insert to admitted (PENDING), beside the floor and a poller, in one run.

Ours is a real `dltask serve` whose only device is busy. The floor is a bare process that watches the collection and
answers with one update; the peer is a process that looks once a second, as most comparable systems do. Each inserted
document is timed by the client, from before its insert until a change stream of its own shows the answer.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

import anyio
from pymongo import MongoClient
from pymongo.collection import Collection

from service.embedded import embedded_mongo

WATCH = """
import sys
from pymongo import MongoClient
tasks = MongoClient(sys.argv[1])[sys.argv[2]].DL_TASK
with tasks.watch([{"$match": {"operationType": "insert"}}, {"$project": {"documentKey": 1}}]) as stream:
    print("ready", flush=True)
    for event in stream:
        tasks.find_one_and_update({"_id": event["documentKey"]["_id"]}, {"$set": {"status": "PENDING"}})
"""
POLL = """
import sys, time
from pymongo import MongoClient
tasks = MongoClient(sys.argv[1])[sys.argv[2]].DL_TASK
print("ready", flush=True)
while True:
    while tasks.find_one_and_update({"status": None}, {"$set": {"status": "PENDING"}}):
        pass
    time.sleep(1)
"""


def latencies(tasks: Collection[dict[str, Any]], count: int) -> list[float]:
    """Milliseconds from insert to PENDING of `count` tasks, one after the other."""
    found = []
    match = {"operationType": "update", "updateDescription.updatedFields.status": "PENDING"}
    with tasks.watch([{"$match": match}], max_await_time_ms=100) as stream:
        for number in range(count):
            params = {"model_name": "m", "device_type": "CPU"}
            request = {"task_id": number, "task_type": "TRAIN", "dataset": "d", "param_request": params}
            began = time.perf_counter()
            tasks.insert_one(request)
            next(stream)
            found.append((time.perf_counter() - began) * 1000)
            # Not in step with the poller.
            time.sleep(random.uniform(0, 0.05))
    return found


def measure(uri: str, name: str, command: list[str], count: int) -> list[float]:
    """The latencies while `command` answers, in a database of its own."""
    with MongoClient[dict[str, Any]](uri) as client:
        image = client[name].IMG_INFO.insert_one({"file_name": "a", "dataset": "d"}).inserted_id
        client[name].IMG_LAB_INFO.insert_one({"img_id": image, "class_name": "c", "bbox": [0, 0, 1, 1]})
        env = os.environ | {"DLTASK_MONGODB_URI": uri, "DLTASK_DATABASE": name, "DLTASK_CPU_DEVICES": "0"}
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            assert process.stdout is not None
            while b"ready" not in (line := process.stdout.readline()):
                assert line, "the process ended"
            time.sleep(1)
            return latencies(client[name].DL_TASK, count)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()
            client.drop_database(name)


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    count = parser.parse_args().count
    async with embedded_mongo() as uri:
        python = [sys.executable, "-c"]
        rows = {
            "ours": measure(uri, "ours", [sys.executable, "-m", "service.cli", "serve"], count),
            "floor": measure(uri, "floor", [*python, WATCH, uri, "floor"], count),
            "poller at 1 s": measure(uri, "poller", [*python, POLL, uri, "poller"], max(count // 10, 10)),
        }
    floor = statistics.median(rows["floor"])
    for name, values in rows.items():
        p50, p99 = statistics.median(values), sorted(values)[int(len(values) * 0.99)]
        print(f"insert to admitted, {name}: p50 {p50:.1f} ms, p99 {p99:.1f} ms, {p50 / floor:.1f} x floor")


if __name__ == "__main__":
    anyio.run(main)
