"""What watchers cost the server: change streams on the task collection, as each worker and each waiting client has one.

    python benchmarks/watchers.py [--watchers 100 1000] [--seconds 6] [--rounds 2]

Prints how many tasks a second a client can insert one after the other with so many streams open, the CPU time that the
server spends on each insert until all have its event, and the share of a core that it needs for them when there is
nothing to tell; the floor is the same without any. They are simulated: each is a connection that asks for the next
event as the driver does, with the pipeline of the service, and hardly looks at the answer; a thousand real drivers
would take the CPU that is to be measured. All are seen to get every event.
"""

import argparse
import selectors
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import bson
from figures import figure, in_turn
from idle import cpu_seconds
from pymongo import MongoClient
from pymongo.uri_parser import parse_uri

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a request, as the tests make it

from handlers.store.indexes import INDEXES
from handlers.store.stream import _AWAIT_MS, _PIPELINE
from service.embedded import embedded_mongo
from tests.helpers import train_request

#: Of the wire protocol: the kind of message that all are, and the bytes of an answer before its document.
_OP_MSG, _HEADER = 2013, 21
_NAME = "watched"


@dataclass(frozen=True)
class Cost:
    """What was measured with some watchers."""

    inserts: float
    milliseconds: float
    idle_percent: float


class Stream:
    """One simulated watcher, on a connection of its own."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address)
        self.events = 0
        pipeline = [{"$changeStream": {}}, *_PIPELINE]
        self.socket.sendall(_message({"aggregate": 1, "pipeline": pipeline, "cursor": {}, "$db": _NAME}))
        answer = bson.decode(self._answer()[_HEADER:])
        assert answer["ok"] == 1, answer
        cursor = bson.Int64(answer["cursor"]["id"])
        more = {"getMore": cursor, "collection": "$cmd.aggregate", "maxTimeMS": _AWAIT_MS, "$db": _NAME}
        self._more = _message(more)
        self.socket.sendall(self._more)

    def go_on(self) -> None:
        """Take what has come, and ask for what comes next."""
        self.events += self._answer().count(b"documentKey")
        self.socket.sendall(self._more)

    def _answer(self) -> bytes:
        data = self.socket.recv(1 << 16)
        while len(data) < int.from_bytes(data[:4], "little"):
            part = self.socket.recv(1 << 16)
            assert part, "the server hung up"
            data += part
        return data


def _message(command: dict[str, Any]) -> bytes:
    """`command` as it goes over the wire: OP_MSG, no flags, one section."""
    body = struct.pack("<IB", 0, 0) + bson.encode(command)
    return struct.pack("<iiii", 16 + len(body), 1, 0, _OP_MSG) + body


def watch(host: str, port: int, count: int) -> None:
    """Be so many watchers; says "ready", and "all" once each got as many events as stdin says, or why not."""
    streams = [Stream((host, port)) for _ in range(count)]
    expected = None
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream.socket, selectors.EVENT_READ, stream)
        selector.register(sys.stdin, selectors.EVENT_READ)
        print("ready", flush=True)
        while expected is None or any(stream.events < expected for stream in streams):
            for key, _ in selector.select():
                if key.data is None:
                    expected = int(sys.stdin.readline())
                    selector.unregister(sys.stdin)
                else:
                    key.data.go_on()
    print("all" if all(stream.events == expected for stream in streams) else "too many", flush=True)


@contextmanager
def watchers(uri: str, count: int, inserts: list[int]) -> Iterator[None]:
    """A process with so many watchers; waits at the end until each has got all `inserts`."""
    if not count:
        yield
        return
    host, port = parse_uri(uri)["nodelist"][0]
    command = [sys.executable, __file__, "--watch", host, str(port), str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", "it ended"
        yield
        process.stdin.write(f"{sum(inserts)}\n".encode())
        process.stdin.close()
        assert process.stdout.readline() == b"all\n", "a watcher missed an event"


def measure(uri: str, count: int, seconds: float) -> Cost:
    """What so many watchers cost, idle for `seconds` and while tasks are inserted for as long."""
    with MongoClient[dict[str, Any]](uri) as client:
        pid, tasks = client.admin.command("serverStatus")["pid"], client[_NAME].DL_TASK
        tasks.create_indexes(INDEXES["DL_TASK"])
        inserts: list[int] = []
        with watchers(uri, count, inserts):
            time.sleep(1)
            used = cpu_seconds(pid)
            time.sleep(seconds)
            idle = (cpu_seconds(pid) - used) / seconds
            used, began = cpu_seconds(pid), time.monotonic()
            number = 0
            while time.monotonic() - began < seconds:
                tasks.insert_one(train_request(number))
                number += 1
            rate = number / (time.monotonic() - began)
            inserts.append(number)
        cost = Cost(rate, 1000 * (cpu_seconds(pid) - used) / number, 100 * idle)
        client.drop_database(_NAME)
    return cost


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--watchers", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--watch", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.watch:
        host, port, count = arguments.watch
        watch(host, int(port), int(count))
        return
    found: dict[int, list[Cost]] = {count: [] for count in (0, *arguments.watchers)}
    async with embedded_mongo() as uri:

        def run(count: int) -> float:
            found[count].append(measure(uri, count, arguments.seconds))
            return found[count][-1].inserts

        in_turn({str(count): partial(run, count) for count in found}, arguments.rounds)
    for count in arguments.watchers:
        for name, unit, of in (
            ("inserts by one client", "tasks/s", lambda cost: cost.inserts),
            ("server's CPU time for an insert", "ms", lambda cost: cost.milliseconds),
            ("server's CPU when idle", "% of a core", lambda cost: cost.idle_percent),
        ):
            ours, floor = [of(cost) for cost in found[count]], [of(cost) for cost in found[0]]
            figure(f"{name}, {count} watchers", unit, ours, floor=floor, floor_is="no watcher")


if __name__ == "__main__":
    anyio.run(main)
