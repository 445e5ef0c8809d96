"""How long the request message takes to build, and in how much memory.

    python benchmarks/message.py [--images 100000] [--labels 10] [--rounds 2] [--sample 2000]

Prints seconds to build the message of a training on a made-up data set with so many images, and so many labels an
image, and the memory that it takes: the peak of a process that does nothing else, above what it had before. The floor
reads both collections in large batches with PyMongo, with the fields and in the order that the message needs, and does
nothing with the documents; a further line compares with reading them undecoded. The peer is the nested loop:
a query for the labels of each image, and the same message of what comes. It is run on the first `--sample` images and
counted up to all of them. Python looks for garbage in cycles as rarely as in a worker, for the peer as it comes.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from figures import figure, in_turn
from pymongo import MongoClient
from pymongo.database import Database

from handlers.message import _Message, build_message
from handlers.store import connect_store
from handlers.store.indexes import INDEXES
from schemas.params import ParamClass
from schemas.task import Task
from service.embedded import embedded_mongo
from service.garbage import collect_rarely

_NAME = "messages"
_IMAGES = {"dataset": "made up", "split": {"$ne": "test"}}
#: What a message has of the tables.
_IMAGE_FIELDS = {"file_name": True, "width": True, "height": True, "file_id": True, "split": True}
_LABEL_FIELDS = {"img_id": True, "class_name": True, "bbox": True, "difficult": True, "crowd": True}
_LABEL_ORDER = [("img_id", 1), ("_id", 1)]
_BATCH = 20_000

Document = dict[str, Any]
TASK = Task(
    key=1,
    task_id=1,
    task_type="TRAIN",
    params=ParamClass("m"),
    dataset="made up",
    split=None,
    json_mongodb_id=None,
    owner="",
    attempt=1,
    create_time=datetime.now(UTC),
    snapshot=None,
    batch_size_limit=None,
)


def make(db: Database[Document], images: int, labels: int) -> None:
    """The data set, with the indexes of the service. The labels are made by the server, which is the fastest way."""
    for start in range(0, images, _BATCH):
        numbers = range(start, min(start + _BATCH, images))
        common = {"width": 1920, "height": 1080, "dataset": "made up", "split": "train"}
        # An id of a file of 24 digits, as an ObjectId has, is as long in the message.
        db.IMG_INFO.insert_many([{"file_name": f"image-{n:08}.jpg", "file_id": f"{n:024x}", **common} for n in numbers])

    def random(most: int) -> Document:
        return {"$round": [{"$multiply": [{"$rand": {}}, most]}, 2]}

    label = {
        "img_id": "$_id",
        "class_name": {"$concat": ["class ", {"$toString": {"$floor": {"$multiply": [{"$rand": {}}, 20]}}}]},
        "bbox": [random(1800), random(1000), {"$add": [1, random(100)]}, {"$add": [1, random(80)]}],
        "difficult": {"$literal": False},
    }
    pipeline = [
        {"$project": {"number": {"$range": [0, labels]}}},
        {"$unwind": "$number"},
        {"$project": {"_id": 0, **label}},
        {"$out": "IMG_LAB_INFO"},
    ]
    db.IMG_INFO.aggregate(pipeline)
    for name in ("IMG_INFO", "IMG_LAB_INFO"):
        db[name].create_indexes(INDEXES[name])


async def build(uri: str, folder: Path) -> None:
    """Build the message as a worker does, and print seconds, and MB before and at most."""
    collect_rarely()
    async with connect_store(uri, _NAME) as store:
        await store.database.now()  # connects
        before, began = peak(), time.monotonic()
        await build_message(store, TASK, folder / "message.json", folder / "refs.jsonl")
        print(time.monotonic() - began, before, peak())


def peak() -> float:
    """Most memory that this process has had, in MB. Not `ru_maxrss`, which begins with that of the parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def ours(uri: str, memory: list[tuple[float, float]]) -> float:
    """Seconds to build the message in a process of its own; puts (MB above those before, MB in all) into `memory`."""
    with tempfile.TemporaryDirectory(prefix="dltask-message-") as folder:
        command = [sys.executable, __file__, "--build", uri, folder]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, before, most = map(float, said.split())
    memory.append((most - before, most))
    return seconds


def floor(db: Database[Document], *, decoded: bool = True) -> float:
    """Seconds to read both collections, as documents or as the bytes that the server sends."""
    thresholds = gc.get_threshold()
    collect_rarely()
    began = time.monotonic()
    for records, query, fields, order in (
        (db.IMG_INFO, _IMAGES, _IMAGE_FIELDS, [("_id", 1)]),
        (db.IMG_LAB_INFO, {}, _LABEL_FIELDS, _LABEL_ORDER),
    ):
        read = records.find if decoded else records.find_raw_batches
        for _ in read(query, fields, sort=order, batch_size=_BATCH):
            pass
    seconds = time.monotonic() - began
    gc.set_threshold(*thresholds)
    return seconds


def nested(db: Database[Document], count: int, images: int) -> float:
    """Seconds for the nested loop over all `images`, as the first `count` of them take."""
    with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as other, tempfile.TemporaryFile() as out:
        began = time.monotonic()
        message = _Message(one, other)
        for image in db.IMG_INFO.find(_IMAGES, _IMAGE_FIELDS, sort=[("_id", 1)], limit=count):
            labels = db.IMG_LAB_INFO.find({"img_id": image["_id"]}, _LABEL_FIELDS, sort=_LABEL_ORDER)
            message.add(image, list(labels), None)
        out.writelines(message.parts(TASK, TASK.create_time))
        return (time.monotonic() - began) * images / count


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--labels", type=int, default=10, help="of each image")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sample", type=int, default=2000, help="images of the nested loop")
    parser.add_argument("--build", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        await build(arguments.build[0], Path(arguments.build[1]))
        return
    memory: list[tuple[float, float]] = []
    async with embedded_mongo() as uri:
        with MongoClient[Document](uri) as client:
            db = client[_NAME]
            make(db, arguments.images, arguments.labels)
            sample = min(arguments.sample, arguments.images)
            runs = {
                "ours": partial(ours, uri, memory),
                "floor": partial(floor, db),
                "undecoded": partial(floor, db, decoded=False),
                "nested": partial(nested, db, sample, arguments.images),
            }
            found = in_turn(runs, arguments.rounds)
    size = f"{arguments.images:,} images and {arguments.images * arguments.labels:,} labels"
    figure(
        f"request message, {size}",
        "s",
        found["ours"],
        floor=found["floor"],
        floor_is="both collections read in batches, decoded",
        peer=found["nested"],
        peer_is=f"a query an image, by {sample:,} of them",
        reach="<= 2.5 x floor; >= 6 x faster than nested",
    )
    figure(f"memory for the request message, {size}", "MB", [above for above, _ in memory], reach="<= 400 MB")
    of_all = statistics.median(whole for _, whole in memory)
    faster = statistics.median(theirs / mine for theirs, mine in zip(found["nested"], found["ours"], strict=True))
    undecoded = statistics.median(mine / bare for mine, bare in zip(found["ours"], found["undecoded"], strict=True))
    print(
        f"  {faster:.1f} x as fast as nested; {undecoded:.2f} x the reads undecoded; {of_all:.0f} MB the whole process"
    )


if __name__ == "__main__":
    anyio.run(main)
