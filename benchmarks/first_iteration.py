"""How soon a training trains: from a task's insert to the end of its first iteration, with a warm child and a cold one.

    python benchmarks/first_iteration.py [--rounds 3] [--images 40]

Prints seconds until the child reports its first iteration, on sample images that the worker has in its cache. The cold
child is started as early, but imports nothing until its job comes. The floor is a bare script with torch imported: from
"go" it reads the same images and labels from a folder (OpenCV, a thread for each core), builds the same network from
the same ImageNet weights, and makes one step of SGD on as many of the images, in a process set up as the child is.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from figures import figure, in_turn
from pymongo import MongoClient
from training import message_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what tests of the service have in common

from handlers.detection.input_size import suited_size
from schemas.enums import ModelScopeClass
from schemas.message import RequestMessage
from service.embedded import embedded_mongo
from service.samples import make_samples
from tests.helpers import Service, services

#: A child as it is, that notes when it waits for a job and when its first iteration is over.
CHILD = """
import select, sys, time
def note(what):
    with open(sys.argv[1], "a") as out:
        print(what, time.monotonic(), file=out)
if sys.argv[2] == "cold":
    note("waits")
    select.select([sys.stdin], [], [])
from handlers.detection import __main__ as child
write, found = child.write_event, []
def noted(out, event):
    write(out, event)
    if event.event == "progress" and not found:
        found.append(event)
        note("iterated")
child.write_event = noted
if sys.argv[2] == "warm":
    note("waits")
sys.exit(child.main())
"""
FLOOR = """
import json, os, sys
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import cv2
import numpy as np
import torch
from handlers.detection.boxes import Boxes
from handlers.detection.data import fit
from handlers.detection.devices import keep_freed_memory
from handlers.detection.networks import NETWORKS
from handlers.detection.targets import collate
from schemas.params import ParamClass

keep_freed_memory()
cv2.setNumThreads(0)
folder, size, batch = Path(sys.argv[1]), int(sys.argv[2]), ParamClass("m").batch_size
print("ready", flush=True)
sys.stdin.readline()
coco = json.loads((folder / "annotations.json").read_text())

def read(image):
    pixels = cv2.cvtColor(cv2.imread(str(folder / "images" / image["file_name"])), cv2.COLOR_BGR2RGB)
    labels = [label for label in coco["annotations"] if label["image_id"] == image["id"]]
    corners = np.array([label["bbox"] for label in labels], np.float32).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    corners /= np.array([image["width"], image["height"]] * 2, np.float32)
    none = np.zeros(len(labels), bool)
    boxes = Boxes(corners, np.array([label["category_id"] for label in labels], np.int64), none, none)
    return fit(pixels, size), boxes

with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
    images = list(pool.map(read, coco["images"]))
network, _ = NETWORKS["MobileNet"].build(len(coco["categories"]), size)
network = network.train().to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)
assign = network.assigner()
targets = collate([assign(boxes) for _, boxes in images[:batch]], network.predictions)
outputs = network(torch.from_numpy(np.stack([pixels for pixels, _ in images[:batch]])))
(network.loss(outputs, targets) / len(targets.rows)).backward()
optimizer.step()
print("iterated", flush=True)
"""


def floor(folder: Path, size: int) -> float:
    """Seconds from "go" to the end of the bare script's iteration."""
    command = [sys.executable, "-c", FLOOR, str(folder), str(size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", "it ended"
        began = time.monotonic()
        process.stdin.write(b"go\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"iterated\n", "it ended"
        return time.monotonic() - began


def ours(uri: str, cache: Path, kind: str) -> float:
    """Seconds from the insert of a task to the end of its first iteration, on a worker with a child of this `kind`."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("DLTASK_")}
    env |= {"DLTASK_MONGODB_URI": uri, "DLTASK_CACHE_DIR": str(cache)}
    with (
        MongoClient[dict[str, Any]](uri) as client,
        tempfile.TemporaryDirectory(prefix="dltask-first-") as folder,
        services(env, Path(folder), kind) as start,
    ):
        notes = Path(folder) / "notes"
        child = shlex.join([sys.executable, "-c", CHILD, str(notes), kind])
        service = start(sweep_seconds=5, http_port=0, gpu_devices=0, grace_seconds=30, child_command=child)
        noted(notes, "waits", service)
        time.sleep(0.5)
        tasks = client.dl.DL_TASK
        params = {"model_name": "m", "device_type": "CPU"}
        task = {"task_id": time.monotonic_ns(), "task_type": "TRAIN", "dataset": "samples", "param_request": params}
        began = time.monotonic()
        key = tasks.insert_one(task).inserted_id
        seconds = noted(notes, "iterated", service) - began
        # Rather than stopped, which would give the task back for the next worker to take.
        tasks.update_one({"_id": key}, {"$set": {"cancel_requested": True}})
        while tasks.find_one({"_id": key, "status": "CANCELLED"}) is None:
            time.sleep(0.1)
        return seconds


def noted(notes: Path, what: str, service: Service) -> float:
    """When a child noted that, for the first time."""
    while True:
        lines = notes.read_text().splitlines() if notes.exists() else []
        for word, _, at in (line.partition(" ") for line in lines):
            if word == what and at:
                return float(at)
        assert service.process.poll() is None, service.log.read_text()
        time.sleep(0.01)


def import_samples(uri: str, folder: Path) -> None:
    """Put the images of `folder` into the database, as an operator does."""
    command = [sys.executable, "-m", "service.cli", "dataset", "import", "--format", "coco", str(folder)]
    env = os.environ | {"DLTASK_MONGODB_URI": uri, "DLTASK_DATABASE": "dl"}
    subprocess.run([*command, "--name", "samples"], env=env, check=True, capture_output=True)


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=40, help="training images; a fifth as many for validation")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dltask-first-") as name:
        folder, cache = Path(name) / "samples", Path(name) / "cache"
        folder.mkdir()
        make_samples(folder, {"train": arguments.images, "val": arguments.images // 5})
        message = RequestMessage.model_validate(message_of(folder, "TRAIN", ("train", "val")))
        size = suited_size(320, ModelScopeClass.NORMAL, message)
        async with embedded_mongo() as uri:
            import_samples(uri, folder)
            ours(uri, cache, "warm")  # fills the cache
            runs = {kind: partial(ours, uri, cache, kind) for kind in ("warm", "cold")}
            found = in_turn({**runs, "floor": partial(floor, folder, size)}, arguments.rounds)
    figure(
        "insert to first iteration, warm child",
        "s",
        found["warm"],
        floor=found["floor"],
        floor_is="bare script, torch imported",
        peer=found["cold"],
        peer_is="ours with a cold child",
        reach="<= 1.3 x floor; >= 3 x faster than cold",
    )
    print(f"  {arguments.images * 6 // 5} images, input of {size} pixels; ", end="")
    times = [cold / warm for cold, warm in zip(found["cold"], found["warm"], strict=True)]
    print(f"warm is {statistics.median(times):.1f} x as fast as cold")


if __name__ == "__main__":
    anyio.run(main)
