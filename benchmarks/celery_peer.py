"""Celery with Redis, the queue that others are built on, for the scripts that compare us with it.

Run by itself it says which Celery there is. It needs `apt-get install redis-server`, and Celery in an environment of
its own: `--celery-python PATH` of the scripts, else one in the temporary folder, made by pip the first time.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_APP = """
import os, time
from celery import Celery
app = Celery("peer", broker=os.environ["PEER_REDIS"], backend=os.environ["PEER_REDIS"])

@app.task(name="begun")
def begun():
    return time.monotonic()  # of the whole machine, so that the client can compare it with its own
"""
_VERSION = "import celery, redis; print('Celery', celery.__version__, 'with redis-py', redis.__version__)"


def celery_python(given: str | None) -> str | None:
    """The Python that has Celery; None, and why on stderr, if there is none to be had."""
    if shutil.which("redis-server") is None:
        print("no Celery: redis-server is missing (apt-get install redis-server)", file=sys.stderr)
        return None
    home = Path(tempfile.gettempdir()) / "dltask-celery"
    python = given or str(home / "bin" / "python")
    try:
        if given is None and not _has_celery(python):
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, capture_output=True)
            subprocess.run([python, "-m", "pip", "install", "-q", "celery[redis]"], check=True, capture_output=True)
        subprocess.run([python, "-c", _VERSION], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no Celery: {error}", file=sys.stderr)
        return None
    return python


def _has_celery(python: str) -> bool:
    return Path(python).exists() and subprocess.run([python, "-c", _VERSION], capture_output=True).returncode == 0


class Peer:
    """A Redis server and, once started, a Celery worker; as they come, but for files and a log."""

    def __init__(self, python: str, folder: Path, port: int) -> None:
        self._python = python
        self._folder = folder
        self._env = os.environ | {"PEER_REDIS": f"redis://127.0.0.1:{port}/0", "PYTHONPATH": str(folder)}

    @contextmanager
    def worker(self, processes: int) -> Iterator[None]:
        """A worker with so many processes, until the end."""
        log = self._folder / "worker.log"
        command = [self._python, "-m", "celery", "-A", "peer", "worker", "-c", str(processes), "-l", "info"]
        with log.open("wb") as out:
            process = subprocess.Popen(command, cwd=self._folder, env=self._env, stdout=out, stderr=out)
            try:
                _until(lambda: " ready." in log.read_text(), process)
                yield
            finally:
                process.terminate()
                process.wait(30)

    def client(self, code: str, *arguments: object) -> str:
        """What `code`, a client's program with `app` and `begun` of the module `peer`, prints."""
        command = [self._python, "-c", code, *map(str, arguments)]
        return subprocess.run(command, env=self._env, stdout=subprocess.PIPE, text=True, check=True).stdout


@contextmanager
def celery_peer(python: str) -> Iterator[Peer]:
    """Redis on a free port, without tasks; nothing is left of it."""
    with tempfile.TemporaryDirectory(prefix="dltask-celery-") as name, socket.socket() as probe:
        folder = Path(name)
        (folder / "peer.py").write_text(_APP)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", name]
        redis = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            _until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, redis)
            yield Peer(python, folder, port)
        finally:
            redis.terminate()
            redis.wait(30)


def _until(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, "it ended"
        assert time.monotonic() < deadline, "it is not ready"
        time.sleep(0.05)


def main() -> None:
    """Say what there is."""
    python = celery_python(None)
    if python is not None:
        print(subprocess.run([python, "-c", _VERSION], capture_output=True, text=True, check=True).stdout.strip())


if __name__ == "__main__":
    main()
