"""A replica set of three real members on loopback, each behind a proxy, and what can befall it."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pymongo import MongoClient
from pymongo.errors import PyMongoError

from service.embedded import find_mongod
from tests.chaos.processes import end, free_port, send, start, wait_until

_SET = "chaos"


class Member:
    """One member: a mongod, and the proxy's port in front of it, under which all the others know it."""

    def __init__(self, folder: Path, proxy_port: int) -> None:
        self._folder = folder
        folder.mkdir(parents=True)
        self.port = free_port()
        self.proxy_port = proxy_port
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, on the data it had."""
        command = [str(find_mongod()), "--dbpath", str(self._folder), "--port", str(self.port)]
        command += ["--bind_ip", "127.0.0.1", "--replSet", _SET, "--nounixsocket", "--quiet"]
        command += ["--wiredTigerCacheSizeGB", "0.25", "--oplogSize", "256", "--noscripting"]
        # Test commands: the server itself then answers as a fault would have it (failpoint `failCommand`).
        command += ["--setParameter", "enableTestCommands=1"]
        command += ["--setParameter", "diagnosticDataCollectionEnabled=false"]
        with (self._folder / "mongod.log").open("ab") as log:
            self.process = start(command, stdout=log, stderr=log)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process is not None
        send(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)

    @contextmanager
    def admin(self, seconds: float = 5) -> Iterator[Any]:
        """The `admin` database of this member itself."""
        ms = int(seconds * 1000)
        with MongoClient[dict[str, Any]](
            "127.0.0.1",
            self.port,
            directConnection=True,
            serverSelectionTimeoutMS=ms,
            connectTimeoutMS=ms,
            socketTimeoutMS=ms,
        ) as client:
            yield client.admin

    def state(self) -> str:
        """`PRIMARY`, `SECONDARY` or what else it says of itself; empty if it does not answer."""
        try:
            with self.admin(1) as admin:
                hello = admin.command("hello")
        except PyMongoError:
            return ""
        return "PRIMARY" if hello.get("isWritablePrimary") else "SECONDARY" if hello.get("secondary") else "OTHER"


class Cluster:
    """The set. Made by `cluster`."""

    def __init__(self, folder: Path, size: int) -> None:
        self.members = [Member(folder / f"member-{number}", free_port()) for number in range(size)]
        hosts = ",".join(f"127.0.0.1:{member.proxy_port}" for member in self.members)
        self.uri = f"mongodb://{hosts}/?replicaSet={_SET}"
        pairs = [f"{member.proxy_port}:{member.port}" for member in self.members]
        proxy = [sys.executable, str(Path(__file__).with_name("proxy.py")), *pairs]
        self._proxy = start(proxy, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self) -> None:
        """Start the members and make them a set."""
        assert self._proxy.stdout is not None
        self._proxy.stdout.readline()
        for member in self.members:
            member.start()
        for member in self.members:
            wait_until(lambda m=member: _listens(m), 60, f"mongod listens on {member.port}")
        hosts = [{"_id": i, "host": f"127.0.0.1:{m.proxy_port}"} for i, m in enumerate(self.members)]
        with self.members[0].admin(30) as admin:
            admin.command("replSetInitiate", {"_id": _SET, "members": hosts})
        self.heal()

    def stop(self) -> None:
        """End the members and the proxy."""
        for member in self.members:
            if member.process is not None and member.process.poll() is None:
                member.signal(signal.SIGCONT)
                member.kill()  # Its data go with it: nothing to close in order.
        end(self._proxy)

    def heal(self, seconds: float = 120) -> None:
        """Wait until there are one primary and otherwise secondaries."""
        whole = sorted(["PRIMARY", *["SECONDARY"] * (len(self.members) - 1)])
        wait_until(lambda: sorted(m.state() for m in self.members) == whole, seconds, "the replica set is whole")

    def primary(self) -> Member:
        """The primary. Raises TimeoutError."""
        found: list[Member] = []
        wait_until(lambda: found.extend(m for m in self.members if m.state() == "PRIMARY") or found, 60, "a primary")
        return found[0]

    # ---- faults; each returns when the set is whole again

    def kill_primary(self, pause: float = 0) -> None:
        """SIGKILL of the primary, which is started again after `pause` seconds."""
        member = self.primary()
        member.kill()
        time.sleep(pause)
        member.start()
        self.heal()

    def step_down(self) -> None:
        """The primary steps down, and is eligible again after 10 s."""
        with self.primary().admin(20) as admin:
            try:
                admin.command("replSetStepDown", 10, secondaryCatchUpPeriodSecs=5, force=True)
            except PyMongoError:
                pass  # some versions close the connection
        self.heal()

    def restart_all(self, away: float = 0) -> None:
        """Every member is ended (in order or not) and started again after `away` seconds."""
        for member in self.members:
            member.signal(signal.SIGTERM)
        for member in self.members:
            assert member.process is not None
            try:
                member.process.wait(20)
            except subprocess.TimeoutExpired:
                member.kill()
        time.sleep(away)
        for member in self.members:
            member.start()
        self.heal()

    def freeze(self, member: Member, seconds: float) -> None:
        """SIGSTOP: the member keeps its connections and answers nothing."""
        member.signal(signal.SIGSTOP)
        time.sleep(seconds)
        member.signal(signal.SIGCONT)
        self.heal()

    def cut(self) -> None:
        """Cut the workers' connections in the middle of their next answers."""
        assert self._proxy.stdin is not None
        self._proxy.stdin.write(b"cut\n")
        self._proxy.stdin.flush()

    def lose_history(self, streams: int) -> None:
        """Answer the next `streams` questions of workers' change streams as if their place in the oplog were gone."""
        with self.primary().admin() as admin:
            admin.command(
                {
                    "configureFailPoint": "failCommand",
                    "mode": {"times": streams},
                    # ChangeStreamHistoryLost
                    "data": {"failCommands": ["getMore"], "errorCode": 286, "appName": "dltask"},
                }
            )

    def kill_streams(self) -> int:
        """End every open change stream of the workers on the server; returns how many."""
        with self.primary().admin() as admin:
            cursors = [
                (operation["ns"].partition("."), operation["cursor"]["cursorId"])
                for operation in admin.aggregate([{"$currentOp": {"allUsers": True, "idleCursors": True}}])
                if operation.get("appName") == "dltask" and operation.get("cursor", {}).get("tailable")
            ]
            for (name, _, collection), cursor in cursors:
                admin.client[name].command("killCursors", collection, cursors=[cursor])
        return len(cursors)

    def some_member(self, rng: random.Random) -> Member:
        """Any member."""
        return rng.choice(self.members)


def _listens(member: Member) -> bool:
    try:
        with member.admin(1) as admin:
            admin.command("ping")
    except PyMongoError:
        return False
    return True


@contextmanager
def cluster(folder: Path, size: int = 3) -> Iterator[Cluster]:
    """A replica set with its data in `folder`, ended with the context."""
    made = Cluster(folder, size)
    try:
        made.start()
        yield made
    finally:
        made.stop()
