"""A small model with the interface of an exported one, whose detections can be told beforehand."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 32
NAMES = ("left", "right")
#: What the model below finds in every image, as fractions; the first with the image's brightness as score, the second
#: with half of it. The third row fills up.
FOUND = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.25, 1.0, 0.75), (0.0, 0.0, 0.0, 0.0))


def write_model(path: Path, class_ids: Sequence[int] = (1, 2, 0), output: str = "boxes") -> Path:
    """A model with the interface of an exported one, whose detections can be told beforehand."""
    constants = {
        "found": np.array([FOUND], np.float32),
        "ids": np.array([class_ids], np.int64),
        "weights": np.array([[1, 0.5, 0]], np.float32) / 255,
        "axes": np.array([1, 2, 3], np.int64),
        "first": np.array([0], np.int64),
        "rest4": np.array([3, 4], np.int64),
        "rest": np.array([3], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["brightness"], keepdims=0),
        helper.make_node("Unsqueeze", ["brightness", "one"], ["column"]),
        helper.make_node("Mul", ["column", "weights"], ["scores"]),
        helper.make_node("Shape", ["images"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["count"]),
        helper.make_node("Concat", ["count", "rest4"], ["box_shape"], axis=0),
        helper.make_node("Concat", ["count", "rest"], ["id_shape"], axis=0),
        helper.make_node("Expand", ["found", "box_shape"], [output]),
        helper.make_node("Expand", ["ids", "id_shape"], ["class_ids"]),
    ]
    constants["one"] = np.array([1], np.int64)
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", SIDE, SIDE, 3])],
        [
            helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", 3, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 3]),
            helper.make_tensor_value_info("class_ids", TensorProto.INT64, ["N", 3]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path
