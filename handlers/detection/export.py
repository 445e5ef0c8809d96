"""The trained network as one ONNX file: decoding and non-maximum suppression are part of the graph.

Input `images`: uint8 [N, S, S, 3], RGB, stretched to the square (`data.fit`); N is free.
Outputs: `boxes` float32 [N, 100, 4], corners as fractions of the image; `scores` float32 [N, 100], descending;
`class_ids` int64 [N, 100], from 1, where 0 marks a row that is no detection.
The metadata have `class_names` (JSON) and `input_size`; and, once the model is measured, `thresholds` (JSON, in the
order of `class_names`, null is unknown) and `fingerprints` of the training images (`handlers.detection.fingerprints`).
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from handlers.detection.fingerprints import Fingerprints, encoded
from handlers.detection.models import Detector, MobileNetSSD

#: Detections an image at most, as COCO evaluates.
MAX_DETECTIONS = 100
#: Of two boxes of one class that overlap by more, the lesser is dropped (SSD: 0.45).
NMS_IOU = 0.45
#: Scores below are not looked at (SSD: 0.01).
MIN_SCORE = 0.01

_OPSET = 18


class ExportMismatch(Exception):
    """The exported file does not find what the network finds."""


def best_boxes(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the graph's last part does, for one image: boxes [A, 4] and scores [classes, A] of a `Detector`.

    Returns (boxes [D, 4], class ids [D] from 1, scores [D], descending) with D at most `MAX_DETECTIONS`.
    """
    classes, rows = torch.nonzero(scores > MIN_SCORE, as_tuple=True)
    found = scores[classes, rows]
    kept = batched_nms(boxes[rows], found, classes, NMS_IOU)[:MAX_DETECTIONS]
    return boxes[rows[kept]], classes[kept] + 1, found[kept]


def export(network: MobileNetSSD, class_names: tuple[str, ...], path: Path) -> None:
    """Write `network` to the ONNX file `path`."""
    detector = Detector(copy.deepcopy(network).cpu()).eval()
    size = network.input_size
    # Two images, because a batch of one would be taken for a constant.
    images = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    program = torch.onnx.export(
        detector,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=["all_boxes", "all_scores"],
        dynamic_shapes={"images": {0: torch.export.Dim("N")}},
        opset_version=_OPSET,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    _append_suppression(model.graph, len(network.default_boxes))
    facts = {"class_names": json.dumps(list(class_names), ensure_ascii=False), "input_size": str(size)}
    helper.set_model_props(model, facts)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def add_facts(path: Path, thresholds: Sequence[float | None], fingerprints: Fingerprints) -> None:
    """Write what is known of a model only once it is measured into the metadata of its file `path`."""
    model = onnx.load(path)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    facts |= {"thresholds": json.dumps(list(thresholds)), "fingerprints": encoded(fingerprints)}
    helper.set_model_props(model, facts)
    path.write_bytes(model.SerializeToString())


def _append_suppression(graph: onnx.GraphProto, default_box_count: int) -> None:
    """all_boxes [N, A, 4], all_scores [N, classes, A] -> boxes, scores, class_ids.

    NonMaxSuppression gives a list of (image, class, box) over the whole batch. Spread over an otherwise empty score
    table, it becomes rectangular again, and the best of each image are one TopK.
    """

    def constant(name: str, value: object, dtype: type = np.int64) -> str:
        graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        graph.node.append(helper.make_node(op, inputs, [output], name=f"nms/{output}", **attributes))
        return output

    limits = [
        constant("nms_max", [MAX_DETECTIONS]),
        constant("nms_iou", [NMS_IOU], np.float32),
        constant("nms_score", [MIN_SCORE], np.float32),
    ]
    selected = node("NonMaxSuppression", ["all_boxes", "all_scores", *limits], "selected")
    kept_scores = node("GatherND", ["all_scores", selected], "kept_scores")
    shape = node("Shape", ["all_scores"], "score_shape")
    empty = node("ConstantOfShape", [shape], "no_scores", value=helper.make_tensor("", TensorProto.FLOAT, [1], [0.0]))
    table = node("ScatterND", [empty, selected, kept_scores], "score_table")
    flat = node("Reshape", [table, constant("nms_flat", [0, -1])], "flat_scores")
    graph.node.append(
        helper.make_node("TopK", [flat, constant("nms_k", [MAX_DETECTIONS])], ["scores", "best"], name="nms/top")
    )
    count = constant("nms_boxes", default_box_count)
    box_row = node("Unsqueeze", [node("Mod", ["best", count], "box"), constant("nms_last", [-1])], "box_row")
    best_boxes = node("GatherND", ["all_boxes", box_row], "best_boxes", batch_dims=1)
    classes = node("Add", [node("Div", ["best", count], "class_row"), constant("nms_one", 1)], "class_from_1")
    found = node("Greater", ["scores", constant("nms_zero", 0.0, np.float32)], "found")
    node("Where", [found, classes, constant("nms_none", 0)], "class_ids")
    found_box = node("Unsqueeze", [found, "nms_last"], "found_box")
    node("Where", [found_box, best_boxes, constant("nms_no_box", 0.0, np.float32)], "boxes")
    del graph.output[:]
    graph.output.extend(
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["N", MAX_DETECTIONS, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", MAX_DETECTIONS]),
            helper.make_tensor_value_info("class_ids", TensorProto.INT64, ["N", MAX_DETECTIONS]),
        ]
    )


def check_export(network: MobileNetSSD, path: Path, images: NDArray[np.uint8]) -> None:
    """Hold the file `path` against torch on `images` (uint8 [N, S, S, 3]), both in float32 on the CPU.

    Raises ExportMismatch if more than one detection in a hundred has no equal (same class, IoU above 0.99, score
    within 0.001). The few are allowed because suppression is a threshold: two boxes may overlap by 0.45 and a rounding
    error.
    """
    detector = Detector(copy.deepcopy(network).cpu()).eval()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = ["boxes", "scores", "class_ids"]
    theirs: Mapping[str, NDArray[np.float32]] = dict(zip(names, session.run(names, {"images": images}), strict=True))
    with torch.inference_mode():
        all_boxes, all_scores = detector(torch.from_numpy(images))
    compared = different = 0
    for index in range(len(images)):
        boxes, class_ids, scores = best_boxes(all_boxes[index], all_scores[index])
        real = theirs["class_ids"][index] > 0
        other_boxes, other_scores, other_ids = (torch.from_numpy(theirs[name][index][real]) for name in names)
        compared += max(len(class_ids), len(other_ids))
        equal = (
            (box_iou(boxes, other_boxes) > 0.99)
            & (class_ids[:, None] == other_ids[None])
            & ((scores[:, None] - other_scores[None]).abs() < 0.001)
        )
        different += max(int((~equal.any(1)).sum()), int((~equal.any(0)).sum()))
    if different > compared / 100:
        raise ExportMismatch(f"{different} of {compared} detections in {len(images)} images differ from torch's")
