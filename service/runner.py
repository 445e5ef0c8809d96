"""The child process that trains or tests: started warm, given one job, read line by line, stopped for certain.

A child of its own, so that a crash, a leak, an out-of-memory kill or a cancel takes down one attempt and gives all its
device memory back. It leads a process group, so that the ranks that it starts go with it.
"""

import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import structlog
from anyio.abc import ByteReceiveStream, Process, TaskGroup
from anyio.streams.buffered import BufferedByteReceiveStream
from pydantic import ValidationError

from handlers.detection.job import Event, parse_event
from service.metrics import ChildEnd, Metrics

log: structlog.stdlib.BoundLogger = structlog.get_logger()

#: A longer line is no event and no log line, but a library gone wild; it is cut. The longest event is the last one of a
#: training: the names of 5,000 classes, of 800 bytes each at most, and its metrics.
MAX_LINE = 8 << 20

#: Lines of one child that are no events and are logged; of more there is no end.
_MAX_COMPLAINTS = 100

#: Seconds that a killed process group may take to be gone.
_KILL_SECONDS = 10


class Child:
    """One child process and its job. Made by `Children`."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._log = log.bind(pid=process.pid)
        self._stderr_done = anyio.Event()
        self._out = Path()
        #: Whether it got a job, whether it was asked to end, and whether it was killed before it had ended.
        self._given = self._asked = self._killed = False
        #: The last lines of its stderr: what a person needs to understand a death.
        self.last_words: list[str] = []

    @property
    def alive(self) -> bool:
        """Whether the process has not ended yet."""
        return self._process.returncode is None

    async def give(self, job: Path, out: Path, **context: object) -> None:
        """Start the job in file `job`, which has the child put its files into `out`.

        `context` (task_id, …) is bound to what is logged of the child from now on.
        """
        self._out, self._given = out, True
        self._log = self._log.bind(**context)
        assert self._process.stdin is not None
        try:
            await self._process.stdin.send(f"{job}\n".encode())
            await self._process.stdin.aclose()
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass  # it has died: `events` ends at once, and `wait` says how

    async def events(self) -> AsyncIterator[Event]:
        """What the child reports, until it ends. A line that is no event is logged and passed over."""
        assert self._process.stdout is not None
        complaints = 0
        async for line in _lines(self._process.stdout):
            try:
                event = parse_event(line, self._out)
            except ValidationError as error:
                complaints += 1
                if complaints <= _MAX_COMPLAINTS:
                    said, why = line[:300].decode(errors="replace"), error.errors()[0]["msg"][:300]
                    self._log.warning("child line ignored", line=said, reason=why)
                continue
            yield event

    async def forward_stderr(self) -> None:
        """Pass the child's own log on, until it ends."""
        # Started from within some attempt, this task inherited what is bound there.
        structlog.contextvars.clear_contextvars()
        assert self._process.stderr is not None
        try:
            async for raw in _lines(self._process.stderr):
                line = raw[:2000].decode(errors="replace")
                self.last_words = [*self.last_words[-19:], line]
                self._log.info("child output", line=line)
        finally:
            self._stderr_done.set()

    async def wait(self) -> int:
        """The exit code, below zero for a signal, once all its output has been read."""
        code = await self._process.wait()
        with anyio.move_on_after(5):  # a grandchild may hold stderr open
            await self._stderr_done.wait()
        return code

    def terminate(self) -> None:
        """Ask it to snapshot and end."""
        self._asked = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it, with all that it started."""
        self._killed = self._killed or self.alive
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        try:
            # The group, and not only its leader: a leader that is gone can leave ranks behind.
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass

    def end(self) -> ChildEnd:
        """How it has ended, or is being ended now."""
        code = self._process.returncode
        if not self._given:
            return "died_waiting" if code is not None and not self._killed else "unused"
        if code is None or self._killed or (self._asked and code == -signal.SIGTERM):
            return "killed"
        return "finished" if code == 0 else "failed" if code > 0 else "signal"

    async def close(self) -> None:
        """Make sure that nothing of it is left."""
        with anyio.CancelScope(shield=True):
            self.kill()
            with anyio.move_on_after(_KILL_SECONDS):
                await self._process.wait()
            # asyncio closes a pipe at its end and no sooner, and with much unread in it does not look for the end. Not
            # for long, since a grandchild may hold it open.
            with anyio.move_on_after(1):
                await self._stderr_done.wait()
                for output in (self._process.stdout, self._process.stderr):
                    if output is not None:
                        with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError):
                            async for _ in output:
                                pass
            # Not `aclose()`, which would wait for the process without end.
            for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
                if stream is not None:
                    await stream.aclose()


class Children:
    """Starts children, and keeps one warm: torch is imported before a job comes.

    `once`: one job is all that comes, so that nothing is warmed up after it.
    """

    def __init__(
        self,
        command: tuple[str, ...],
        environment: Mapping[str, str],
        group: TaskGroup,
        *,
        metrics: Metrics,
        once: bool = False,
    ) -> None:
        self._command = command
        self._once = once
        self._taken = self._closed = False
        self._environment = environment
        self._group = group
        self._metrics = metrics
        self._warm: Child | None = None
        #: Two attempts that begin at once would each warm up a child, and nobody would ever end one of them.
        self._warming = anyio.Lock()

    async def warm_up(self) -> None:
        """Have a warm child waiting, from now on. Raises OSError."""
        async with self._warming:
            if self._closed or (self._once and self._taken):
                return
            if self._warm is not None and not self._warm.alive:
                await self._close(self._warm)
                self._warm = None
            if self._warm is None:
                self._warm = await self._start()

    def warm_up_soon(self) -> None:
        """`warm_up` beside whoever asks for it, whatever becomes of him; a failure is logged."""
        self._group.start_soon(self._try_to_warm_up)

    async def _try_to_warm_up(self) -> None:
        try:
            await self.warm_up()
        except OSError as error:
            log.warning("child not warmed up", reason=str(error))

    @asynccontextmanager
    async def take(self) -> AsyncIterator[Child]:
        """A child of one's own, warm if there is one; nothing of it is left afterwards."""
        self._taken = True
        child, self._warm = self._warm, None
        if child is None or not child.alive:
            if child is not None:
                await self._close(child)
            child = await self._start()
        try:
            yield child
        finally:
            await self._close(child)

    async def close(self) -> None:
        """End the warm child; there will be none any more."""
        self._closed = True
        async with self._warming:
            if self._warm is not None:
                await self._close(self._warm)

    async def _close(self, child: Child) -> None:
        self._metrics.child_ended(child.end())
        await child.close()

    async def _start(self) -> Child:
        process = await anyio.open_process(self._command, start_new_session=True, env=self._environment)
        self._metrics.child_started()
        child = Child(process)
        self._group.start_soon(child.forward_stderr)
        return child


async def _lines(stream: ByteReceiveStream) -> AsyncIterator[bytes]:
    """The lines of `stream`, without their ends, each cut at MAX_LINE."""
    buffered = BufferedByteReceiveStream(stream)
    # Whether what comes is the rest of a line that was cut.
    rest = False
    while True:
        try:
            line, cut = await buffered.receive_until(b"\n", MAX_LINE), False
        except anyio.DelimiterNotFound:
            line, cut = await buffered.receive_exactly(MAX_LINE), True
        except anyio.IncompleteRead:
            if buffered.buffer and not rest:
                yield await buffered.receive_exactly(len(buffered.buffer))
            return
        except (anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError):
            return
        if not rest:
            yield line
        rest = cut
