"""Child processes as the worker keeps them: one warm at most, none left over."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.lowlevel

from service.metrics import Metrics
from service.runner import Children
from tests.chaos.processes import children_of

#: The last argument tells them from other children of ours.
WAITS = (sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.readline()", "waits")


def waiting() -> int:
    """How many such processes there are."""
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children_of(os.getpid())]
    return sum(command.endswith(b"waits\0") for command in commands)


def open_pipes() -> set[str]:
    """Those of this process; its sockets come and go with MongoDB's client."""
    links = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the folder's own
            links.add(str(path.readlink()))
    return {link for link in links if link.startswith("pipe:")}


async def test_attempts_that_begin_at_once_leave_one_warm_child() -> None:
    """Each of them warms up the next one; only one is, and after the close there is none."""
    async with anyio.create_task_group() as group:
        children = Children(WAITS, dict(os.environ), group, metrics=Metrics())
        async with anyio.create_task_group() as attempts:
            for _ in range(4):
                attempts.start_soon(children.warm_up)
        assert waiting() == 1
        await children.close()
        assert waiting() == 0


async def test_a_child_that_is_being_warmed_up_at_the_close_is_not_left_over() -> None:
    """Nor one that is asked for afterwards."""
    async with anyio.create_task_group() as group:
        children = Children(WAITS, dict(os.environ), group, metrics=Metrics())
        children.warm_up_soon()
        await anyio.lowlevel.checkpoint()
        await children.close()
        children.warm_up_soon()
    assert waiting() == 0


async def test_a_warm_child_that_has_died_is_replaced() -> None:
    """Nobody gets a dead child."""
    async with anyio.create_task_group() as group:
        children = Children(WAITS, dict(os.environ), group, metrics=Metrics())
        await children.warm_up()
        assert children._warm is not None
        first = children._warm
        first.kill()
        await first.wait()
        await children.warm_up()
        assert children._warm is not first
        assert children._warm.alive
        await children.close()


#: More than asyncio reads ahead on either of its outputs, and then nothing.
TALKS = (sys.executable, "-I", "-S", "-c", "import sys; sys.stdout.write('x' * 400_000); sys.stdin.read()", "waits")


async def test_what_a_child_said_and_nobody_read_holds_no_pipe_open() -> None:
    """A worker takes thousands of children: each open pipe would be a leak, and a complaint when it ends."""
    async with anyio.create_task_group() as group:
        children = Children(TALKS, dict(os.environ), group, metrics=Metrics())
        before = open_pipes()
        async with children.take():
            # Until more has come than asyncio reads ahead.
            await anyio.sleep(0.5)
            assert open_pipes() != before
        await anyio.lowlevel.checkpoint()
        assert open_pipes() == before
