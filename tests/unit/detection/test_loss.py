"""The loss is SSD's, number for number beside torchvision's; crowds and images without objects teach as documented."""

import numpy as np
import pytest
import torch
from torchvision.models.detection._utils import BoxCoder, SSDMatcher
from torchvision.models.detection.ssd import SSD as TorchvisionSSD
from torchvision.ops import box_convert, box_iou, generalized_box_iou_loss

from handlers.detection.boxes import make_boxes
from handlers.detection.coding import decode, encode
from handlers.detection.loss import GIOU_WEIGHT, MIN_NEGATIVES, multibox_loss
from handlers.detection.networks.ssd import MATCH_IOU, SSD, mobilenet_v2_ssd
from handlers.detection.targets import Assignment, Overlap, Targets, collate

CLASSES = 3


@pytest.fixture(scope="module")
def network() -> SSD:
    return mobilenet_v2_ssd(CLASSES, 224)


def objects(seed: int, count: int = 6) -> list[tuple[tuple[float, float, float, float], int, bool]]:
    random = np.random.default_rng(seed)
    corner, size = random.uniform(0, 0.6, (count, 2)), random.uniform(0.02, 0.4, (count, 2))
    return [((*corner[i], *size[i]), int(random.integers(1, CLASSES + 1)), False) for i in range(count)]


def default_corners(network: SSD) -> np.ndarray:
    assign = network.assigner()
    assert isinstance(assign, Overlap)
    assert assign.match == assign.unclear == MATCH_IOU
    return assign.corners


def targets(assignment: Assignment, network: SSD) -> Targets:
    """Those of a batch of one image."""
    return collate([assignment], network.predictions)


@pytest.mark.parametrize(("seed", "count"), [(0, 6), (1, 6), (2, 6), (3, 6), (4, 6), (5, 300)])
def test_assignment_is_that_of_torchvision(network: SSD, seed: int, count: int) -> None:
    """The same default boxes answer for the same objects, also where there are very many."""
    boxes = make_boxes(objects(seed, count))
    ours = network.assigner()(boxes)
    iou = box_iou(torch.from_numpy(boxes.xyxy), torch.from_numpy(default_corners(network)))
    theirs = SSDMatcher(0.5)(iou)
    assert ours.rows.tolist() == torch.nonzero(theirs >= 0).flatten().tolist()
    matched = theirs[theirs >= 0]
    assert (ours.classes == boxes.class_ids[matched]).all()
    assert (ours.corners == boxes.xyxy[matched]).all()


@pytest.mark.parametrize("seed", range(3))
def test_loss_is_that_of_torchvision(network: SSD, seed: int) -> None:
    """For one image, where mining over the batch is mining in the image, the number is SSD.compute_loss's, and to that
    torchvision's generalised IoU loss of the same boxes.
    """
    boxes = make_boxes(objects(seed))
    corners = default_corners(network)
    torch.manual_seed(seed)
    offsets, logits = torch.randn(1, len(corners), 4), torch.randn(1, len(corners), CLASSES + 1)
    ours = multibox_loss(offsets, logits, network.boxes(), targets(network.assigner()(boxes), network))
    reference = TorchvisionSSD.__new__(TorchvisionSSD)
    torch.nn.Module.__init__(reference)
    reference.box_coder, reference.neg_to_pos_ratio = BoxCoder((10.0, 10.0, 5.0, 5.0)), 3
    matches = SSDMatcher(0.5)(box_iou(torch.from_numpy(boxes.xyxy), torch.from_numpy(corners)))
    theirs = reference.compute_loss(
        [{"boxes": torch.from_numpy(boxes.xyxy), "labels": torch.from_numpy(boxes.class_ids)}],
        {"bbox_regression": offsets, "cls_logits": logits},
        [torch.from_numpy(corners)],
        [matches],
    )
    found = BoxCoder((10.0, 10.0, 5.0, 5.0)).decode_single(offsets[0], torch.from_numpy(corners))[matches >= 0]
    matched = torch.from_numpy(boxes.xyxy)[matches[matches >= 0]]
    giou = generalized_box_iou_loss(found, matched, reduction="mean", eps=1e-12)
    expected = float(sum(theirs.values())) + GIOU_WEIGHT * float(giou)
    assert float(ours) / len(matched) == pytest.approx(expected, rel=1e-4)


def test_decoding_undoes_encoding(network: SSD) -> None:
    """An object encoded against any default box comes back."""
    target = torch.tensor([[0.2, 0.3, 0.5, 0.45]]).expand(network.predictions, 4)
    offsets = encode(target, network.boxes())
    near = box_iou(box_convert(network.boxes(), "cxcywh", "xyxy"), target[:1])[:, 0] > 0.05
    assert torch.allclose(decode(offsets[None], network.boxes())[0][near], target[near], atol=1e-5)


def test_an_image_without_objects_teaches_background(network: SSD) -> None:
    """It has a loss, of its worst boxes, and that loss goes down as they turn to background."""
    nothing = targets(network.assigner()(make_boxes([])), network)
    assert len(nothing.rows) == 0
    offsets, logits = torch.zeros(1, network.predictions, 4), torch.zeros(1, network.predictions, 4)
    loss = multibox_loss(offsets, logits, network.boxes(), nothing)
    assert float(loss) == pytest.approx(MIN_NEGATIVES * np.log(4), rel=1e-5)
    logits[..., 0] = 5
    assert float(multibox_loss(offsets, logits, network.boxes(), nothing)) < float(loss) / 10


def test_a_crowd_is_neither_object_nor_background(network: SSD) -> None:
    """Default boxes inside a crowd may say what they like."""
    crowd = make_boxes([((0.0, 0.0, 0.5, 1.0), 1, True), ((0.6, 0.4, 0.3, 0.3), 2, False)])
    assignment = network.assigner()(crowd)
    assert set(assignment.classes) == {2}
    inside = default_corners(network)[assignment.ignored]
    assert len(inside) > 1000
    assert (inside[:, 0] < 0.5).all()
    offsets, logits = torch.zeros(1, network.predictions, 4), torch.zeros(1, network.predictions, 4)
    quiet = multibox_loss(offsets, logits, network.boxes(), targets(assignment, network))
    logits[:, torch.from_numpy(assignment.ignored), 1] = 50
    assert float(multibox_loss(offsets, logits, network.boxes(), targets(assignment, network))) == float(quiet)
