"""What `nvidia-smi` says of the driver and the GPUs, and what to do where it fails. Nothing here needs a GPU."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SECONDS = 30

#: What nvidia-smi says where it fails, and what to do about it; the first that matches.
_FAILURES = (
    (
        "couldn't communicate with the NVIDIA driver",
        "load the driver (`modprobe nvidia`), or install it again for the running kernel; a container needs the GPU "
        "given to it (`--gpus all`; in Kubernetes the limit nvidia.com/gpu)",
    ),
    (
        "Driver/library version mismatch",
        "the driver was upgraded while its old kernel module is loaded: reboot the machine, or reload the module",
    ),
    (
        "Failed to initialize NVML: Unknown Error",
        "the container has lost its GPU, as after `systemctl daemon-reload` on the host: start the container again",
    ),
    ("No devices were found", "the driver sees no GPU: look for NVRM in `dmesg`; then reboot, or exchange the card"),
    ("GPU is lost", "the GPU has fallen off the bus: reboot the machine; look for Xid 79 in `dmesg`"),
    ("Insufficient Permissions", "let this user read and write /dev/nvidia* (group `video`, or the container's user)"),
)
_OTHERWISE = "look after the driver: `nvidia-smi` must list the GPUs on this machine"


@dataclass(frozen=True)
class Driver:
    """The driver: its GPUs by name, and the newest CUDA that it supports; or why it gives no answer."""

    gpus: tuple[str, ...] = ()
    version: str = ""
    cuda: str = ""
    problem: str = ""
    fix: str = ""


def has_gpu() -> bool:
    """Whether this machine, or container, shows any trace of an NVIDIA GPU."""
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidiactl").exists()


def ask_driver(environment: Mapping[str, str]) -> Driver | None:
    """What nvidia-smi says; None where there is no such program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        listed, table = (
            subprocess.run(
                [program, *arguments],
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_SECONDS,
                check=False,
            )
            for arguments in (["-L"], [])
        )
    except subprocess.TimeoutExpired:
        fix = "a GPU hangs: look for Xid in `dmesg`; reboot the machine"
        return Driver(problem=f"nvidia-smi gave no answer in {_SECONDS} s", fix=fix)
    except OSError as error:
        return Driver(problem=f"nvidia-smi cannot be started: {error.strerror}", fix=_OTHERWISE)
    gpus = tuple(line.split(" (UUID")[0].strip() for line in listed.stdout.splitlines() if line.startswith("GPU "))
    said = (listed.stderr + listed.stdout).strip()
    if listed.returncode != 0 or not gpus:
        first = said.splitlines()[0].strip() if said else f"exit code {listed.returncode}"
        fix = next((fix for words, fix in _FAILURES if words in said), _OTHERWISE)
        return Driver(problem=f"nvidia-smi: {first[:300]}", fix=fix)
    return Driver(gpus, _number_after("Driver Version", table.stdout), _number_after("CUDA Version", table.stdout))


def _number_after(words: str, text: str) -> str:
    found = re.search(rf"{words}:\s*([\d.]+)", text)
    return found[1] if found else ""
