"""Memory over a long run: of a worker over tasks, of a training over iterations.

    python benchmarks/memory.py [--tasks 2000] [--iterations 200] [--folder ../shared/datasets/bccd]

Prints the resident memory at ten points of each run, and how much it grows once warm, which is after the first third:
the slope of a straight line by least squares. The worker is a real `dltask serve`, page and metrics on, four tasks at
once, with the tests' stand-in child; each task has a child of its own, a model in GridFS, a log and a result. The
training is a real one, SMALL, two images a step, on the CPU, by the child alone; without the folder, on made-up images.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
from figures import figure
from idle import resident_mb
from pymongo import MongoClient
from training import message_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stand-in child of the tests

from service.embedded import embedded_mongo
from service.samples import make_samples
from tests.helpers import services, train_request

#: (tasks or iterations so far, MB).
Points = list[tuple[int, float]]

#: Tasks that the worker runs at once, and tasks that wait at least, so that it never has to.
_AT_ONCE, _WAITING = 4, 50
#: Images of each split that the training has: it soon keeps them all in memory, and the rest of it is seen alone.
_SOME = {"train": 60, "val": 10}
_FOLDER = Path("../shared/datasets/bccd")


def of_worker(uri: str, count: int) -> Points:
    """Memory of a worker over so many tasks."""
    points: Points = []
    env = {key: value for key, value in os.environ.items() if not key.startswith("DLTASK_")}
    with (
        MongoClient[dict[str, Any]](uri) as client,
        tempfile.TemporaryDirectory(prefix="dltask-memory-") as folder,
        services(env | {"DLTASK_MONGODB_URI": uri, "DLTASK_CACHE_DIR": folder}, Path(folder), "memory") as start,
    ):
        db = client.dl
        image = db.IMG_INFO.insert_one({"file_name": "a", "dataset": "toy"}).inserted_id
        db.IMG_LAB_INFO.insert_one({"img_id": image, "class_name": "c", "bbox": [0, 0, 1, 1]})
        service = start(cpu_devices=_AT_ONCE, gpu_devices=0, http_port=0, sweep_seconds=5)
        inserted = ended = 0
        while ended < count:
            if inserted < min(count, ended + _WAITING):
                more = range(inserted, min(count, ended + 2 * _WAITING))
                db.DL_TASK.insert_many([train_request(number, iterations=1) for number in more])
                inserted = more.stop
            time.sleep(0.5)
            assert service.process.poll() is None, service.log.read_text()[-2000:]
            ended = db.DL_TASK.count_documents({"status": "SUCCEEDED"})
            points.append((ended, resident_mb(service.process.pid)))
    return points


def of_training(folder: Path, iterations: int) -> Points:
    """Memory of a child that trains for so many iterations."""
    points: Points = []
    with (
        tempfile.TemporaryDirectory(prefix="dltask-memory-") as name,
        training(folder, Path(name), iterations) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            event = json.loads(line)
            assert event["event"] != "failed", event
            if event["event"] == "progress":
                points.append((event["iteration"], resident_mb(child.pid)))
            if event["event"] == "trained":
                break
    return points


@contextlib.contextmanager
def training(folder: Path, work: Path, iterations: int) -> Iterator[subprocess.Popen[str]]:
    """A child that trains on some of `folder`, a COCO data set with a split file; it is gone at the end."""
    (work / "some").mkdir()
    (work / "some" / "annotations.json").symlink_to(folder / "annotations.json")
    splits = json.loads((folder / "split.json").read_text())
    (work / "some" / "split.json").write_text(json.dumps({name: splits[name][:most] for name, most in _SOME.items()}))
    message = message_of(work / "some", "TRAIN", tuple(_SOME))
    (work / "message.json").write_text(json.dumps(message))
    images = [{"id": one["id"], "path": str(folder / "images" / one["file_name"])} for one in message["image_info"]]
    (work / "images.jsonl").write_text("".join(json.dumps(image) + "\n" for image in images))
    params = {"model_scope": "SMALL", "batch_size": 2, "max_num_iters": iterations, "snap_shot_ivterval": iterations}
    params |= {"dataset_expansion_lst": ["HOR_FLIPE", "VER_FLIPE"]}
    job = {"task_id": "1", "attempt": 1, "kind": "TRAIN", "params": params, "devices": ["cpu"]}
    paths = {key: str(work / file) for key, file in (("message", "message.json"), ("images", "images.jsonl"))}
    (work / "job.json").write_text(json.dumps(job | paths | {"out": str(work / "out")}))
    child = subprocess.Popen(
        [sys.executable, "-m", "handlers.detection"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert child.stdin is not None
        child.stdin.write(f"{work / 'job.json'}\n")
        child.stdin.flush()
        yield child
    finally:
        child.kill()
        child.communicate()


def slope(points: Points) -> float:
    """MB for each further task or iteration, after the first third of them."""
    warm = [(number, memory) for number, memory in points if number >= points[-1][0] / 3]
    numbers, memories = np.array(warm, np.float64).T
    return float(np.polyfit(numbers, memories, 1)[0])


def ten(points: Points) -> Sequence[tuple[int, float]]:
    """The points nearest to ten equal parts of the way."""
    last = points[-1][0]
    return [min(points, key=lambda point: abs(point[0] - last * part / 10)) for part in range(1, 11)]


def tell(whose: str, what: str, points: Points, each: int) -> None:
    """Print the points, and the growth as a figure."""
    shown = ", ".join(f"{number:,}: {memory:.0f}" for number, memory in ten(points))
    print(f"{whose}, MB after so many {what}: {shown}; at most {max(memory for _, memory in points):.0f}", flush=True)
    figure(f"memory of a {whose}, growth", f"MB per {each:,} {what}", [each * slope(points)], reach="0: flat")


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=2000, help="0: the training only")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=_FOLDER, help="a COCO folder with a split.json")
    arguments = parser.parse_args()
    if arguments.tasks:
        async with embedded_mongo() as uri:
            tell("worker", "tasks", await anyio.to_thread.run_sync(of_worker, uri, arguments.tasks), 1000)
    with tempfile.TemporaryDirectory(prefix="dltask-memory-") as name:
        folder = arguments.folder.resolve()
        if not folder.is_dir():
            folder = Path(name)
            make_samples(folder)
        tell("training", "iterations", of_training(folder, arguments.iterations), 100)


if __name__ == "__main__":
    anyio.run(main)
