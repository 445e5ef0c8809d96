"""A child that keeps the contract of `handlers.detection.job` and trains nothing, for tests of the service.

It is started through the setting DLTASK_CHILD_COMMAND, as an operator would swap the child. What it does is in the
task's `model_name`: `ok`, or the name of a fault (see `FAULTS`), with `once-` before it for a fault of the first
attempt only; what follows a dot is only a name. One iteration takes 20 ms.
"""

import ctypes
import errno
import hashlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ITERATION_SECONDS = 0.02
_EMPTY = {"used": 1, "skipped": 0, "skipped_examples": []}
_CARD = {
    **{"dataset": "toy", "split": "", "train_images": 3, "val_images": 0, "boxes": [7]},
    **{"recipe": "none at all", "versions": {"python": "3"}},
}
_METRICS = {"map": 0.5, "map_50": 0.75, "map_75": 0.5, "per_class": [], "on": "val"}


def emit(event: str, **fields: object) -> None:
    """Report one event."""
    print(json.dumps({"event": event, **fields}), flush=True)


def die(kind: str) -> None:
    """Say why, and end as a child that cannot go on."""
    emit("failed", kind=kind, message=f"made up: {kind}")
    raise SystemExit(1)


def crash() -> None:
    """End as an extension module that follows a wild pointer."""
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    """Say nothing any more."""
    time.sleep(600)


def chatter() -> None:
    """Go on talking, and get no further."""
    for _ in range(3000):
        emit("note", message="still here")
        time.sleep(0.2)


def garbage() -> None:
    """What libraries print."""
    print("this is no event", flush=True)
    sys.stdout.buffer.write(b'\x00\xff{"event":' + os.urandom(1000) + b"\n")
    print("x" * (3 << 20), flush=True)


def long_line() -> None:
    """100 MB without an end of line, and its end."""
    block = b"x" * (1 << 20)
    for _ in range(100):
        sys.stdout.buffer.write(block)
    print(flush=True)


def out_of_memory() -> None:
    """Take memory until there is no more, and be killed as the kernel does it."""
    resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))
    taken = []
    try:
        while True:
            taken.append(bytearray(16 << 20))
    except MemoryError:
        os.kill(os.getpid(), signal.SIGKILL)


def poison() -> None:
    """Take the worker along."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def linger() -> None:
    """Close all that the worker reads, and hang at the way out."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdout.flush()
    os.close(1)
    os.close(2)
    time.sleep(600)


FAULTS: dict[str, Callable[[], None]] = {
    "bug": lambda: die("bug"),
    "chatter": chatter,
    "crash": crash,
    "data": lambda: die("data"),
    "garbage": garbage,
    "long_line": long_line,
    "loss": lambda: die("loss"),
    "nothing": lambda: sys.exit(0),
    "out_of_memory": out_of_memory,
    "poison": poison,
    "silent": hang,
}


def main() -> int:
    """Take one job from stdin, as the real child does."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    line = sys.stdin.readline().strip()
    if not line:
        return 0
    job = json.loads(Path(line).read_text())
    fault = job["params"]["model_name"].split(":")[0].split(".")[0]
    if fault.startswith("once-"):
        fault = fault.removeprefix("once-") if job["attempt"] == 1 else "ok"
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: None if fault == "deaf" else stopping.append(1))
    # Where a test can read which processes ran, and with what.
    if log := os.environ.get("STANDIN_LOG"):
        with Path(log).open("a") as out:
            out.write(json.dumps({"pid": os.getpid(), "env": dict(os.environ), "job": job}) + "\n")
    try:
        code = run(job, fault, stopping)
        if fault == "linger":
            linger()
        return code
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        emit("failed", kind="machine", message=str(error))
        return 1


def run(job: dict[str, Any], fault: str, stopping: list[int]) -> int:
    """Report iterations and snapshots, and at last what a training or a test reports."""
    out_folder = Path(job["out"])
    first = int(Path(job["resume_from"]).read_text()) if job["resume_from"] else 0
    last = job["params"]["max_num_iters"] if job["kind"] == "TRAIN" else 1
    start = f"stand-in, from {Path(job['start_from']).read_text()}" if job.get("start_from") else "stand-in"
    emit("started", device=job["devices"][0], initial_weights=start, iteration=first)
    print("hello from the child", file=sys.stderr, flush=True)
    if fault == "memory" and job["batch_size_limit"] is None:
        die("memory")
    if fault in FAULTS:
        FAULTS[fault]()

    def snapshot(iteration: int) -> None:
        path = out_folder / f"snapshot-{iteration}"
        path.write_text(str(iteration))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        emit("snapshot", path=str(path), iteration=iteration, sha256=digest)

    for iteration in range(first + 1, last + 1):
        time.sleep(_ITERATION_SECONDS)
        # Its whole part tells an observer of the document which attempt wrote this progress.
        loss = job["attempt"] + iteration / 1e6
        emit("progress", iteration=iteration, max_num_iters=last, loss=loss, images_per_second=1, eta_seconds=0)
        if iteration % 10 == 1:
            emit("measured", iteration=iteration, values={"loss": loss})
        if stopping:
            if job["kind"] == "TRAIN":
                snapshot(iteration)
            emit("stopped", iteration=iteration)
            return 0
        if job["kind"] == "TRAIN" and iteration % job["params"]["snap_shot_ivterval"] == 0:
            snapshot(iteration)
    if job["kind"] == "TRAIN":
        onnx = out_folder / "model.onnx"
        onnx.write_bytes(b"no real model")
        more: dict[str, Any] = {}
        if "start_from" in job:  # the worker is of a release that knows weights
            weights = out_folder / "weights.pt"
            weights.write_text(f"no real weights of task {job['task_id']}")
            more = {"weights": str(weights), "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
            more["card"] = {**_CARD, "batch_size": job["params"]["batch_size"], "seed": job["seed"]}
        reports = {}
        if fault == "pictures":
            reports["curve"] = str(out_folder / "curve.png")
            Path(reports["curve"]).write_bytes(b"no real picture")
        emit(
            "trained",
            onnx=str(onnx),
            sha256=hashlib.sha256(onnx.read_bytes()).hexdigest(),
            **more,
            class_names=["a"],
            input_size=320,
            iterations=last,
            best_iteration=last,
            resumed_from_iteration=first or None,
            initial_weights=start,
            data_fingerprint="stand-in",
            device=job["devices"][0],
            metrics=_METRICS,
            images=_EMPTY,
            reports=reports,
        )
    else:
        detections = out_folder / "detections.jsonl"
        box = {"class_id": 1, "class_name": "a", "score": 0.9, "bbox": [0, 0, 5, 5]}
        images = [json.loads(row) for row in Path(job["images"]).read_text().splitlines()]
        rows = [{"image_id": image["id"], "detections": [box]} for image in images if "path" in image]
        detections.write_text("".join(json.dumps(row) + "\n" for row in rows))
        emit(
            "tested",
            detections=str(detections),
            detection_count=len(rows),
            images_per_second=1.0,
            device=job["devices"][0],
            metrics=None,
            images=_EMPTY,
            reports={},
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
