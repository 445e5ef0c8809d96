"""`python -m tests.image`: builds the image and runs it, for real, without a Docker daemon; `make image-test`.

Needs root, apt-get and the package index. It prints a table, and last one line of JSON with the same; the exit code is
0 if everything held. Half an hour on two busy cores, and 45 GB on disk meanwhile. No part of `make test`: it installs
Debian packages, and the image is 7 GB.
"""

import argparse
import json
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anyio.from_thread import start_blocking_portal
from rich.console import Console
from rich.table import Table

from service.embedded import embedded_mongo
from service.samples import make_samples
from tests.image import checks
from tests.image.build import ROOT, build_base, build_image
from tests.image.containers import Bench
from tests.image.engine import Engine, Failed, install_missing
from tests.image.pod import played


def main() -> int:
    """Build, run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="for layers and logs, kept: the next run builds only what changed")
    folder = parser.parse_args().folder
    began = time.monotonic()
    found: checks.Found = {}
    try:
        install_missing()
        with _folder(folder) as place:
            run(place, found, keep=folder is not None)
        found["good"] = True
    except Failed as error:
        print(f"image-test: {error}", file=sys.stderr)
        found |= {"good": False, "error": str(error).splitlines()[0]}
    found["seconds"] = round(time.monotonic() - began)
    table = Table("FOUND", "", box=None)
    for name, value in found.items():
        table.add_row(name, str(value))
    Console(width=140).print(table)
    print(json.dumps(found))
    return 0 if found["good"] else 1


def run(folder: Path, found: checks.Found, *, keep: bool) -> None:
    """Build and try everything; what is found goes into `found`, as far as it comes. Raises Failed."""
    engine = Engine(folder / "engine")
    found["storage"] = engine.driver
    try:
        _say("base image (debootstrap)")
        build_base(engine, folder)
        _say(f"image; its log is {folder / 'build.log'}")
        found["build_seconds"] = round(build_image(engine, folder))
        found |= checks.labels_and_size(engine)
        with _bench(engine, folder) as bench:
            try_image(bench, folder, found)
    finally:
        engine.clean(keep_images=keep)


def try_image(bench: Bench, folder: Path, found: checks.Found) -> None:
    """Everything that needs a running MongoDB."""
    _say("doctor")
    found |= checks.doctor(bench)
    _say("torchrun")
    found |= checks.ranks(bench, _free_port())
    _say("a worker")
    port = _free_port()
    worker = bench.start("worker", "serve", http_port=port)
    found["ready_seconds"] = round(worker.ready(), 1)
    found |= checks.held_tight(worker)
    found |= checks.answers(port)
    found |= checks.healthy(worker)
    _say("a training and a test")
    found |= checks.trained_and_tested(bench)
    _say("SIGTERM in the middle of a training")
    drained, task_id = checks.drained(bench, worker)
    found |= drained
    worker.remove()
    _say("serve --once")
    found |= checks.once(bench, task_id, drained["drain_snapshot_iteration"])
    _say("the pod of the overlay dev")
    found |= played(bench, folder, _free_port())


@contextmanager
def _bench(engine: Engine, folder: Path) -> Iterator[Bench]:
    """A MongoDB on this machine, outside of all containers, with images in it."""
    images = ROOT.parent / "shared" / "datasets" / "bccd"
    if not images.is_dir():
        images = folder / "samples"
        shutil.rmtree(images, ignore_errors=True)
        images.mkdir()
        make_samples(images)
    with start_blocking_portal("asyncio") as portal, portal.wrap_async_context_manager(embedded_mongo()) as uri:
        bench = Bench(engine, uri, f"image_{secrets.token_hex(4)}")
        try:
            bench.client("dataset", "import", "--format", "coco", str(images), "--name", "bccd")
            yield bench
        finally:
            bench.close()


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.resolve()
        return
    # Not a TemporaryDirectory: the storage in it has to be unmounted, which `Engine.clean` does.
    made = Path(tempfile.mkdtemp(prefix="dltask-image-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _say(what: str) -> None:
    print(f"image-test: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
