"""How good the detectors are that a task gets with default parameters: a row for each data set and seed.

    python benchmarks/accuracy.py [--datasets bccd dice] [--seeds 1 2 3] [--iterations N]

Each row is a training and a test through the whole service: a MongoDB of its own, `dltask dataset import`, `dltask
serve`, and two task documents. All parameters but `max_num_iters` and `device_type` are the defaults. The seed of a
training is its task's number. `seconds` are those of the training's attempt, on this machine. Rows are written as they
come to `--out` (benchmarks/accuracy.json); rows of data sets and seeds that are not asked for stay in it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anyio.from_thread import start_blocking_portal
from pymongo import MongoClient
from pymongo.database import Database

from service.embedded import embedded_mongo

DATASETS = Path(__file__).parents[2] / "shared" / "datasets"
#: Of a training; the dice, which are small and told apart by their pips, take longer.
ITERATIONS = defaultdict(lambda: 1000, dice=1500)
#: A test has the number of its training and this.
_TEST = 1_000_000

Document = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DATASETS, help="where the data sets are, each a COCO folder")
    parser.add_argument("--datasets", nargs="+", default=["bccd", "dice"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--iterations", type=int, help="of each training (1000; of the dice 1500)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    chosen = parser.parse_args()
    for name in chosen.datasets:
        with tempfile.TemporaryDirectory(prefix="dltask-accuracy-") as cache, service(Path(cache)) as db:
            imported = ["dataset", "import", "--format", "coco", str(chosen.folder / name), "--name", name]
            subprocess.run([sys.executable, "-m", "service.cli", *imported], env=environment(), check=True)
            iterations = chosen.iterations or ITERATIONS[name]
            for seed in chosen.seeds:
                keep({"dataset": name, "seed": seed, **measured(db, name, seed, iterations)}, chosen.out)
    print(table(json.loads(chosen.out.read_text())))


def keep(row: Document, out: Path) -> None:
    """Print `row`, and put it among those in `out`, in the place of an older one."""
    rows = {row_key(one): one for one in json.loads(out.read_text())} if out.exists() else {}
    rows[row_key(row)] = row
    out.write_text("[\n" + ",\n".join(f"  {json.dumps(rows[key])}" for key in sorted(rows)) + "\n]\n")
    print(json.dumps(row), flush=True)


def row_key(row: Document) -> tuple[str, str, int]:
    """What there is one row of."""
    return row.get("peer", ""), row["dataset"], row["seed"]


@contextmanager
def service(cache: Path) -> Iterator[Database[Document]]:
    """A service with a MongoDB of its own; the database as a client sees it."""
    with start_blocking_portal("asyncio") as portal, portal.wrap_async_context_manager(embedded_mongo()) as uri:
        os.environ.update({"DLTASK_MONGODB_URI": uri, "DLTASK_DATABASE": "accuracy", "DLTASK_CACHE_DIR": str(cache)})
        with (cache / "service.log").open("wb") as log:
            worker = subprocess.Popen([sys.executable, "-m", "service.cli", "serve"], env=environment(), stderr=log)
        try:
            with MongoClient[Document](uri) as client:
                yield client["accuracy"]
        finally:
            worker.terminate()
            worker.wait()


def environment() -> dict[str, str]:
    return os.environ | {"DLTASK_HTTP_PORT": "off"}


def measured(db: Database[Document], dataset: str, seed: int, iterations: int) -> Document:
    """The row of a training and its test."""
    params = {"model_name": f"{dataset}-{seed}", "device_type": "CPU"}
    train = ended(
        db,
        {
            "task_id": seed,
            "task_type": "TRAIN",
            "dataset": dataset,
            "split": "train",
            "param_request": params | {"max_num_iters": iterations},
        },
    )
    test = ended(
        db,
        {"task_id": _TEST + seed, "task_type": "TEST", "dataset": dataset, "split": "test", "param_request": params},
    )
    metrics = test["result"]["metrics"]
    return {
        "map": round(metrics["map"], 4),
        "map_50": round(metrics["map_50"], 4),
        "seconds": round((train["end_time"] - train["start_time"]).total_seconds()),
        "iterations": iterations,
        "map_50_by_class": {row["class_name"]: round(row["map_50"], 3) for row in metrics["per_class"]},
    }


def ended(db: Database[Document], request: Document) -> Document:
    """Insert the task `request`; its document once it has ended. Exits if it has not succeeded."""
    match = {"fullDocument.task_id": request["task_id"], "fullDocument.end_time": {"$ne": None}}
    with db.DL_TASK.watch([{"$match": match}], full_document="updateLookup") as stream:
        db.DL_TASK.insert_one(request)
        document: Document = next(stream)["fullDocument"]
    if document["status"] != "SUCCEEDED":
        sys.exit(f"task {request['task_id']} ended {document['status']}: {document.get('error')}")
    return document


def table(rows: list[Document]) -> str:
    """Mean, and smallest to largest, of each data set."""
    lines = ["| data set | seeds | iterations | mAP@.5 | mAP | seconds |", "|---|---|---|---|---|---|"]
    for name in sorted({row["dataset"] for row in rows}):
        mine = [row for row in rows if row["dataset"] == name]

        def spread(key: str, digits: int, mine: list[Document] = mine) -> str:
            values = [row[key] for row in mine]
            return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} … {max(values):.{digits}f})"

        iterations = "/".join(str(number) for number in sorted({row["iterations"] for row in mine}))
        cells = (name, len(mine), iterations, spread("map_50", 3), spread("map", 3), spread("seconds", 0))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
