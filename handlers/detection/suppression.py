"""Of all that a network predicts, the detections: suppression and voting, once for torch and once as part of an ONNX
graph.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from handlers.detection.boxes import Boxes

#: Detections an image at most, as COCO evaluates.
MAX_DETECTIONS = 100
#: Boxes of a class that may enter suppression (SSD: 400): some twenty answer for an object, and score alike.
CANDIDATES = 20 * MAX_DETECTIONS
#: Of two boxes of one class that overlap by more, the lesser is dropped (SSD: 0.45, RetinaNet: 0.5). Things that lie
#: close together, cells or parts, overlap by more than people in streets.
NMS_IOU = 0.5
#: Scores below are not looked at (SSD: 0.01).
MIN_SCORE = 0.01
#: What overlaps a detection by more than this has a say in where its box is.
VOTE_IOU = 0.5
#: So many predictions of an image, those with the best scores of whatever class, have a say at all.
VOTERS = 20 * MAX_DETECTIONS


def crowded_note(images: Iterable[Boxes]) -> str | None:
    """What to say of labelled `images` that have more objects than can be found; None where none has."""
    crowded = sum(int(boxes.counted.sum()) > MAX_DETECTIONS for boxes in images)
    if not crowded:
        return None
    return f"images with more than {MAX_DETECTIONS} objects: {crowded}; no more than that are found in one"


def best_boxes(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The detections of one image, from the boxes [A, 4] and scores [classes, A] of a `Detector`.

    Returns (boxes [D, 4], class ids [D] from 1, scores [D], descending) with D at most `MAX_DETECTIONS`.
    """
    kept, class_ids, best = suppress(boxes, scores)
    heard = voters(scores)
    return vote(kept, class_ids, boxes[heard], scores[:, heard]), class_ids, best


def suppress(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`best_boxes` before the vote: each box is as some prediction has it."""
    classes, rows = torch.nonzero(scores > MIN_SCORE, as_tuple=True)
    found = scores[classes, rows]
    order = found.argsort(descending=True, stable=True)

    def best(part: Tensor) -> Tensor:
        return part[batched_nms(boxes[rows[part]], found[part], classes[part], NMS_IOU)[:MAX_DETECTIONS]]

    # What scores less changes nothing about what is kept, so the first mostly tell; all would be quadratic, and a
    # network in its first iterations finds every class everywhere.
    kept = best(order[:CANDIDATES])
    if len(kept) < MAX_DETECTIONS and len(order) > CANDIDATES:
        kept = best(order)
    return boxes[rows[kept]], classes[kept] + 1, found[kept]


def voters(scores: Tensor) -> Tensor:
    """int64 [V]: which of the predictions of an image, with `scores` [classes, A], have a say in where boxes are."""
    return scores.amax(0).topk(min(VOTERS, scores.shape[-1]), sorted=False).indices


def vote(kept: Tensor, class_ids: Tensor, boxes: Tensor, scores: Tensor) -> Tensor:
    """The boxes `kept` [D, 4], of `class_ids` [D] (from 1), each moved to the mean of all `boxes` [V, 4] that overlap
    it, weighted by their `scores` [classes, V] for its class (Gidaris & Komodakis 2015, 3.3).

    The best score does not mark the best box: it says what an object is. Those around it were right about where it ends
    to about the same degree, and their errors even out.
    """
    weights = scores[class_ids - 1]
    weights = torch.where((box_iou(kept, boxes) > VOTE_IOU) & (weights > MIN_SCORE), weights, 0.0)
    total = weights.sum(dim=1, keepdim=True)
    # A mean of many ones can be a little more than one. A box without an area overlaps nothing, itself included.
    return torch.where(total > 0, (weights @ boxes / total).clamp(0, 1), kept)


class _Nodes:
    """A graph that nodes are appended to; what is returned is the name of an output."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph

    def constant(self, name: str, value: object, dtype: type = np.int64) -> str:
        self._graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def add(self, op: str, inputs: Sequence[str], output: str, *more: str, **attributes: Any) -> str:
        outputs = [output, *more]
        self._graph.node.append(helper.make_node(op, inputs, outputs, name=f"nms/{output}", **attributes))
        return output


def append_suppression(graph: onnx.GraphProto, predictions: int) -> None:
    """`best_boxes` as the last part of a graph: all_boxes [N, A, 4], all_scores [N, classes, A] -> boxes, scores,
    class_ids. `kept_boxes` [N, D, 4] are the boxes before the vote.

    NonMaxSuppression gives a list of (image, class, box) over the whole batch. Spread over an otherwise empty score
    table, it becomes rectangular again, and the best of each image are one TopK.
    """
    nodes = _Nodes(graph)
    add, constant = nodes.add, nodes.constant
    limits = [
        constant("nms_max", [MAX_DETECTIONS]),
        constant("nms_iou", [NMS_IOU], np.float32),
        constant("nms_score", [MIN_SCORE], np.float32),
    ]
    selected = add("NonMaxSuppression", ["all_boxes", "all_scores", *limits], "selected")
    kept_scores = add("GatherND", ["all_scores", selected], "kept_scores")
    shape = add("Shape", ["all_scores"], "score_shape")
    empty = add("ConstantOfShape", [shape], "no_scores", value=helper.make_tensor("", TensorProto.FLOAT, [1], [0.0]))
    table = add("ScatterND", [empty, selected, kept_scores], "score_table")
    flat = add("Reshape", [table, constant("nms_flat", [0, -1])], "flat_scores")
    add("TopK", [flat, constant("nms_k", [MAX_DETECTIONS])], "scores", "best")
    count = constant("nms_boxes", predictions)
    box_row = add("Unsqueeze", [add("Mod", ["best", count], "box"), constant("last_axis", [-1])], "box_row")
    class_row = add("Div", ["best", count], "class_row")
    add("GatherND", ["all_boxes", box_row], "kept_boxes", batch_dims=1)
    voted = _append_vote(nodes, predictions)
    found = add("Greater", ["scores", constant("no_score", 0.0, np.float32)], "found")
    classes = add("Add", [class_row, constant("nms_one", 1)], "class_from_1")
    add("Where", [found, classes, constant("nms_none", 0)], "class_ids")
    found_box = add("Unsqueeze", [found, "last_axis"], "found_box")
    add("Where", [found_box, voted, "no_score"], "boxes")
    del graph.output[:]
    graph.output.extend(
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["N", MAX_DETECTIONS, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", MAX_DETECTIONS]),
            helper.make_tensor_value_info("class_ids", TensorProto.INT64, ["N", MAX_DETECTIONS]),
        ]
    )


def _append_vote(nodes: _Nodes, predictions: int) -> str:
    """`vote` for `kept_boxes` [N, D, 4] of the classes `class_row` [N, D]; V voters of each image."""
    add, constant = nodes.add, nodes.constant
    best = add("ReduceMax", ["all_scores", constant("class_axis", [1])], "score_of_any", keepdims=0)
    add("TopK", [best, constant("vote_count", [min(VOTERS, predictions)])], "voter_scores", "voters", sorted=0)
    voter_row = add("Unsqueeze", ["voters", "last_axis"], "voter_row")
    boxes = add("GatherND", ["all_boxes", voter_row], "voter_boxes", batch_dims=1)
    by_box = add("Transpose", ["all_scores"], "scores_by_box", perm=[0, 2, 1])
    of_voters = add("GatherND", [by_box, voter_row], "scores_by_voter", batch_dims=1)
    by_class = add("Transpose", [of_voters], "voter_scores_by_class", perm=[0, 2, 1])
    kept_class = add("Unsqueeze", ["class_row", "last_axis"], "kept_class")
    weights = add("GatherND", [by_class, kept_class], "voter_weights", batch_dims=1)  # [N, D, V]

    # A coordinate at a time, [N, D, 1] and [N, 1, V]: ONNX Runtime takes its time over a last axis of two or four.
    corners = ("left", "top", "right", "bottom")
    ones = constant("ones", [1] * len(corners))
    add("Split", ["kept_boxes", ones], *[f"kept_{corner}" for corner in corners], axis=2)
    by_corner = add("Transpose", [boxes], "voter_corners", perm=[0, 2, 1])
    add("Split", [by_corner, ones], *[f"voter_{corner}" for corner in corners], axis=1)
    for low, high, side in (("left", "right", "width"), ("top", "bottom", "height")):
        add("Max", [f"kept_{low}", f"voter_{low}"], f"common_{low}")
        add("Min", [f"kept_{high}", f"voter_{high}"], f"common_{high}")
        add("Relu", [add("Sub", [f"common_{high}", f"common_{low}"], f"common_{side}_or_less")], f"common_{side}")
        for who in ("kept", "voter"):
            add("Sub", [f"{who}_{high}", f"{who}_{low}"], f"{who}_{side}")
    common, *areas = [
        add("Mul", [f"{who}_width", f"{who}_height"], f"{who}_area") for who in ("common", "kept", "voter")
    ]
    union = add("Sub", [add("Add", areas, "both_areas"), common], "union")
    # Without a division, since a box may have no area.
    least = add("Mul", [union, constant("vote_iou", VOTE_IOU, np.float32)], "least_common")
    near = add("Greater", [common, least], "near")
    real = add("Greater", [weights, "nms_score"], "real")
    votes = add("Where", [add("And", [near, real], "voting"), weights, "no_score"], "votes")
    total = add("ReduceSum", [votes, "last_axis"], "all_votes", keepdims=1)
    mean = add("Div", [add("MatMul", [votes, boxes], "vote_sum"), total], "vote_mean_or_more")
    mean = add("Clip", [mean, "no_score", constant("most", 1.0, np.float32)], "vote_mean")
    return add("Where", [add("Greater", [total, "no_score"], "voted"), mean, "kept_boxes"], "voted_boxes")
