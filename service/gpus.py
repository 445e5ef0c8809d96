"""What the GPUs of this machine do, as nvidia-smi tells it. The service never imports torch."""

import math
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

import anyio
import structlog
from anyio.abc import Process

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_QUERY = ("--query-gpu=index,uuid,memory.total,memory.used,utilization.gpu", "--format=csv,noheader,nounits")

#: Seconds that an answer is good for: without persistence mode nvidia-smi takes one or two.
_KEPT_SECONDS = 10.0

#: Seconds that it may take: it can hang for good where the driver does, and a scrape must not wait for that.
_PATIENCE_SECONDS = 5.0

#: More than it says of any machine.
_MAX_BYTES = 1 << 16


@dataclass(frozen=True)
class GpuUse:
    """One GPU. A value that nvidia-smi does not know, as with MIG, is None."""

    index: str
    uuid: str
    memory_mib: float | None
    used_mib: float | None
    busy_percent: float | None


def parse(text: str) -> tuple[GpuUse, ...]:
    """The GPUs in an answer to `_QUERY`. A line that is none (a warning, `No devices were found`) is passed over."""
    found = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 5 and re.fullmatch(r"\d{1,4}", fields[0]) and re.fullmatch(r"[\w-]{1,80}", fields[1]):
            found.append(GpuUse(fields[0], fields[1], *map(_number, fields[2:])))
    return tuple(found)


def _number(field: str) -> float | None:
    """A number, or None for `[N/A]`, `[Not Supported]`, `[GPU requires reset]` and whatever else it has for unknown."""
    try:
        value = float(field)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


class Gpus:
    """Asks nvidia-smi, where there is one, and not more often than it bears."""

    def __init__(self, environment: Mapping[str, str], program: str = "nvidia-smi") -> None:
        self._environment = environment
        self._program = shutil.which(program)
        self._known: tuple[GpuUse, ...] = ()
        self._asked = -math.inf
        self._asking = anyio.Lock()
        #: One that was killed and did not end: no second one is started beside it.
        self._stuck: Process | None = None

    async def read(self) -> tuple[GpuUse, ...]:
        """The GPUs as they were within the last ten seconds; none where they cannot be asked."""
        if self._program is None:
            return ()
        async with self._asking:
            if time.monotonic() - self._asked >= _KEPT_SECONDS:
                self._known = await self._ask(self._program)
                self._asked = time.monotonic()
        return self._known

    async def _ask(self, program: str) -> tuple[GpuUse, ...]:
        if self._stuck is not None and self._stuck.returncode is None:
            return ()
        try:
            process = await anyio.open_process(
                [program, *_QUERY], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self._environment
            )
        except OSError as error:
            log.warning("gpus not read", reason=str(error))
            return ()
        said = b""
        assert process.stdout is not None
        try:
            with anyio.move_on_after(_PATIENCE_SECONDS) as patience:
                async for part in process.stdout:
                    said = (said + part)[:_MAX_BYTES]
                await process.wait()
        finally:
            await self._end(process)
        if patience.cancelled_caught or process.returncode != 0:
            log.warning("gpus not read", reason=_why(process, said))
            return ()
        return parse(said.decode(errors="replace"))

    async def _end(self, process: Process) -> None:
        """Leave nothing of it. Not for longer than a moment: the kernel does not end what waits for a broken driver."""
        with anyio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            with anyio.move_on_after(1):
                # To its end, or asyncio never closes the pipe.
                if process.stdout is not None:
                    async for _ in process.stdout:
                        pass
                await process.wait()
            self._stuck = process if process.returncode is None else None


def _why(process: Process, said: bytes) -> str:
    if process.returncode is None or process.returncode < 0:
        return f"nvidia-smi gave no answer within {_PATIENCE_SECONDS:g} s"
    return f"nvidia-smi ended with exit code {process.returncode}: {said[:300].decode(errors='replace').strip()}"
