"""`dltask demo`: the whole service on this machine, used as a client uses it, from a bare start to the pictures."""

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
from rich.console import Console
from rich.text import Text

from handlers.store import Store, connect_store
from handlers.store.database import Document
from service.cli.fetch import fetch_reports
from service.cli.follow import OnDocument, count_reporter, follow, task_reporter
from service.cli.show import classes_table, table
from service.cli.until_signal import until_signal
from service.datasets import import_dataset, open_source
from service.embedded import embedded_mongo
from service.samples import make_samples
from service.show import outcome_text, printable, state

#: What the demo asks for. The rate and the rest are the defaults, as for any client that does not know better.
_TRAIN_PARAMS = {
    "model_name": "demo",
    "dataset_expansion_lst": ["HOR_FLIPE", "VER_FLIPE"],
    "device_type": "GPU",
    "max_num_iters": 100,
    "batch_size": 10,
    "snap_shot_ivterval": 50,
}
_TEST_PARAMS = {"model_name": "demo", "device_type": "GPU"}
_DATASET = "samples"

#: The service ends its child first, which may be saving a snapshot.
_STOP_SECONDS = 40


@dataclass
class _Outcome:
    """What the demo's last line says."""

    documents: dict[str, Document] = field(default_factory=dict)
    #: Of each task the pictures, and the report that has all of them.
    files: list[Path] = field(default_factory=list)

    def state(self, kind: str) -> str | None:
        document = self.documents.get(kind)
        return state(document) if document else None

    @property
    def good(self) -> bool:
        return self.state("train") == self.state("test") == "SUCCEEDED"

    def line(self) -> str:
        test = self.documents.get("test", {})
        metrics = (test.get("result") or {}).get("metrics") or {}
        return json.dumps(
            {
                "train": self.state("train"),
                "test": self.state("test"),
                "map_50": metrics.get("map_50"),
                "pictures": [str(path) for path in self.files if path.suffix == ".png"],
            }
        )


class ServiceEnded(RuntimeError):
    """The service ended in the middle of the demo."""


def run_demo(output: Path) -> int:
    """Run the demo with its files in `output`; returns the exit code: 0 if training and test succeeded.

    The last line on stdout is `{"train": status, "test": status, "map_50": 0 … 1, "pictures": [paths]}`, also after a
    failure. Raises EmbeddedMongoError if no MongoDB can be started here.
    """
    console = Console() if sys.stdout.isatty() else Console(width=120)
    outcome = _Outcome()
    output = output.absolute()
    log = output / "service.log"
    try:
        _, received = anyio.run(until_signal, lambda: _demo(console, output, log, outcome))
    except* ServiceEnded as group:
        ended: BaseException = group
        while isinstance(ended, BaseExceptionGroup):
            ended = ended.exceptions[0]
        print(f"dltask: {ended}", file=sys.stderr)
        received = None
    if received is not None:
        return 128 + received
    if not outcome.good:
        print(f"dltask: the demo did not succeed; the service's log is {log}", file=sys.stderr)
    print(outcome.line(), flush=True)
    return 0 if outcome.good else 1


async def _demo(console: Console, output: Path, log: Path, outcome: _Outcome) -> None:
    def say(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    samples = output / "samples"
    await anyio.to_thread.run_sync(lambda: shutil.rmtree(samples, ignore_errors=True))
    samples.mkdir(parents=True)
    say(f"Making sample images: {samples}")
    await anyio.to_thread.run_sync(make_samples, samples)
    with tempfile.TemporaryDirectory(prefix="dltask-demo-") as cache:
        say("Starting MongoDB (a replica set of one)")
        async with embedded_mongo() as uri, connect_store(uri, "dl") as store:
            with count_reporter(console, "Importing images") as progress:
                source = open_source("coco", samples, None, None)
                summary = await import_dataset(store, source, _DATASET, progress)
            say(f"Imported {summary.images} images with {summary.labels} boxes as data set {_DATASET!r}")
            say(f"Starting the service, which logs to {log}")
            async with _service(uri, Path(cache), log) as service, anyio.create_task_group() as group:
                group.start_soon(_watch, service, log)
                await _tasks(store, console, outcome)
                group.cancel_scope.cancel()
            for kind, document in outcome.documents.items():
                outcome.files += await fetch_reports(store, document, output / "pictures" / kind)
    _show(console, outcome)


async def _tasks(store: Store, console: Console, outcome: _Outcome) -> None:
    """One training, and a test of what it made."""
    with task_reporter(console) as report:
        train = {"task_id": 1, "task_type": "TRAIN", "dataset": _DATASET, "split": "train"}
        outcome.documents["train"] = await _run(store, report, {**train, "param_request": _TRAIN_PARAMS})
        if outcome.state("train") == "SUCCEEDED":
            test = {"task_id": 2, "task_type": "TEST", "dataset": _DATASET, "split": "test"}
            outcome.documents["test"] = await _run(store, report, {**test, "param_request": _TEST_PARAMS})


async def _run(store: Store, report: OnDocument, document: dict[str, Any]) -> Document:
    """Insert a task document, as any client does, and see it through to its end."""
    await store.tasks.insert(document)
    ended = await follow(store, document["task_id"], report)
    assert ended is not None  # nobody else knows this database
    return ended


@asynccontextmanager
async def _service(uri: str, cache: Path, log: Path) -> AsyncIterator[anyio.abc.Process]:
    """`dltask serve` as a process of its own, stopped at the end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DLTASK_")}
    environment |= {
        "DLTASK_MONGODB_URI": uri,
        "DLTASK_CACHE_DIR": str(cache),
        "DLTASK_GPU_FALLBACK": "cpu",
        "DLTASK_LOG_FORMAT": "text",
    }
    with log.open("wb") as out:
        process = await anyio.open_process(
            # -P: a package `service` in the folder that the demo is run from is somebody else's.
            [sys.executable, "-P", "-m", "service.cli", "serve"],
            env=environment,
            stdin=None,
            stdout=out,
            stderr=out,
            # Ctrl-C reaches us alone: the service is stopped below, before its database.
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with anyio.CancelScope(shield=True):
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                with anyio.move_on_after(_STOP_SECONDS):
                    await process.wait()
            await process.aclose()


async def _watch(service: anyio.abc.Process, log: Path) -> None:
    code = await service.wait()
    last = (await anyio.Path(log).read_text(errors="replace")).splitlines()[-5:]
    raise ServiceEnded(f"the service ended with code {code}; its last words in {log}:\n  " + "\n  ".join(last))


def _show(console: Console, outcome: _Outcome) -> None:
    rows = []
    for kind, document in outcome.documents.items():
        result = document.get("result") or {}
        metrics = result.get("metrics") or {}
        scores = [f"{metrics[name]:.3f}" if name in metrics else "" for name in ("map", "map_50")]
        about = (
            f"{result['model_name']}:{result['version']}"
            if state(document) == "SUCCEEDED"
            else printable(outcome_text(document))
        )
        seconds = f"{result['seconds']:.0f} s" if "seconds" in result else ""
        rows.append(
            [kind, state(document), *scores, metrics.get("on", ""), result.get("device", ""), seconds, about],
        )
    console.print()
    console.print(table(("TASK", "STATE", "mAP", "mAP@.5", "ON", "DEVICE", "TIME", "MODEL"), rows))
    test_metrics = (outcome.documents.get("test", {}).get("result") or {}).get("metrics")
    if test_metrics:
        console.print()
        console.print(classes_table(test_metrics))
    if outcome.files:
        console.print()
        console.print("Reports and pictures:")
        for path in outcome.files:
            console.print(Text(f"  {path}"), soft_wrap=True)
