"""A registered ONNX model, run by onnxruntime."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from handlers.detection.boxes import Detections, Image
from handlers.detection.data import fit
from handlers.detection.errors import DataError, DeviceError, OutOfMemory

#: What a model must be like: name, type and rank of each.
_INPUT = {"images": ("tensor(uint8)", 4)}
_OUTPUTS = {"boxes": ("tensor(float)", 3), "scores": ("tensor(float)", 2), "class_ids": ("tensor(int64)", 2)}
#: What onnxruntime raises for a file that is no model; its errors have no base of their own.
_FILE_ERRORS = (
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
)
#: What it raises for a file too, and for a device.
_OTHER_ERRORS = (ort_errors.EPFail, ort_errors.Fail, ort_errors.RuntimeException, RuntimeError, ValueError)
#: As a batch has images by default.
_MAX_PARTS = 10
_ERROR_SEVERITY, _FATAL_SEVERITY = 3, 4


class OnnxDetector:
    """A model as `handlers.detection.export` writes it, on one device.

    The graph takes `images`, uint8 [N, S, S, 3] RGB, and gives `boxes` float32 [N, D, 4] (corners, fractions of the
    image), `scores` [N, D] descending, and `class_ids` int64 [N, D] from 1, where 0 fills up.
    """

    def __init__(self, onnx: Path, class_names: Sequence[str], input_size: int, device: str) -> None:
        """`device` is a torch name, `cpu` or `cuda:0`.

        Raises DataError for a file that is no such model, and DeviceError where `device` is not what would run.
        """
        self.class_names = tuple(class_names)
        self.input_size = input_size
        #: Into how many parts a batch is divided, and the threads that run them. On a CPU a thread for each core that
        #: runs an image of its own is faster than all at one operator after the other.
        self._parts = 1 if device != "cpu" else min(len(os.sched_getaffinity(0)), _MAX_PARTS)
        self._threads = ThreadPoolExecutor(self._parts)
        self._session = _session(onnx, device, self._parts)
        #: What really runs.
        self.device = device
        self._check(onnx)
        #: What the file says of itself: `class_names`, …
        self.facts: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)

    def _check(self, onnx: Path) -> None:
        found_inputs = {value.name: (value.type, len(value.shape)) for value in self._session.get_inputs()}
        found_outputs = {value.name: (value.type, len(value.shape)) for value in self._session.get_outputs()}
        if found_inputs != _INPUT or found_outputs != _OUTPUTS:
            raise DataError(
                f"{onnx.name} takes {found_inputs} and gives {found_outputs}; expected {_INPUT} and {_OUTPUTS}",
                "model_name",
            )
        side = self._session.get_inputs()[0].shape[1]
        if isinstance(side, int) and side != self.input_size:
            raise DataError(
                f"{onnx.name} takes images of {side} pixels; registered are {self.input_size}", "model_name"
            )

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        """What is in `images` (uint8 [height, width, 3] RGB, of any size), in pixels of each. Raises OutOfMemory."""
        if not images:
            return []
        stretched = np.stack([fit(image, self.input_size) for image in images])
        return self.detect_stretched(stretched, [(image.shape[1], image.shape[0]) for image in images])

    def detect_stretched(self, images: NDArray[np.uint8], sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """The same for `images` [N, S, S, 3] that are at input size already; `sizes` are their own (width, height)."""
        bounds = [part * len(images) // self._parts for part in range(self._parts + 1)]
        parts = [(begin, end) for begin, end in pairwise(bounds) if begin < end]
        try:
            answers = self._threads.map(lambda part: self._detect(images[slice(*part)], sizes[slice(*part)]), parts)
            return [found for answer in answers for found in answer]
        except (ort_errors.Fail, ort_errors.RuntimeException) as error:
            if "Failed to allocate memory" in str(error) or "out of memory" in str(error):
                raise OutOfMemory(f"{self.device} has too little memory for {len(images)} images at once") from None
            raise

    def _detect(self, images: NDArray[np.uint8], sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        boxes, scores, class_ids = self._session.run(list(_OUTPUTS), {"images": images})
        if class_ids.max(initial=0) > len(self.class_names):
            raise DataError(
                f"the model found class {class_ids.max()}; registered are {len(self.class_names)} classes", "model_name"
            )
        found = []
        for row, (width, height) in enumerate(sizes):
            # Everything that the graph gives is kept, so that a test measures what the training measured. The graph's
            # own floor (a score of 0.01, as in SSD) keeps out what would only fill the disk.
            kept = class_ids[row] > 0
            corners = boxes[row][kept] * np.array([width, height, width, height], np.float32)
            found.append(Detections(corners, class_ids[row][kept], scores[row][kept]))
        return found


def _session(onnx: Path, device: str, callers: int) -> Any:
    # Its warnings speak to whoever builds onnxruntime. On the way to CUDA even its errors are repeated below.
    onnxruntime.set_default_logger_severity(_FATAL_SEVERITY)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERROR_SEVERITY
    # Each of the `callers` works itself and asks for help; with them and the helpers there is a thread for each core.
    options.intra_op_num_threads = len(os.sched_getaffinity(0)) - callers + 1
    # By default a thread that waits for its peers spins, and takes the core from those that read images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = ["CPUExecutionProvider"]
    kind, _, index = device.partition(":")
    if kind == "cuda":
        # torch's wheels bring CUDA and cuDNN; without this onnxruntime would look for the system's.
        onnxruntime.preload_dlls()
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(index)}))
    try:
        # Its fall-back would go on on the CPU, now or in the middle of a run.
        session = onnxruntime.InferenceSession(onnx, options, providers=providers, enable_fallback=False)
    except _FILE_ERRORS as error:
        raise DataError(f"{onnx.name} is not a model that can be loaded: {error}", "model_name") from None
    except _OTHER_ERRORS as error:
        if kind == "cuda":
            raise DeviceError(f"onnxruntime cannot use {device}: {error}") from None
        raise DataError(f"{onnx.name} is not a model that can be loaded: {error}", "model_name") from None
    if kind == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        # Where the provider's library does not load, there is no error at all.
        raise DeviceError(f"onnxruntime cannot use {device}; it has {', '.join(session.get_providers())}")
    return session
