"""Machines with GPUs, well and ill, made of fake programs: what `nvidia-smi` and the child's Python say there.

None of these machines was at hand. Some of torch's texts were found in its libraries (2.14) and some of nvidia-smi's in
the reports of people who met them; the rest is from memory.
"""

import json
from pathlib import Path
from typing import Any

LIST = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-8a56a4bc-e184-a047-2620-be19fdf913d5)\n"

_TABLE = """\
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI {driver:<18}     Driver Version: {driver:<14} CUDA Version: {cuda:<9}|
|-----------------------------------------+------------------------+----------------------+
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
|   0  NVIDIA H100 80GB HBM3          On  |   00000000:19:00.0 Off |                    0 |
+-----------------------------------------------------------------------------------------+
"""

#: What nvidia-smi says, to stdout, with its exit code, where it fails.
FAILING = {
    "no driver": (
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
        "NVIDIA driver is installed and running.\n",
        9,
    ),
    "mismatch": (
        "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550.127\n",
        18,
    ),
    "lost by the container": ("Failed to initialize NVML: Unknown Error\n", 255),
    "no devices": ("No devices were found\n", 6),
    "off the bus": (
        "Unable to determine the device handle for GPU 0000:19:00.0: GPU is lost.  Reboot the system to recover "
        "this GPU\n",
        15,
    ),
    "no rights": ("Failed to initialize NVML: Insufficient Permissions\n", 4),
    "says nothing": ("", 1),
    "garbage": ("\x00\xff\x1b[31m", 0),
}

#: What torch raises in `torch.cuda.init()`.
TORCH = {
    "none": (
        "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a "
        "driver from http://www.nvidia.com/Download/index.aspx"
    ),
    "old": (
        "RuntimeError: The NVIDIA driver on your system is too old (found version 12040). Please update your GPU "
        "driver by downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx "
        "Alternatively, go to: https://pytorch.org to install a PyTorch version that has been compiled with your "
        "version of the CUDA driver."
    ),
    "fabric": (
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
        "NumCudaDevices() that might have already set an error? Error 802: system not yet initialized"
    ),
    "compat": (
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
        "NumCudaDevices() that might have already set an error? Error 804: forward compatibility was attempted on non "
        "supported HW"
    ),
    "unknown": (
        "RuntimeError: CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env "
        "variable CUDA_VISIBLE_DEVICES after program start. Setting the available devices to be zero."
    ),
    "hidden": "RuntimeError: No CUDA GPUs are available",
    "kernel": "AcceleratorError: CUDA error: no kernel image is available for execution on the device",
}

#: A machine on which all is well.
GOOD: dict[str, Any] = {
    "python": "3.11.7",
    "torch": "2.14.1+cu130",
    "torch_cuda": "13.0",
    "gpus": 1,
    "onnxruntime": "1.31.1",
    "providers": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "weights": "mobilenet_v2-b0353104.pth (torch cache)",
}


def table(driver: str, cuda: str) -> str:
    """What plain `nvidia-smi` prints."""
    return _TABLE.format(driver=driver, cuda=cuda)


def nvidia_smi(folder: Path, listed: str, printed: str = "", code: int = 0) -> str:
    """Put a `nvidia-smi` into `folder` that says this with `-L`, and without; returns a PATH that finds it first."""
    folder.mkdir(exist_ok=True)
    (folder / "listed").write_bytes(listed.encode("latin-1"))
    (folder / "printed").write_bytes(printed.encode("latin-1"))
    program = folder / "nvidia-smi"
    program.write_text(
        f'#!/bin/sh\nif [ "$1" = -L ]; then cat {folder}/listed; else cat {folder}/printed; fi\nexit {code}\n'
    )
    program.chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def python(folder: Path, facts: dict[str, Any] | str) -> str:
    """Put a Python into `folder` whose probe finds these facts, or ends with these words; returns its path."""
    folder.mkdir(exist_ok=True)
    program = folder / "python"
    if isinstance(facts, str):
        program.write_text(f"#!/bin/sh\necho '{facts}' >&2\nexit 1\n")
    else:
        (folder / "facts").write_text(json.dumps(facts))
        program.write_text(f"#!/bin/sh\ncat {folder}/facts\n")
    program.chmod(0o755)
    return str(program)
