"""Runs what the README promises on real data, end to end, and prints one line for each promise.

    .venv/bin/python scripts/acceptance.py --datasets ../shared/datasets --mongosh PATH/TO/mongosh

Everything is what a user would do: `dltask mongo`, `dltask serve` and `dltask dataset import` as programs, documents
inserted raw by `mongosh`, a worker killed with SIGKILL in the middle of a training. About 20 minutes on two cores with
three seeds. Exits 1 if a promise is not kept.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pymongo import MongoClient
from pymongo.database import Database

from handlers.task_process import TaskProcess
from schemas.enums import TaskTypeClass
from schemas.params import ParamClass

DLTASK = [sys.executable, "-m", "service.cli"]
END_STATES = ["SUCCEEDED", "FAILED", "CANCELLED", "REJECTED"]
CELLS = {
    "model_name": "cells",
    "dataset_expansion_lst": ["HOR_FLIPE", "VER_FLIPE"],
    "device_type": "CPU",
    "max_num_iters": 300,
    "batch_size": 10,
    "snap_shot_ivterval": 100,
}

_kept: list[bool] = []


def say(promise: str, kept: bool, figures: str) -> None:
    """One line."""
    _kept.append(kept)
    print(f"{'ok ' if kept else 'NOT'}  {promise}: {figures}", flush=True)


def until(condition: Callable[[], Any], seconds: float) -> Any:
    """The first true value of `condition`, or None after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    return None


class Bench:
    """A database server, a service, and a client."""

    def __init__(self, folder: Path, mongosh: str) -> None:
        self.folder = folder
        self.mongosh = mongosh
        self.server = subprocess.Popen([*DLTASK, "mongo", "--data-dir", str(folder / "db")], stdout=subprocess.PIPE)
        assert self.server.stdout is not None
        self.uri = self.server.stdout.readline().decode().strip()
        self.client: MongoClient[dict[str, Any]] = MongoClient(self.uri, tz_aware=True)
        os.environ |= {"DLTASK_MONGODB_URI": self.uri, "DLTASK_CACHE_DIR": str(folder / "cache")}

    def database(self, name: str) -> Database[dict[str, Any]]:
        os.environ["DLTASK_DATABASE"] = name
        return self.client[name]

    def serve(self, **settings: str) -> subprocess.Popen[bytes]:
        log = (self.folder / "service.log").open("ab")
        size = log.tell()
        process = subprocess.Popen([*DLTASK, "serve"], env=os.environ | settings, stderr=log)
        until(lambda: b"change stream opened" in (self.folder / "service.log").read_bytes()[size:], 30)
        return process

    def insert(self, documents: str) -> None:
        """Insert with mongosh, in the words of the README."""
        name = os.environ["DLTASK_DATABASE"]
        script = f"for (const d of {documents}) db.getSiblingDB('{name}').DL_TASK.insertOne(d)"
        done = subprocess.run([self.mongosh, self.uri, "--quiet", "--eval", script], capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.decode() + done.stdout.decode())

    def close(self) -> None:
        self.client.close()
        self.server.send_signal(signal.SIGTERM)
        self.server.wait(30)


def ended(db: Database[dict[str, Any]], task_id: int, seconds: float) -> dict[str, Any]:
    document = until(lambda: db.DL_TASK.find_one({"task_id": task_id, "status": {"$in": END_STATES}}), seconds)
    return document or db.DL_TASK.find_one({"task_id": task_id}) or {}


def dltask(*arguments: str) -> str:
    return subprocess.run([*DLTASK, *arguments], capture_output=True, text=True, check=True).stdout


def error_codes(bench: Bench, datasets: Path) -> None:
    """Each code from a raw document and from TaskProcess."""
    empty = bench.database("empty")
    service = bench.serve()
    bench.insert(f"[{{task_id: 1, task_type: 'TRAIN', dataset: 'x', param_request: {json.dumps(CELLS)}}}]")
    codes = {5: ended(empty, 1, 30).get("error_code")}
    with TaskProcess() as process:
        python = {5: process.task_start_request(ParamClass("cells"), 2, TaskTypeClass.TRAIN, ["0" * 24], "")}
    service.send_signal(signal.SIGTERM)
    service.wait(30)

    db = bench.database("codes")
    dltask("dataset", "import", "--format", "coco", str(datasets / "bccd"), "--name", "bccd")
    image = db.IMG_INFO.find_one({"split": "train"})
    assert image is not None
    service = bench.serve(DLTASK_CPU_DEVICES="0")
    good = json.dumps(CELLS)
    raw = {
        4: f"{{task_id: -1, task_type: 'TRAIN', dataset: 'bccd', param_request: {good}}}",
        1: f"{{task_id: 11, task_type: 'GUESS', dataset: 'bccd', param_request: {good}}}",
        7: "{task_id: 17, task_type: 'TRAIN', dataset: 'bccd', param_request: {model_name: 'a', batch_sise: 3}}",
        8: "{task_id: 18, task_type: 'TEST', dataset: 'bccd', param_request: {model_name: 'nobody'}}",
        2: f"{{task_id: 12, task_type: 'TRAIN', json_mongodb_id: 'f'.repeat(24), param_request: {good}}}",
        3: f"{{task_id: 13, task_type: 'TRAIN', img_mongodb_ids: ['f'.repeat(24)], param_request: {good}}}",
        0: f"{{task_id: 10, task_type: 'TRAIN', img_mongodb_ids: ['{image['_id']}'], param_request: {good}}}",
    }
    bench.insert("[" + ", ".join(raw.values()) + "]")
    for code in raw:
        task_id = -1 if code == 4 else 10 + code
        seen = until(lambda n=task_id: db.DL_TASK.find_one({"task_id": n, "error_code": {"$exists": True}}), 30) or {}
        codes[code] = seen.get("error_code")
        if code:
            print(f"       {code}: {seen['error']['message'][:150]}")
    wrong = ParamClass("a")
    wrong.batch_size = -5
    cells = ParamClass(**CELLS)
    with TaskProcess() as process:
        ask, train, test = process.task_start_request, TaskTypeClass.TRAIN, TaskTypeClass.TEST
        ids = [str(image["_id"])]
        python |= {
            4: ask(cells, 2**64, train, ids, ""),
            1: ask(cells, 21, "GUESS", ids, ""),  # type: ignore[arg-type]
            7: ask(wrong, 22, train, ids, ""),
            8: ask(ParamClass("nobody"), 23, test, ids, ""),
            2: ask(cells, 24, train, [], "f" * 24),
            3: ask(cells, 25, train, ["f" * 24], ""),
            0: ask(cells, 2**64 - 1, train, ids, ""),
        }
        db.DL_MODEL.insert_one({"model_name": "there", "version": 1, "task_id": 99})
        assert ask(ParamClass("there"), 26, test, ids, "") == 0
        python[6] = process.task_test_result(26)[0]
    service.send_signal(signal.SIGTERM)
    service.wait(30)
    say("each error code from a raw document", all(k == v for k, v in codes.items()), str(dict(sorted(codes.items()))))
    shown = {k: v.name for k, v in sorted(python.items())}
    say("each error code from TaskProcess", all(k == v for k, v in python.items()), str(shown))


def cells(bench: Bench, datasets: Path, seeds: int) -> None:
    """The training and the test of the README, once for each seed (a task's seed is its number)."""
    db = bench.database("cells")
    dltask("dataset", "import", "--format", "coco", str(datasets / "bccd"), "--name", "bccd")
    service = bench.serve()
    figures = []
    for number in range(1, seeds + 1):
        train, test = 10 * number, 10 * number + 1
        task_id = 1 if number == 1 else train
        request = {**CELLS, "model_name": f"cells{number}"}
        bench.insert(
            f"[{{task_id: {task_id}, task_type: 'TRAIN', dataset: 'bccd', split: 'train', "
            f"param_request: {json.dumps(request)}}}]"
        )
        trained = ended(db, task_id, 900)
        bench.insert(
            f"[{{task_id: {test}, task_type: 'TEST', dataset: 'bccd', split: 'test', "
            f"param_request: {{model_name: 'cells{number}', device_type: 'CPU'}}}}]"
        )
        tested = ended(db, test, 300)
        metrics = tested.get("result", {}).get("metrics", {})
        seconds = trained.get("result", {}).get("seconds")
        figures.append((metrics.get("map_50", 0), metrics.get("map", 0)))
        kept = trained.get("status") == tested.get("status") == "SUCCEEDED" and metrics["map_50"] >= 0.88
        say(
            f"bccd, task_id {task_id}: mAP@.5 of at least 0.88",
            bool(kept and trained["end_time"] and tested["end_time"]),
            f"{trained.get('status')}/{tested.get('status')}, mAP@.5 {metrics.get('map_50')}, "
            f"mAP {metrics.get('map')}, trained in {seconds} s, "
            f"{tested.get('result', {}).get('images_per_second')} images/s tested",
        )
    fifty, whole = ([round(row[i], 4) for row in figures] for i in (0, 1))
    say(f"three seeds, mAP@.5 {fifty}, mAP {whole}", min(fifty) >= 0.88, f"mean mAP@.5 {sum(fifty) / len(fifty):.4f}")
    print(dltask("report", "1", str(bench.folder / "report")))

    bench.insert(
        f"[{{task_id: 900, task_type: 'TRAIN', dataset: 'bccd', split: 'train', param_request: {json.dumps(CELLS)}}}]"
    )
    until(lambda: db.DL_TASK.find_one({"task_id": 900, "snapshot.iteration": {"$gte": 100}}), 600)
    service.kill()
    service.wait()
    service = bench.serve()
    resumed = ended(db, 900, 900)
    versions = db.DL_MODEL.count_documents({"model_name": "cells"})
    result = resumed.get("result", {})
    say(
        "kill -9 in the middle of a training",
        (resumed.get("status"), resumed.get("attempt"), versions) == ("SUCCEEDED", 2, 1)
        and bool(result.get("resumed_from_iteration")),
        f"{resumed.get('status')}, attempt {resumed.get('attempt')}, resumed from iteration "
        f"{result.get('resumed_from_iteration')}, {versions} model version, "
        f"validation mAP@.5 {result.get('metrics', {}).get('map_50')}",
    )
    time.sleep(10)
    status = Path(f"/proc/{service.pid}/status").read_text().split("VmRSS:")[1].split()[0]
    say("idle service under 150 MB", int(status) < 150_000, f"{int(status) / 1000:.0f} MB resident")
    service.send_signal(signal.SIGTERM)
    service.wait(30)


def imports() -> None:
    """Importing the service imports no torch."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import service.app"], capture_output=True, text=True, check=True
    )
    modules = [line.split("|")[-1].strip() for line in done.stderr.splitlines()]
    heavy = [name for name in modules if name.split(".")[0] in ("torch", "cv2", "onnxruntime", "matplotlib", "numpy")]
    say("import service.app loads no torch", not heavy, f"{len(modules)} modules, of the heavy ones {heavy or 'none'}")


def main() -> int:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=Path, required=True)
    parser.add_argument("--mongosh", default="mongosh")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dltask-acceptance-") as folder:
        imports()
        bench = Bench(Path(folder), options.mongosh)
        try:
            error_codes(bench, options.datasets)
            cells(bench, options.datasets, options.seeds)
        finally:
            bench.close()
    return 0 if all(_kept) else 1


if __name__ == "__main__":
    raise SystemExit(main())
