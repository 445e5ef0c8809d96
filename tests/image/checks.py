"""What is tried with the image. Each check says what it found, for the table; what is wrong raises Failed."""

import json
import time
import urllib.request
from typing import Any

from tests.image.build import IMAGE
from tests.image.containers import MEMORY, TIGHT, USER, Bench, Container, wait_for
from tests.image.engine import Engine, Failed
from tests.manifests import ROOT as MANIFESTS
from tests.manifests import only, rendered

#: Iterations of a training that learns something, and of one that is only to be stopped and resumed.
ITERATIONS, FEW_ITERATIONS = 60, 20

#: None of these has any business in the image.
COMPILERS = ("gcc", "g++", "cc", "c++", "clang", "make", "ld", "as", "pip", "pip3")

Found = dict[str, Any]


#: How the command of the JobSet is changed for one machine without GPUs.
_ONE_NODE = {"--nnodes": "1", "--nproc-per-node": "2", "--node-rank": "0", "--master-addr": "127.0.0.1"}


def check(good: bool, message: str) -> None:
    """Raise Failed with this message unless it is good."""
    if not good:
        raise Failed(message)


def labels_and_size(engine: Engine) -> Found:
    """The image as it lies there: its size, its user, its labels, its layers."""
    (image,) = json.loads(engine.podman("image", "inspect", IMAGE))
    labels = image["Labels"]
    check(image["User"] == "10001:10001", f"the image's user is {image['User']!r}")
    check(image["Config"]["ExposedPorts"] == {"8080/tcp": {}}, f"ports {image['Config'].get('ExposedPorts')}")
    check(
        {"title", "description", "version", "revision", "licenses"}
        <= {name.removeprefix("org.opencontainers.image.") for name in labels},
        f"labels {labels}",
    )
    check(bool(image.get("HealthCheck") or image.get("Healthcheck")), "the image has no health check")
    layers = [layer["size"] for layer in json.loads(engine.podman("history", "--format=json", IMAGE))]
    return {
        "image_mb": round(image["Size"] / 1e6),
        # The base, Debian's packages, the dependencies, the code.
        "layers_mb": [round(size / 1e6, 1) for size in reversed(layers) if size],
    }


def doctor(bench: Bench) -> Found:
    """`dltask doctor`, held as tight as everything else."""
    options = [*TIGHT, *bench.environment(gpu_fallback="cpu"), "--rm"]
    checks = json.loads(bench.engine.podman("run", *options, IMAGE, "doctor", "--json"))
    bad = [one for one in checks if not one["ok"]]
    check(not bad, f"doctor: {bad}")
    return {"doctor": f"{len(checks)} checks ok"}


def ranks(bench: Bench, port: int) -> Found:
    """torchrun as the JobSet of the overlay multinode starts it, on one node with two ranks."""
    job = only(rendered("overlays/multinode"), "JobSet")["spec"]["replicatedJobs"][0]["template"]["spec"]
    program, *options, script = job["template"]["spec"]["containers"][0]["command"]
    changed = _ONE_NODE | {"--master-port": str(port)}
    values = {name: changed.get(name, value) for name, _, value in (option.partition("=") for option in options)}
    mounted = f"--volume={MANIFESTS / 'overlays' / 'multinode'}:/program:ro"
    said = bench.engine.podman(
        *("run", *TIGHT, "--rm", mounted, f"--entrypoint={program}", IMAGE),
        *(f"{name}={value}" for name, value in values.items()),
        script,
    )
    check('{"nodes": 1, "ranks": 2, "backend": "gloo"}' in said, f"torchrun said {said!r}")
    return {"torchrun": "two ranks reach each other"}


def held_tight(container: Container) -> Found:
    """It has no rights, cannot write, has no compiler, and keeps within its memory."""
    status = dict(line.split(":", 1) for line in container.execute("cat", "/proc/1/status").splitlines())
    check(status["Uid"].split() == [USER] * 4, f"it runs as {status['Uid']}")
    for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb"):
        check(int(status[name], 16) == 0, f"it has capabilities: {name} {status[name]}")
    check(status["NoNewPrivs"].strip() == "1", "it could gain privileges")
    # First what must work, lest everything below fail for another reason.
    container.execute("sh", "-c", "command -v python && touch /tmp/x")
    for path in ("/opt/dltask/x", "/etc/x", "/var/x", "/x"):
        check(container.fails("touch", path), f"{path} can be written")
    for name in COMPILERS:
        check(container.fails("sh", "-c", f"command -v {name}"), f"{name} is in the image")
    limits = ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory.max")
    limit = container.execute("sh", "-c", f"cat {' '.join(limits)} 2>/dev/null || true").split()
    check(str(MEMORY) in limit, f"the memory limit is {limit}")
    return {"held": f"uid {USER}, no capabilities, read-only root, {MEMORY >> 30} GiB"}


def answers(port: int) -> Found:
    """The probes, from outside."""
    for path in ("/livez", "/readyz"):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            check(answer.status == 200, f"{path}: {answer.status}")
    return {"http": "/livez and /readyz answer"}


def healthy(container: Container) -> Found:
    """The image's own health check, which podman runs inside."""
    check(container.health(), "the health check fails")
    return {"healthcheck": "healthy"}


def trained_and_tested(bench: Bench) -> Found:
    """A training and a test of its model, both on real images, in the container that serves."""
    began = time.monotonic()
    train = bench.succeeded(bench.submit("train", max_num_iters=ITERATIONS))
    seconds = time.monotonic() - began
    # From the file in the image: nothing is downloaded, and a random start would say so.
    check("fdet" in train["initial_weights"], f"initial weights: {train['initial_weights']}")
    check(train["metrics"]["map_50"] > 0, f"it has learned nothing: {train['metrics']}")
    test = bench.succeeded(bench.submit("test"))
    check(test["detections"] > 0, "the test found nothing")
    return {
        "train_seconds": round(seconds, 1),
        "train_map_50": round(train["metrics"]["map_50"], 3),
        "initial_weights": train["initial_weights"],
        "test_map_50": round(test["metrics"]["map_50"], 3),
        "test_images_per_second": round(test["images_per_second"], 1),
    }


def drained(bench: Bench, container: Container) -> tuple[Found, int]:
    """SIGTERM in the middle of a training: the task waits again, with a snapshot; returns its number too."""
    task_id = bench.submit("train", max_num_iters=FEW_ITERATIONS)
    wait_for(
        f"progress of task {task_id}", lambda: bench.task(task_id).get("progress", {}).get("iteration", 0) >= 2, 300
    )
    began = time.monotonic()
    code = container.terminate()
    seconds = time.monotonic() - began
    check(code == 0, f"exit code {code} after SIGTERM:\n{container.log()[-2000:]}")
    task = bench.task(task_id)
    check(task["status"] == "PENDING" and task["failures"] == 0, f"after SIGTERM it is {task['status']}")
    check(task["snapshot"]["iteration"] >= 2, f"after SIGTERM its snapshot is {task.get('snapshot')}")
    return {"drain_seconds": round(seconds, 1), "drain_snapshot_iteration": task["snapshot"]["iteration"]}, task_id


def once(bench: Bench, task_id: int, iteration: int) -> Found:
    """`serve --once` in another container goes on from that snapshot, and ends with the task."""
    container = bench.start("once", "serve", "--once", http_port="off")
    code = container.wait()
    check(code == 0, f"serve --once: exit code {code}\n{container.log()[-2000:]}")
    result = bench.succeeded(task_id)
    check(result["resumed_from_iteration"] == iteration, f"it went on from {result['resumed_from_iteration']}")
    container.remove()
    return {"once": f"exit 0, resumed from {iteration}"}
