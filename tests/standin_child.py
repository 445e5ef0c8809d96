"""A child that keeps the contract of `handlers.detection.job` and trains nothing, for tests of the service.

It is started through the setting DLTASK_CHILD_COMMAND, as an operator would swap the child. What it does is in the
task's `model_name`: `ok`, or the name of a fault; one iteration takes 20 ms.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

_ITERATION_SECONDS = 0.02
_EMPTY = {"used": 1, "skipped": 0, "skipped_examples": []}
_METRICS = {"map": 0.5, "map_50": 0.75, "map_75": 0.5, "per_class": [], "on": "val"}


def emit(event: str, **fields: object) -> None:
    """Report one event."""
    print(json.dumps({"event": event, **fields}), flush=True)


def main() -> int:
    """Take one job from stdin, as the real child does."""
    stopping: list[int] = []
    line = sys.stdin.readline().strip()
    if not line:
        return 0
    job = json.loads(Path(line).read_text())
    behaviour = job["params"]["model_name"].split(":")[0]
    signal.signal(signal.SIGTERM, lambda *_: None if behaviour == "deaf" else stopping.append(1))
    # Where a test can read which processes ran, and with what.
    if log := os.environ.get("STANDIN_LOG"):
        with Path(log).open("a") as out:
            out.write(json.dumps({"pid": os.getpid(), "env": dict(os.environ), "job": job}) + "\n")
    out_folder = Path(job["out"])
    first = int(Path(job["resume_from"]).read_text()) if job["resume_from"] else 0
    last = job["params"]["max_num_iters"] if job["kind"] == "TRAIN" else 1
    emit("started", device=job["devices"][0], initial_weights="stand-in", iteration=first)
    print("hello from the child", file=sys.stderr, flush=True)
    if behaviour == "garbage":
        print("this is no event", flush=True)
        print("x" * (3 << 20), flush=True)
    if behaviour == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if behaviour == "silent":
        time.sleep(600)
    if behaviour == "nothing":
        return 0
    if behaviour in ("data", "loss", "bug"):
        emit("failed", kind=behaviour, message=f"made up: {behaviour}")
        return 1
    if behaviour == "memory" and job["batch_size_limit"] is None:
        emit("failed", kind="memory", message="out of device memory")
        return 1

    def snapshot(iteration: int) -> None:
        path = out_folder / f"snapshot-{iteration}"
        path.write_text(str(iteration))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        emit("snapshot", path=str(path), iteration=iteration, sha256=digest)

    for iteration in range(first + 1, last + 1):
        time.sleep(_ITERATION_SECONDS)
        loss = 1 / iteration
        emit("progress", iteration=iteration, max_num_iters=last, loss=loss, images_per_second=1, eta_seconds=0)
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
        reports = {}
        if behaviour == "pictures":
            reports["curve"] = str(out_folder / "curve.png")
            Path(reports["curve"]).write_bytes(b"no real picture")
        emit(
            "trained",
            onnx=str(onnx),
            sha256=hashlib.sha256(onnx.read_bytes()).hexdigest(),
            class_names=["a"],
            input_size=320,
            iterations=last,
            best_iteration=last,
            resumed_from_iteration=first or None,
            initial_weights="stand-in",
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
        rows = [{"image_id": image["id"], "detections": [box]} for image in images]
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
