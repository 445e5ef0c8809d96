"""The file of an exported network, held against the network itself."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor
from torchvision.ops import box_iou

from handlers.detection.networks.base import Network, only_candidates
from handlers.detection.suppression import MAX_DETECTIONS, MIN_SCORE, NMS_IOU, suppress, vote, voters


class ExportMismatch(Exception):
    """The exported file does not find what the network finds."""


def check_export(network: Network, path: Path, images: NDArray[np.uint8]) -> None:
    """Hold the file `path` against torch on `images` (uint8 [N, S, S, 3]), both in float32 on the CPU.

    Which boxes are kept, and where the vote then puts them, are looked at one after the other: the first is compared
    with torch's own predictions, the second with what torch makes of the file's.

    Raises ExportMismatch if more than one detection in a hundred is only on one side. The few are allowed because
    suppression is a threshold: two boxes may overlap by 0.5 and a rounding error.
    """
    network = copy.deepcopy(network).cpu().eval()
    theirs = _run(path, images)
    with torch.inference_mode():
        outputs = network(torch.from_numpy(images))
        all_boxes, all_scores = network.detections(outputs)
        candidates = only_candidates(all_scores)
    all_boxes = all_boxes.clamp(0, 1)
    compared = different = 0
    for index in range(len(images)):
        file = {name: torch.from_numpy(values[index]) for name, values in theirs.items()}
        real = file["class_ids"] > 0
        found = _Found(*(file[name][real] for name in ("kept_boxes", "class_ids", "scores")))
        expected = _Found(*suppress(all_boxes[index], candidates[index]))
        compared += max(len(expected.scores), len(found.scores))
        made_up = int((~_is_prediction(found, all_boxes[index], all_scores[index])).sum())
        missing = int((~_is_accounted_for(expected, found, candidates[index])).sum())
        moved = int((~_is_voted(file["boxes"][real], found, file)).sum())
        different += max(made_up, missing, moved)
    # One at least, where there is little to compare.
    if different > max(compared / 100, 1):
        raise ExportMismatch(f"{different} of {compared} detections in {len(images)} images differ from torch's")


def _run(path: Path, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """What the file says, with what its last part rests on."""
    model = onnx.load(path)
    names = ["boxes", "scores", "class_ids"]
    within = {"kept_boxes": TensorProto.FLOAT, "all_boxes": TensorProto.FLOAT, "all_scores": TensorProto.FLOAT}
    within["voters"] = TensorProto.INT64
    model.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in within.items())
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names += within
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


class _Found(NamedTuple):
    """The detections in an image, before the vote."""

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
    because as good ones were the last candidates (`candidates` [classes, A]: 0 for what is none), or hardly looked at.
    """
    better = found.scores[None] > expected.scores[:, None] - _SAME_SCORE
    overlap: Tensor = box_iou(expected.boxes, found.boxes)
    same_class = expected.class_ids[:, None] == found.class_ids[None]
    same = _is_same(expected.boxes, found.boxes)
    suppressed = (better & same_class & (same | (overlap > NMS_IOU - 0.01))).any(1)
    outdone = better.sum(1) >= MAX_DETECTIONS
    last = torch.where(candidates > 0, candidates, torch.inf).amin(1)[expected.class_ids - 1]
    return suppressed | outdone | (expected.scores < torch.clamp(last, min=MIN_SCORE) + _SAME_SCORE)


def _is_voted(boxes: Tensor, found: _Found, file: Mapping[str, Tensor]) -> Tensor:
    """bool [D]: whether the vote puts the boxes `found` where the file does (`boxes` [D, 4]).

    Whom the file has asked is looked at by itself: where scores are equal, it may be others than torch would ask.
    """
    best = file["all_scores"].amax(0)
    asked, least = file["voters"], best[voters(file["all_scores"])].min()
    voted = vote(found.boxes, found.class_ids, file["all_boxes"][asked], file["all_scores"][:, asked])
    return ((boxes - voted).abs().amax(1) < _SAME_CORNER) & (best[asked].min() >= least)
