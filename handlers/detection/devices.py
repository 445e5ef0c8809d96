"""The one place that chooses and sets up a device, and the memory beside it."""

import ctypes
import os
import sys
from pathlib import Path

import torch

from handlers.detection.errors import DeviceError, OutOfMemory

#: Bytes of decoded images that a training keeps in memory, over all its ranks: at most, and as a share of all memory.
_STORE_BYTES, _STORE_SHARE = 1 << 30, 1 / 16
#: Threads that read images for one rank, at most: beyond it they wait for each other more than for the images.
_MAX_READERS = 8
#: Bytes that a training takes on the CPU: of itself, and for each pixel of the images that it takes at once. Measured
#: with MobileNet (ten images of 480 pixels: 7 GB; of 544: 9 GB); the larger networks take more.
_OWN_BYTES, _BYTES_PER_PIXEL = 1 << 30, 2700
#: Where the kernel tells a container's limits.
_CGROUP = Path("/sys/fs/cgroup")
#: From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def open_device(name: str) -> torch.device:
    """The device `name` (`cpu`, `cuda:1`), ready for this process. Raises DeviceError where it cannot be used."""
    device = torch.device(name)
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
        except (RuntimeError, AssertionError) as error:  # no driver, no such device, torch without CUDA, …
            raise DeviceError(f"{name} cannot be used: {error}") from error
        # Every batch has one size, so trying out the fastest convolution once pays.
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Have malloc keep what is freed, for the next step or image to use.

    Tensors and images of this size are otherwise mapped and unmapped each time, and the kernel clears each page anew
    (`benchmarks/environment.py` shows what that costs). Only glibc can be told (mallopt(3)).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where it is fast: on CUDA. It needs no loss scaling. On the CPU plain float32."""
    enabled = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def reader_threads(ranks: int) -> int:
    """Threads with which one of `ranks` processes reads images; decoding leaves Python's lock."""
    return max(1, min(_MAX_READERS, len(os.sched_getaffinity(0)) // ranks))


def image_store_bytes(ranks: int) -> int:
    """Bytes of decoded images that each of `ranks` processes may keep in memory, so as not to read them again."""
    return min(_STORE_BYTES, int(_memory_bytes() * _STORE_SHARE)) // ranks


def images_at_once(device: torch.device, input_size: int, ranks: int) -> int:
    """How many images each of `ranks` processes can take in one forward pass, at least 1, for all that is known.

    On the CPU by the memory of the machine, or of the container if that is less: there, who takes too much is killed,
    and no error tells why. A GPU is asked by trying (see `is_out_of_memory`).
    """
    if device.type == "cuda":
        return sys.maxsize
    room = _memory_bytes() // ranks - _OWN_BYTES - image_store_bytes(ranks)
    return max(1, room // (_BYTES_PER_PIXEL * input_size * input_size))


def _memory_bytes() -> int:
    """Of the machine, or of the container if that may have less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups 2 and 1
        try:
            limits.append(int((_CGROUP / name).read_text()))
        except (OSError, ValueError):
            continue  # no such file, or "max"
    return min(limits)


def check_memory(images: int, input_size: int) -> None:
    """Raise OutOfMemory for a batch that no machine like this one can hold even as bytes, rather than try it."""
    total = _memory_bytes()
    # A float of each channel, which is the least of what training keeps.
    if images * input_size * input_size * 3 * 4 > total:
        raise OutOfMemory(f"a batch of {images} images of {input_size} pixels does not fit into {total >> 30} GiB")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on a GPU or off it. Not all of them have a class of their own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    told = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in told)


def is_device_fault(error: BaseException) -> bool:
    """Whether `error` says that the device failed: it fell off the bus, its memory is damaged, a driver was changed, …

    An assertion in a kernel is none: that is what wrong indices from our side end in.
    """
    accelerator = isinstance(error, torch.AcceleratorError) and "device-side assert" not in str(error)
    return accelerator or isinstance(error, DeviceError)
