"""How fast training gets its images: GridFS, cache, decoded and augmented batch; images a second for each core.

    python benchmarks/image_path.py [--folder ../shared/datasets/bccd] [--rounds 3] [--repeat 2]

The images are imported into a MongoDB, and fetched through the cache as a task's are. Then a figure for the first epoch
(files are read, decoded, fingerprinted and kept) and one for the second (images are in memory); both frame, mirror,
stretch, light and collate each image and match its boxes, in a thread for each core. The floor is `cv2.imdecode` and a
resize alone in as many threads, of each file, for both epochs. The peer is torchvision's reference data path for
SSDLite: PIL, its transforms v2, a `DataLoader` with as many processes, and the resize that its models begin with. An
epoch of all is `--repeat` times over the images, each under ids of its own. Also says how often MongoDB was read in
each phase.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

# As the child has it, before torch loads OpenMP; the floor and the peer have the good of it too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import anyio
import cv2
import numpy as np
import torch
from accuracy import DATASETS
from figures import figure, in_turn
from message import TASK
from pymongo import MongoClient
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from handlers.detection.batches import Batches, BatchPlan, ImageStore
from handlers.detection.data import Sample, fit, image_paths, load_samples, read_message
from handlers.detection.devices import keep_freed_memory, reader_threads
from handlers.detection.networks import NETWORKS
from handlers.detection.targets import Assign
from handlers.images import ImageCache
from handlers.message import build_message
from handlers.store import connect_store
from schemas.enums import ExpansionDataClass
from service.embedded import embedded_mongo

SIZE, BATCH = 320, 10
#: The operations of a training whose task names none.
MIRRORED = (ExpansionDataClass.HOR_FLIPE,)
_NAME = "image_path"

Loader = DataLoader[Any]


class Ours:
    """The two epochs, one after the other."""

    def __init__(self, samples: Sequence[Sample], threads: int) -> None:
        classes = max(int(sample.boxes.class_ids.max(initial=1)) for sample in samples)
        network = NETWORKS["MobileNet"].make(classes, SIZE, None)
        self._assign: Assign = network.assigner()
        self._predictions = network.predictions
        self._samples, self._threads = samples, threads
        self._iterations = len(samples) // BATCH
        #: Told when an epoch begins, and when the second has ended.
        self.noted: Callable[[], None] = lambda: None
        self._batches: Batches | None = None

    def first(self) -> float:
        """Images a second of each core, with nothing in memory."""
        plan = BatchPlan(1, BATCH, range(BATCH), 1, MIRRORED, SIZE)
        store = ImageStore(SIZE, 1 << 33)
        self._batches = Batches(plan, self._samples, store, self._assign, self._predictions)
        return self._epoch(0)

    def second(self) -> float:
        """The same of the epoch that follows."""
        return self._epoch(1)

    def _epoch(self, number: int) -> float:
        assert self._batches is not None
        first = 1 + number * self._iterations
        self.noted()
        with ThreadPoolExecutor(self._threads) as pool:
            began = time.monotonic()
            for _ in self._batches.iterate(first, first + self._iterations - 1, pool):
                pass
            seconds = time.monotonic() - began
        self.noted()
        return self._iterations * BATCH / seconds / self._threads


def floor(samples: Sequence[Sample], threads: int) -> float:
    """Images a second of each core that are decoded and resized."""

    def one(sample: Sample) -> None:
        # With our filter: OpenCV's that leaves no pixel out takes three times as long.
        fit(np.asarray(cv2.imdecode(np.fromfile(sample.path, np.uint8), cv2.IMREAD_COLOR), np.uint8), SIZE)

    with ThreadPoolExecutor(threads) as pool:
        began = time.monotonic()
        list(pool.map(one, samples))
        return len(samples) / (time.monotonic() - began) / threads


def reference_data(folder: Path, repeat: int) -> Dataset[Any]:
    """The images for training as torchvision's references/detection reads them: `--backend pil`, `ssdlite`, v2."""
    change = v2.Compose(
        [
            v2.RandomIoUCrop(),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.ConvertBoundingBoxFormat("XYXY"),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ]
    )
    coco = CocoDetection(str(folder / "images"), str(folder / "annotations.json"), transforms=change)
    names = set(json.loads((folder / "split.json").read_text())["train"])
    # Its script leaves out images without a box too.
    chosen = [
        position
        for position, number in enumerate(coco.ids)
        if coco.coco.loadImgs(number)[0]["file_name"] in names and coco.coco.getAnnIds(number)
    ]
    return Subset(wrap_dataset_for_transforms_v2(coco, target_keys=("boxes", "labels")), chosen * repeat)


def reference_loader(data: Dataset[Any], workers: int) -> Loader:
    """As torchvision's references/detection/train.py has it; the processes stay from epoch to epoch."""
    return DataLoader(
        data, BATCH, shuffle=True, drop_last=True, num_workers=workers, collate_fn=pairs, persistent_workers=True
    )


def pairs(batch: list[tuple[Any, ...]]) -> tuple[tuple[Any, ...], ...]:
    """The `collate_fn` of its utils.py."""
    return tuple(zip(*batch, strict=True))


def peer(loader: Loader) -> float:
    """Images a second of each core."""
    resize = GeneralizedRCNNTransform(
        SIZE, SIZE, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], size_divisible=1, fixed_size=(SIZE, SIZE)
    )
    began, count = time.monotonic(), 0
    for images, targets in loader:
        resize(list(images), list(targets))
        count += len(images)
    return count / (time.monotonic() - began) / loader.num_workers


def as_in_a_child() -> None:
    """Set this process up as the child sets itself up. The floor and the peer have the good of it too."""
    cv2.setNumThreads(0)
    keep_freed_memory()


def import_folder(uri: str, folder: Path) -> None:
    """Put the data set into the database, as an operator does."""
    command = [sys.executable, "-m", "service.cli", "dataset", "import", "--format", "coco", str(folder)]
    env = os.environ | {"DLTASK_MONGODB_URI": uri, "DLTASK_DATABASE": _NAME}
    subprocess.run([*command, "--name", folder.name], env=env, check=True, capture_output=True)


async def fetch(uri: str, name: str, cache: Path, run: Path) -> list[Sample]:
    """The training images of the data set `name`, in the folder `run` of a task by way of the cache."""
    message, refs = run / "message.json", run / "refs.jsonl"
    async with connect_store(uri, _NAME) as store:
        await build_message(store, TASK.model_copy(update={"dataset": name, "split": "train"}), message, refs)
        listing = await ImageCache(cache, max_bytes=1 << 40).fetch(store, refs, run)
    samples, skipped = load_samples(read_message(message), image_paths(listing))
    assert not skipped
    return samples


def repeated(samples: Sequence[Sample], repeat: int) -> Iterator[Sample]:
    """`samples` so many times, as if they were different."""
    for time_ in range(repeat):
        for sample in samples:
            yield replace(sample, id=sample.id + time_ * 1_000_000)


def reads(client: MongoClient[dict[str, Any]]) -> int:
    """How often the server has been asked for documents."""
    counts = client.admin.command("serverStatus")["opcounters"]
    return int(counts["query"] + counts["getmore"])


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DATASETS / "bccd", help="a COCO folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=2)
    arguments = parser.parse_args()
    folder, threads = arguments.folder.resolve(), reader_threads(1)
    loader = reference_loader(reference_data(folder, arguments.repeat), threads)
    as_in_a_child()
    with tempfile.TemporaryDirectory(prefix="dltask-images-") as name:
        work = Path(name)
        async with embedded_mongo() as uri:
            with MongoClient[dict[str, Any]](uri) as client:
                import_folder(uri, folder)
                read, seconds = [reads(client)], []
                for run in (work / "first", work / "again"):
                    run.mkdir()
                    began = time.monotonic()
                    samples = await fetch(uri, folder.name, work / "cache", run)
                    seconds.append(time.monotonic() - began)
                    read.append(reads(client))
                ours = Ours(list(repeated(samples, arguments.repeat)), threads)
                peer(loader)  # starts its processes
                between: list[int] = []
                ours.noted = lambda: between.append(reads(client))
                runs = {
                    "first": ours.first,
                    "second": ours.second,
                    "floor": partial(floor, list(repeated(samples, arguments.repeat)), threads),
                    "peer": partial(peer, loader),
                }
                ours.first()  # the second epoch may have its turn before the first
                found = in_turn(runs, arguments.rounds)
    for epoch in ("first", "second"):
        figure(
            f"images for training, {epoch} epoch",
            "images/s a core",
            found[epoch],
            floor=found["floor"],
            floor_is="cv2.imdecode of each file and a resize",
            peer=found["peer"],
            peer_is="torchvision's reference data path, which reads each file each time",
            reach=">= 0.85 x floor; >= 1.5 x peer",
        )
    epochs = sum(after - before for before, after in zip(between[::2], between[1::2], strict=True))
    cold, again = seconds
    print(f"  {len(samples)} images from GridFS through the cache: {cold:.2f} s; {again:.2f} s when they are in it")
    by_task, by_next = read[1] - read[0], read[2] - read[1]
    print(f"  queries to MongoDB: {by_task} by the first task, {by_next} by the next, {epochs} in all epochs")


if __name__ == "__main__":
    anyio.run(main)
