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
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from handlers.detection.batch_norm import fold_batch_norm
from handlers.detection.fingerprints import Fingerprints, encoded
from handlers.detection.networks.base import Detector, Network, only_candidates

#: Detections an image at most, as COCO evaluates.
MAX_DETECTIONS = 100
#: Of two boxes of one class that overlap by more, the lesser is dropped (SSD: 0.45, RetinaNet: 0.5). Things that lie
#: close together, cells or parts, overlap by more than people in streets.
NMS_IOU = 0.5
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


def export(network: Network, class_names: tuple[str, ...], path: Path) -> None:
    """Write `network` to the ONNX file `path`."""
    detector = Detector(copy.deepcopy(network).cpu()).eval()
    fold_batch_norm(detector)
    size = network.input_size
    # Traced with one image, and the number freed afterwards: torch takes several times as long over a free one.
    program = torch.onnx.export(
        detector,
        (torch.zeros(1, size, size, 3, dtype=torch.uint8),),
        dynamo=True,
        input_names=["images"],
        output_names=["all_boxes", "all_scores"],
        opset_version=_OPSET,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    _free_batch(model.graph)
    _append_suppression(model.graph, network.predictions)
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


def _free_batch(graph: onnx.GraphProto) -> None:
    """Let the graph, traced with one image, take any number of them.

    That one image stands in the sizes that it reshapes and resizes to: both keep their first axis, the images'.
    `check_export` runs the file on several images, and would tell if it stood anywhere else.
    """
    sizes = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        place = {"Reshape": 1, "Resize": 3}.get(node.op_type)
        size = sizes.get(node.input[place]) if place is not None and place < len(node.input) else None
        if size is None or size[0] != 1:
            continue
        # Other nodes may share the constant.
        node.input[place] = f"{node.name}/any_batch"
        if node.op_type == "Reshape":
            # 0 is "as it comes", unless `allowzero` says that it is a zero.
            kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]
            del node.attribute[:]
            node.attribute.extend(kept)
            freed = np.array([0, *size[1:]])
        else:
            node.attribute.append(helper.make_attribute("axes", range(1, len(size))))
            freed = size[1:]
        graph.initializer.append(numpy_helper.from_array(freed, node.input[place]))
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    del graph.value_info[:]  # sizes of intermediates, of one image


def _append_suppression(graph: onnx.GraphProto, predictions: int) -> None:
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
    count = constant("nms_boxes", predictions)
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


def check_export(network: Network, path: Path, images: NDArray[np.uint8]) -> None:
    """Hold the file `path` against torch on `images` (uint8 [N, S, S, 3]), both in float32 on the CPU.

    Raises ExportMismatch if more than one detection in a hundred is only on one side. The few are allowed because
    suppression is a threshold: two boxes may overlap by 0.5 and a rounding error.
    """
    network = copy.deepcopy(network).cpu().eval()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = ["boxes", "scores", "class_ids"]
    theirs: Mapping[str, NDArray[np.float32]] = dict(zip(names, session.run(names, {"images": images}), strict=True))
    with torch.inference_mode():
        outputs = network(torch.from_numpy(images))
        all_boxes, all_scores = network.detections(outputs)
        candidates = only_candidates(all_scores)
    all_boxes = all_boxes.clamp(0, 1)
    compared = different = 0
    for index in range(len(images)):
        real = theirs["class_ids"][index] > 0
        found = _Found(*(torch.from_numpy(theirs[name][index][real]) for name in ("boxes", "class_ids", "scores")))
        expected = _Found(*best_boxes(all_boxes[index], candidates[index]))
        compared += max(len(expected.scores), len(found.scores))
        made_up = int((~_is_prediction(found, all_boxes[index], all_scores[index])).sum())
        missing = int((~_is_accounted_for(expected, found, candidates[index])).sum())
        different += max(made_up, missing)
    if different > compared / 100:
        raise ExportMismatch(f"{different} of {compared} detections in {len(images)} images differ from torch's")


class _Found(NamedTuple):
    """The detections in an image."""

    boxes: Tensor
    class_ids: Tensor
    scores: Tensor


#: Two boxes are one, and two scores, if they differ by less: a corner by this part of the image's side.
_SAME_CORNER, _SAME_SCORE = 0.001, 0.001


def _is_same(ours: Tensor, theirs: Tensor) -> Tensor:
    """bool [len(ours), len(theirs)]. By the corners: a box without an area overlaps nothing, itself included."""
    return torch.cdist(ours, theirs, p=torch.inf) < _SAME_CORNER


def _is_prediction(found: _Found, boxes: Tensor, scores: Tensor) -> Tensor:
    """bool [D]: whether torch predicts the same box with the same score for the same class (`boxes` [A, 4], `scores`
    [classes, A]: all predictions).
    """
    near = (scores[found.class_ids - 1] - found.scores[:, None]).abs() < _SAME_SCORE
    return (_is_same(found.boxes, boxes) & near).any(1)


def _is_accounted_for(expected: _Found, found: _Found, candidates: Tensor) -> Tensor:
    """bool [D]: whether each of `expected` is in `found`, or rightly not.

    Where scores are equal, as those of a network that has learnt little are, rounding decides which of two is better.
    So a detection may be missing for another of its class that suppresses it and is as good; for a hundred as good; or
    because as good ones were the last candidates (`candidates` [classes, A]: 0 for what is none).
    """
    better = found.scores[None] > expected.scores[:, None] - _SAME_SCORE
    overlap: Tensor = box_iou(expected.boxes, found.boxes)
    same_class = expected.class_ids[:, None] == found.class_ids[None]
    same = _is_same(expected.boxes, found.boxes)
    suppressed = (better & same_class & (same | (overlap > NMS_IOU - 0.01))).any(1)
    outdone = better.sum(1) >= MAX_DETECTIONS
    last = torch.where(candidates > 0, candidates, torch.inf).amin(1)[expected.class_ids - 1]
    return suppressed | outdone | (expected.scores < last + _SAME_SCORE)
