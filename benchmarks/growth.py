"""How each thing grows: with the tasks that wait, with the images of a task, with the workers.

    python benchmarks/growth.py [--rounds 3] [--out docs/images/growth.png]

Prints a value for each size and the exponent of a power law through them (0: it does not grow, 1: in proportion), and
draws both. All sizes of a kind are measured in turn. Over the tasks that wait, 10^2 to 10^6, each of one CPU: to claim
one and end it (`Tasks.claim`, `Tasks.finish`), to admit a new one (`handlers.admission`, from the known `_id` to the
answer), one sweep of a worker, and a claim by a worker without the device that they want. Over the images,
10^3 to 10^5 with ten labels each: the request message. Over the workers: tasks that do nothing, drained as in
`drain.py`, by a process for each worker on the cores that there are; where these are too few, a law of powers fits
badly, and its exponent says only that more workers bring nothing more.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import numpy as np
from drain import drain, ours, record
from figures import figure, in_turn
from pymongo import MongoClient
from pymongo.database import Database

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # requests and queues, as the tests make them

from handlers.admission import admit
from handlers.detection.pictures.figure import COLOURS, DASHES, DPI, new_figure, save
from handlers.message import build_message
from handlers.store import Store, connect_store
from handlers.store.indexes import INDEXES
from schemas.enums import TaskStatus
from schemas.task import Task
from service import logs
from service.embedded import embedded_mongo
from service.garbage import collect_rarely
from service.metrics import Metrics
from service.sweeper import Sweeper
from tests.helpers import train_request
from tests.many_tasks import fill

Db = Database[dict[str, Any]]
#: What was measured at each size, a value for each round.
Series = dict[int, list[float]]

TASKS_WAITING = (100, 10_000, 100_000, 1_000_000)
IMAGES = (1000, 10_000, 100_000)
WORKERS = (1, 4, 16, 64)
LABELS_EACH = 10
#: Tasks drained in each run.
DRAINED = 1000
#: How often a thing is done in one round, of which the median counts.
_EACH = 10

_PICTURE = Path(__file__).parents[1] / "docs" / "images" / "growth.png"


class Queue:
    """A database in which so many tasks wait."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._number = 10**7
        self._sweeper = Sweeper(
            store,
            owner="growth",
            every_seconds=5,
            wake=lambda: None,
            describe=dict,
            story=logs.Story(),
            metrics=Metrics(),
        )
        # For so long that it looks for leases that are over too.
        self._sweeper._connected_since = 0.0

    async def claim_and_end(self) -> None:
        """As a worker with a stub for a child."""
        claimed = await self._store.tasks.claim("growth", {"CPU": 1})
        assert claimed is not None
        await self._store.tasks.finish(Task.from_document(claimed), TaskStatus.SUCCEEDED, result={})

    async def admission(self) -> Callable[[], Awaitable[object]]:
        """What answers a document that has just been inserted."""
        self._number += 1
        inserted = await self._store.database.db.DL_TASK.insert_one(train_request(self._number))
        return partial(admit, self._store, inserted.inserted_id)

    async def sweep(self) -> None:
        """One sweep."""
        await self._sweeper.sweep()

    async def nothing(self) -> Callable[[], Awaitable[object]]:
        """The claim of a worker that has GPUs only, after that of another one that found a task."""
        # As in a fleet of both: the server tries its plans anew where the last query of this form was a cheap one.
        await self.claim_and_end()
        return partial(self._store.tasks.claim, "growth", {"GPU": 8})


async def milliseconds(prepare: Callable[[], Awaitable[Callable[[], Awaitable[object]]]]) -> float:
    """How long it takes what `prepare` returns: the median of some times, of which the first does not count."""
    times = []
    for _ in range(_EACH + 1):
        action = await prepare()
        began = time.perf_counter()
        await action()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def again(action: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[Callable[[], Awaitable[object]]]]:
    """For `milliseconds`: that which needs nothing to be prepared."""

    async def prepare() -> Callable[[], Awaitable[object]]:
        return action

    return prepare


async def of_queues(uri: str, rounds: int) -> dict[str, Series]:
    """Milliseconds over the tasks that wait."""
    found: dict[str, Series] = {}
    async with AsyncExitStack() as stack:
        queues = {}
        for size in TASKS_WAITING:
            name = f"growth_{size}"
            with MongoClient[dict[str, Any]](uri) as client:
                fill(client[name], 0, size)
                client[name].DL_TASK.create_indexes(list(INDEXES["DL_TASK"]))
                images(client[name], 1)
            queues[size] = Queue(await stack.enter_async_context(connect_store(uri, name)))

        measures: dict[str, Callable[[Queue], Coroutine[Any, Any, float]]] = {
            "claim and end of a task": lambda queue: milliseconds(again(queue.claim_and_end)),
            "admission": lambda queue: milliseconds(queue.admission),
            "sweep": lambda queue: milliseconds(again(queue.sweep)),
            "claim where nothing fits": lambda queue: milliseconds(queue.nothing),
        }
        for name, measure in measures.items():
            found[name] = await _in_turn({size: partial(measure, queues[size]) for size in TASKS_WAITING}, rounds)
    with MongoClient[dict[str, Any]](uri) as client:
        for size in TASKS_WAITING:
            client.drop_database(f"growth_{size}")
    return found


async def of_messages(uri: str, rounds: int) -> dict[str, Series]:
    """Seconds over the images of a task."""
    with MongoClient[dict[str, Any]](uri) as client:
        for size in IMAGES:
            images(client.growth, size)
        for name in ("IMG_INFO", "IMG_LAB_INFO"):
            client.growth[name].create_indexes(list(INDEXES[name]))
    async with connect_store(uri, "growth") as store:
        with tempfile.TemporaryDirectory(prefix="dltask-growth-") as folder:

            async def build(task: Task) -> float:
                began = time.perf_counter()
                await build_message(store, task, Path(folder) / "message.json", Path(folder) / "refs.jsonl")
                return time.perf_counter() - began

            runs: dict[int, Callable[[], Coroutine[Any, Any, float]]] = {}
            for size in IMAGES:
                request = train_request(size, dataset=f"{size} images")
                await admit(store, (await store.database.db.DL_TASK.insert_one(request)).inserted_id)
                claimed = await store.tasks.claim("growth", {"CPU": 1})
                assert claimed is not None
                runs[size] = partial(build, Task.from_document(claimed))
            return {f"request message, {LABELS_EACH} labels an image": await _in_turn(runs, rounds)}


def images(db: Db, count: int) -> None:
    """A data set of so many images; its name says how many. In `toy` there is one."""
    dataset = "toy" if count == 1 else f"{count} images"
    db.numbers.insert_many({"first": first, "end": min(first + 1000, count)} for first in range(0, count, 1000))
    db.numbers.aggregate(
        [
            {"$project": {"_id": 0, "n": {"$range": ["$first", "$end"]}}},
            {"$unwind": "$n"},
            {"$project": {"file_name": {"$concat": [{"$toString": "$n"}, ".jpg"]}}},
            {"$set": {"dataset": dataset, "split": "train", "width": 640, "height": 480, "file_id": "$$REMOVE"}},
            {"$merge": {"into": "IMG_INFO"}},
        ]
    )
    db.IMG_INFO.aggregate(
        [
            {"$match": {"dataset": dataset}},
            {"$project": {"_id": 0, "img_id": "$_id", "n": {"$range": [0, LABELS_EACH]}}},
            {"$unwind": "$n"},
            {"$set": {"class_name": {"$concat": ["class ", {"$toString": "$n"}]}, "bbox": ["$n", 20, 100.5, 50.25]}},
            {"$unset": "n"},
            {"$merge": {"into": "IMG_LAB_INFO"}},
        ]
    )
    db.numbers.drop()


async def of_workers(uri: str, rounds: int) -> dict[str, Series]:
    """Tasks a second over the workers."""
    # Last: what it records is kept of every client that this process makes from now on.
    template, _ = await record(uri)
    runs = {str(workers): partial(drain, uri, template, ours, DRAINED, workers) for workers in WORKERS}
    rates = await anyio.to_thread.run_sync(in_turn, runs, rounds)
    return {"tasks drained": {int(workers): values for workers, values in rates.items()}}


async def _in_turn(runs: Mapping[int, Callable[[], Coroutine[Any, Any, float]]], rounds: int) -> Series:
    def run(size: int) -> float:
        return anyio.from_thread.run(runs[size])

    found = await anyio.to_thread.run_sync(in_turn, {str(size): partial(run, size) for size in runs}, rounds)
    return {int(size): values for size, values in found.items()}


def power_law(series: Mapping[int, float]) -> tuple[float, float]:
    """Exponent and factor of the power law nearest to the values, by least squares of the logarithms."""
    exponent, offset = np.polyfit(np.log(list(series)), np.log(list(series.values())), 1)
    return float(exponent), math.exp(offset)


def medians(series: Series) -> dict[int, float]:
    """The value at each size."""
    return {size: statistics.median(values) for size, values in series.items()}


def tell(found: Mapping[str, Series], over: str, unit: str, reach: Mapping[str, str]) -> None:
    """Print the values, and the exponent of each round as a figure."""
    for name, series in found.items():
        values = ", ".join(f"{size:,}: {value:.3g} {unit}" for size, value in medians(series).items())
        print(f"{name}, over {over}: {values}", flush=True)
        rounds = zip(*series.values(), strict=True)
        exponents = [power_law(dict(zip(series, values, strict=True)))[0] for values in rounds]
        figure(f"growth of {name} over {over}", "exponent", exponents, reach=reach.get(name, ""))


@contextmanager
def panels(out: Path, count: int) -> Iterator[Sequence[Any]]:
    """So many panels side by side, with logarithmic axes; written to `out` at the end."""
    picture, _ = new_figure(count * 4.4 * DPI, 4.2 * DPI, layout="constrained")
    axes = list(picture.subplots(1, count))
    for one in axes:
        one.set_xscale("log")
        one.set_yscale("log")
        one.grid(alpha=0.3)
    yield axes
    for one in axes:
        one.legend(fontsize=8, loc="upper left")
    save(picture, out)


def draw(axes: Any, found: Mapping[str, Series], over: str, what: str) -> None:
    """Values as points, power laws as dashed lines."""
    # Without the yellow, which is hard to see as a line on white.
    colours = [one for one in COLOURS if one != "#f0e442"]
    for (name, series), colour in zip(found.items(), colours, strict=False):
        values = medians(series)
        exponent, factor = power_law(values)
        axes.plot(list(values), list(values.values()), "o", color=colour, label=f"{name}: exponent {exponent:.2f}")
        axes.plot(list(values), [factor * size**exponent for size in values], color=colour, linestyle=DASHES)
    axes.set_xlabel(over)
    axes.set_ylabel(what)
    lowest, highest = axes.get_ylim()
    # Room for the legend above, and what hardly grows is to look so.
    axes.set_ylim(lowest / 2, max(highest * 8, lowest * 50))


async def main() -> None:
    """Measure, print and draw."""
    collect_rarely()  # as a worker does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=_PICTURE)
    arguments = parser.parse_args()
    logs.configure("text", "warning", mask=str)
    async with embedded_mongo() as uri:
        queues = await of_queues(uri, arguments.rounds)
        tell(queues, "tasks waiting", "ms", dict.fromkeys(queues, "0: no growth"))
        messages = await of_messages(uri, arguments.rounds)
        tell(messages, "images", "s", dict.fromkeys(messages, "1: in proportion"))
        drained = await of_workers(uri, 1)
        tell(drained, "workers", "tasks/s", {})
    with panels(arguments.out, 3) as (left, middle, right):
        draw(left, queues, "tasks waiting", "time, ms")
        draw(middle, messages, "images", "time, s")
        draw(right, drained, "workers, on two cores", "tasks a second")
    print(f"drawn: {arguments.out}")


if __name__ == "__main__":
    anyio.run(main)
