"""Settings, from the environment: `DLTASK_…`. Read once, in the command line, and handed down."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from handlers.settings import DatabaseSettings
from handlers.store.tasks import LEASE_SECONDS


class Settings(DatabaseSettings):
    """Everything an operator can set. Field `cache_dir` is `DLTASK_CACHE_DIR`, and so on."""

    #: Images by content and the folders of running attempts.
    cache_dir: Path = Path("~/.cache/dltask").expanduser()
    #: Bytes of images kept for the next task.
    cache_bytes: int = Field(20 * 2**30, ge=0)
    #: `json` (one object a line), `text`, or `auto`: text on a terminal, else json.
    log_format: Literal["auto", "json", "text"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    #: Tasks of `device_type: CPU` that this worker runs at once; a task of `device_num: 2` counts as two.
    cpu_devices: int = Field(1, ge=0, le=1024)
    #: GPUs that this worker uses; absent: all that torch sees.
    gpu_devices: int | None = Field(None, ge=0, le=1024)
    #: Tasks that need fewer devices are left to other workers: eight GPUs are too dear for a task that needs one.
    min_device_num: int = Field(1, ge=1, le=1024)
    #: `cpu`: a worker without a GPU takes GPU tasks too and runs them on its CPU devices; the result says so.
    gpu_fallback: Literal["none", "cpu"] = "none"
    #: Seconds from SIGTERM until what still runs is killed; running trainings save a snapshot in that time.
    grace_seconds: float = Field(30, ge=0)
    #: Seconds without progress of a running child until it is taken for hung.
    child_silence_seconds: float = Field(900, gt=0)
    #: Seconds after which a worker that no longer renews its lease loses its task. The same in the whole fleet.
    lease_seconds: float = Field(LEASE_SECONDS, ge=2)
    #: Seconds between two sweeps over the task collection, which repair whatever a change event missed.
    sweep_seconds: float = Field(5, gt=0)
    #: Port of the page, the metrics and the probes; 0: any free one; `off`: none of them.
    http_port: Annotated[int, Field(ge=0, le=65535)] | Literal["off"] = 8080
    #: Address that it listens on. It asks nobody for a password: see docs/security.md before it leaves the machine.
    http_host: str = "127.0.0.1"
    #: The command that a child process is started with.
    child_command: Annotated[tuple[str, ...], NoDecode] = (sys.executable, "-m", "handlers.detection")

    @field_validator("child_command", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(shlex.split(value)) if isinstance(value, str) else value

    @field_validator("child_command")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("expected a command")
        return value
