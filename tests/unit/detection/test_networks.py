"""Every network that a task can name: trains, resumes, exports, finds; losses and targets are the published ones."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import SIDE, draw, make_job
from test_resume import assert_equal, last_snapshot, run_until
from torchvision.models.detection import _utils as torchvision_utils
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from handlers.detection.batch_norm import calibrate_batch_norm, fold_batch_norm
from handlers.detection.boxes import Boxes, make_boxes
from handlers.detection.data import fit, read_image
from handlers.detection.export_check import check_export
from handlers.detection.job import Event, Job, Started, Trained
from handlers.detection.job import Tested as Outcome
from handlers.detection.job import TestedModel as RegisteredModel
from handlers.detection.networks import NETWORKS, Detector, Network
from handlers.detection.networks.pyramid import FCOS, RetinaNet
from handlers.detection.predict import run_test
from handlers.detection.ranks import Ranks
from handlers.detection.suppression import best_boxes
from handlers.detection.targets import collate
from handlers.detection.train import train
from schemas.enums import ModelScopeClass

DATASETS = Path(__file__).parents[4] / "shared" / "datasets"
CLASSES = 2


def build(name: str, size: int, classes: int = CLASSES) -> Network:
    """The network with random weights."""
    torch.manual_seed(0)
    return NETWORKS[name].make(classes, size, None)


@pytest.fixture
def small_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`SMALL` is 96 pixels for every network, so that two cores can train them."""
    for name, recipe in NETWORKS.items():
        monkeypatch.setitem(NETWORKS, name, dataclasses.replace(recipe, input_sizes={ModelScopeClass.SMALL: SIDE}))


# What MobileNet does is tested everywhere else.
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "MobileNet"])
def test_a_task_with_this_network_from_end_to_end(tmp_path: Path, small_inputs: None, name: str) -> None:
    """Interrupted and resumed, its last snapshot is that of a training that was not, to the last bit; the exported file
    agrees with torch, on photographs too, and a test with it runs.
    """

    def job(folder: str, **more: object) -> Job:
        return make_job(
            tmp_path / folder, 8, net_model=name, max_num_iters=2, snap_shot_ivterval=1, batch_size=4, **more
        )

    half = last_snapshot(run_until(job("half"), 1))
    rest = last_snapshot(run_until(job("half", resume_from=half.path), 1))
    events: list[Event] = []
    whole = job("whole")
    whole.out.mkdir()
    trained = train(whole, events.append, lambda: False, Ranks())
    assert isinstance(trained, Trained)
    assert next(event for event in events if isinstance(event, Started)).initial_weights
    expected = torch.load(last_snapshot(events).path, weights_only=True)
    assert_equal(torch.load(rest.path, weights_only=True), expected)

    network = build(name, SIDE)
    network.load_state_dict(expected["state"]["best"]["weights"])
    if not DATASETS.is_dir():
        photographs = [draw(seed)[0] for seed in range(2)]
    else:
        photographs = [read_image(path) for path in sorted((DATASETS / "bccd" / "images").iterdir())[:2]]
    check_export(network, trained.onnx, np.stack([fit(image, SIDE) for image in photographs]))

    model = RegisteredModel(onnx=trained.onnx, class_names=trained.class_names, input_size=trained.input_size)
    test = job("test", kind="TEST", model=model, splits=["test"] * 8)
    test.out.mkdir()
    tested = run_test(test, events.append, lambda: False)
    assert isinstance(tested, Outcome)
    assert tested.images.used == 8
    rows = [json.loads(line) for line in tested.detections.read_text().splitlines()]
    assert len(rows) == 8
    assert all(0 <= found["score"] <= 1 for row in rows for found in row["detections"])


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "MobileNet"])
def test_it_learns(name: str) -> None:
    """Four images by heart in a few steps from a random start: each object is found with the right class."""
    network = build(name, 64)
    drawn = [draw(seed) for seed in range(4)]
    images = torch.from_numpy(np.stack([fit(image, 64) for image, _ in drawn]))
    truths = [make_boxes([(tuple(box), class_id, False) for class_id, box in labels]) for _, labels in drawn]
    assign = network.assigner()
    targets = collate([assign(boxes.moved(boxes.xyxy / SIDE)) for boxes in truths], network.predictions)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-4)
    for _ in range(30):
        optimizer.zero_grad()
        loss = network.loss(network(images), targets) / len(targets.rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 10)
        optimizer.step()
    # In training mode, with the statistics of these images.
    with torch.no_grad():
        all_boxes, all_scores = Detector(network)(images)
    found = total = 0
    for boxes, scores, truth in zip(all_boxes, all_scores, truths, strict=True):
        corners, class_ids, _ = best_boxes(boxes, scores)
        overlap = box_iou(torch.from_numpy(truth.xyxy / SIDE), corners[: 2 * len(truth)])
        same = torch.from_numpy(truth.class_ids)[:, None] == class_ids[None, : 2 * len(truth)]
        found += int(((overlap > 0.5) & same).any(dim=1).sum())
        total += len(truth)
    assert total > 6
    assert found >= 0.8 * total


def random_boxes(seed: int, count: int = 8, smallest: float = 0.02) -> Boxes:
    """In fractions of the image."""
    random = np.random.default_rng(seed)
    corner, size = random.uniform(0, 0.6, (count, 2)), random.uniform(smallest, 0.4, (count, 2))
    return make_boxes([((*corner[i], *size[i]), int(random.integers(1, CLASSES + 1)), False) for i in range(count)])


@pytest.fixture(scope="module")
def retinanet() -> RetinaNet:
    return RetinaNet(CLASSES, 256)


@pytest.fixture(scope="module")
def fcos() -> FCOS:
    return FCOS(CLASSES, 256)


@pytest.mark.parametrize("seed", range(4))
def test_retinanet_assigns_as_torchvision(retinanet: RetinaNet, seed: int) -> None:
    """The same default boxes are foreground and the same neither; beyond that, each object has the one it overlaps most
    (torchvision takes all of those that overlap it equally).
    """
    boxes = random_boxes(seed)
    assign = retinanet.assigner()
    ours = assign(boxes)
    iou = box_iou(torch.from_numpy(boxes.xyxy), torch.from_numpy(assign.corners))
    theirs = torchvision_utils.Matcher(0.5, 0.4)(iou).numpy()
    own = iou.argmax(dim=1).numpy()
    assert ours.rows.tolist() == np.union1d(np.flatnonzero(theirs >= 0), own).tolist()
    between = np.flatnonzero(theirs == torchvision_utils.Matcher.BETWEEN_THRESHOLDS)
    assert ours.ignored.tolist() == np.setdiff1d(between, own).tolist()


def test_retinanet_loss_is_focal_and_giou(retinanet: RetinaNet) -> None:
    """For one image, the numbers of torchvision's functions on torchvision's own coding of boxes."""
    assignment = retinanet.assigner()(random_boxes(0))
    targets = collate([assignment], retinanet.predictions)
    torch.manual_seed(0)
    logits, offsets = torch.randn(1, retinanet.predictions, CLASSES), torch.randn(1, retinanet.predictions, 4) / 4
    ours = retinanet.loss((logits, offsets), targets)
    kept = np.setdiff1d(np.arange(retinanet.predictions), assignment.ignored)
    wanted = torch.zeros(retinanet.predictions, CLASSES)
    wanted[targets.rows, targets.classes - 1] = 1
    focal = sigmoid_focal_loss(logits[0][kept], wanted[kept], reduction="sum")
    coder = torchvision_utils.BoxCoder((1.0, 1.0, 1.0, 1.0))
    corners = torch.from_numpy(retinanet.assigner().corners)[targets.rows]
    found = coder.decode_single(offsets[0][targets.rows], corners)
    giou = generalized_box_iou_loss(found, targets.corners, reduction="sum", eps=1e-12)
    assert float(ours) == pytest.approx(float(focal + giou), rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_fcos_loss_is_that_of_torchvision(fcos: FCOS, seed: int) -> None:
    """The three losses of FCOSHead.compute_loss, in pixels, for objects that have a point inside."""
    boxes = random_boxes(seed, 3, smallest=0.1)
    assignment = fcos.assigner()(boxes)
    targets = collate([assignment], fcos.predictions)
    cells = fcos.cells
    corners = torch.cat([cells[:, :2] - cells[:, 2:] / 2, cells[:, :2] + cells[:, 2:] / 2], dim=1)
    matched = torch.full((fcos.predictions,), -1)
    for row, corner in zip(assignment.rows, assignment.corners, strict=True):
        matched[row] = int((boxes.xyxy == corner).all(axis=1).argmax())
    torch.manual_seed(seed)
    logits, centred = torch.randn(1, fcos.predictions, CLASSES), torch.randn(1, fcos.predictions, 1)
    ways = torch.rand(1, fcos.predictions, 4) * 4
    theirs = FCOSHead(256, 1, CLASSES).compute_loss(
        [{"boxes": torch.from_numpy(boxes.xyxy) * 256, "labels": torch.from_numpy(boxes.class_ids) - 1}],
        {"cls_logits": logits, "bbox_regression": ways, "bbox_ctrness": centred},
        [corners * 256],
        [matched],
    )
    ours = fcos.loss((logits, ways, centred), targets)
    assert float(ours) / len(targets.rows) == pytest.approx(float(sum(theirs.values())), rel=1e-3)


def test_every_object_has_a_point(fcos: FCOS) -> None:
    """The points of an object are near its middle and on the level of its size; the smaller object comes first; an
    object between the points of the finest level has the nearest one.
    """
    boxes = make_boxes(
        [((0.1, 0.1, 0.8, 0.8), 1, False), ((0.45, 0.45, 0.1, 0.1), 2, False), ((0.0, 0.0, 0.004, 0.004), 1, False)]
    )
    found = fcos.assigner()(boxes)
    assert set(found.classes.tolist()) == {1, 2}
    centres, sides = fcos.cells[found.rows, :2].numpy(), fcos.cells[found.rows, 2].numpy()
    tiny = (found.corners == boxes.xyxy[2]).all(axis=1)
    assert found.rows[tiny].tolist() == [0]
    middle = (found.corners[:, :2] + found.corners[:, 2:]) / 2
    assert (np.abs(centres - middle)[~tiny] < 1.5 * sides[~tiny, None]).all()
    small, large = found.classes == 2, (found.classes == 1) & ~tiny
    # 205 pixels a side: its sides are about 103 pixels off, so it belongs to the level of stride 16.
    assert set((256 * sides[large]).tolist()) == {16.0}
    assert set((256 * sides[small]).tolist()) == {8.0}


def test_a_crowd_teaches_nothing(fcos: FCOS, retinanet: RetinaNet) -> None:
    """Predictions inside it may say what they like."""
    crowd = make_boxes([((0.0, 0.0, 0.5, 1.0), 1, True), ((0.6, 0.4, 0.3, 0.3), 2, False)])
    for network in (fcos, retinanet):
        assignment = network.assigner()(crowd)
        assert set(assignment.classes) == {2}
        targets = collate([assignment], network.predictions)
        logits, ways = torch.zeros(1, network.predictions, CLASSES), torch.ones(1, network.predictions, 4)
        more = [ways, torch.zeros(1, network.predictions, 1)] if isinstance(network, FCOS) else [ways]
        quiet = network.loss((logits, *more), targets)
        loud = logits.clone()
        inside = torch.from_numpy(assignment.ignored)
        assert len(inside) > 100
        loud[:, inside, 0] = 50
        assert float(network.loss((loud, *more), targets)) == float(quiet)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_an_image_without_objects_teaches_background(name: str) -> None:
    """A finite loss above 0, with a gradient, and none of it for boxes."""
    network = build(name, SIDE)
    targets = collate([network.assigner()(make_boxes([]))] * 4, network.predictions)
    loss = network.loss(network(torch.zeros(4, SIDE, SIDE, 3, dtype=torch.uint8)), targets)
    assert 0 < loss.item() < 4000
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_folded_batch_norm_changes_nothing(name: str) -> None:
    """None is left to be exported, and what the network says is the same, up to rounding."""
    network = build(name, SIDE)
    images = torch.from_numpy(np.stack([fit(draw(seed)[0], SIDE) for seed in range(8)]))
    calibrate_batch_norm(network, images)
    folded = copy.deepcopy(network.eval())
    fold_batch_norm(folded)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    with torch.inference_mode():
        for ours, theirs in zip(folded(images), network(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.02)


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("scope", list(ModelScopeClass))
def test_every_scale_can_be_built(name: str, scope: ModelScopeClass) -> None:
    """A larger scale makes more predictions, the finest every 8 pixels."""
    size = NETWORKS[name].input_sizes[scope]
    assert build(name, size).predictions >= (size // 8) ** 2
