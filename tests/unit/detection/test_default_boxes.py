"""Default boxes take their shapes from the data, alike in every thread, and are part of what a network has learnt."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert, box_iou

from handlers.detection.boxes import Floats
from handlers.detection.networks import NETWORKS, Network
from handlers.detection.networks.default_boxes import DefaultBoxes

ANCHORED = ["MobileNet", "MobileNetV3", "VGG16", "ResNet50"]


def build(name: str) -> Network:
    torch.manual_seed(0)
    return NETWORKS[name].make(2, 224, None)


def boxes_of(network: Network) -> DefaultBoxes:
    boxes = network.boxes
    assert isinstance(boxes, DefaultBoxes)
    return boxes


def slivers(seed: int, count: int = 400) -> Floats:
    """Width and height of objects that are much longer than wide: scratches, pens, ships."""
    random = np.random.default_rng(seed)
    long, slender = random.uniform(0.15, 0.6, count), random.uniform(4, 7, count)
    flat = random.random(count) < 0.5
    return np.stack([np.where(flat, long, long / slender), np.where(flat, long / slender, long)], axis=1).astype("f4")


def best_overlaps(boxes: DefaultBoxes, sizes: Floats) -> torch.Tensor:
    """IoU of each of `sizes`, somewhere in the image, with the default box that suits it best."""
    place = np.random.default_rng(0).uniform(0, 1 - sizes)
    corners = torch.from_numpy(np.concatenate([place, place + sizes], axis=1).astype("f4"))
    return box_iou(corners, box_convert(boxes(), "cxcywh", "xyxy")).amax(dim=1)


@pytest.mark.parametrize("name", ANCHORED)
def test_shapes_are_taken_from_the_data(name: str) -> None:
    """Slivers that the built-in shapes miss are met, others of the kind too; there are as many boxes as before."""
    network = build(name)
    boxes = boxes_of(network)
    before, count = best_overlaps(boxes, slivers(1)), network.predictions
    network.fit_boxes(slivers(0))
    after = best_overlaps(boxes, slivers(1))
    assert (before > 0.5).float().mean() < 0.8 * (after > 0.5).float().mean()
    assert (after > 0.5).float().mean() > 0.5
    assert network.predictions == count == len(boxes())
    assert boxes().min() > 0
    assert boxes().max() <= 1


@pytest.mark.parametrize("name", ANCHORED)
def test_scratches_do_not_fall_between_the_cells(name: str) -> None:
    """What goes across the image and is narrow: the levels for its length alone are too coarse."""
    boxes = boxes_of(build(name))
    random = np.random.default_rng(0)
    learnt, others = (
        np.stack([random.uniform(0.06, 0.15, 300), random.uniform(0.4, 0.98, 300)], axis=1).astype("f4") for _ in "12"
    )
    boxes.fit(learnt)
    # By shape alone it is 0.41 to 0.81 of them.
    assert (best_overlaps(boxes, others) > 0.6).float().mean() > 0.9


def test_a_level_with_few_objects_keeps_its_shapes() -> None:
    """Small squares change the first level and no other; no objects, or a handful, change nothing."""
    boxes = boxes_of(build("MobileNet"))
    built = boxes.shapes.clone()
    for few in (np.empty((0, 2), np.float32), slivers(0, 20)):
        boxes.fit(few)
        assert torch.equal(boxes.shapes, built)
    boxes.fit(np.random.default_rng(0).uniform(0.03, 0.07, (500, 2)).astype("f4"))
    assert not torch.equal(boxes.shapes[:6], built[:6])
    assert torch.equal(boxes.shapes[6:], built[6:])


def test_the_same_sizes_give_the_same_shapes_in_every_thread() -> None:
    """To the last bit, though k-means begins at random."""

    def fitted(_: int) -> torch.Tensor:
        boxes = boxes_of(build("MobileNet"))
        boxes.fit(slivers(0))
        return boxes.shapes

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(fitted, range(6))
    assert all(torch.equal(first, other) for other in others)


def test_all_of_one_size() -> None:
    """One machine, one product, one size: every shape of its level is near it."""
    boxes = boxes_of(build("MobileNet"))
    boxes.fit(np.full((300, 2), 0.05, np.float32))
    assert ((boxes.shapes[:6] > 0.03) & (boxes.shapes[:6] < 0.08)).all()


def test_shapes_are_part_of_the_state() -> None:
    """A network that loads a state has its shapes."""
    fitted, fresh = build("MobileNet"), build("MobileNet")
    fitted.fit_boxes(slivers(0))
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(boxes_of(fresh)(), boxes_of(fitted)())


def test_boxes_lie_as_the_head_speaks() -> None:
    """Level by level, row by row, shape by shape."""
    boxes = DefaultBoxes([(1, 2), (1, 1)], [torch.tensor([[0.1, 0.2], [0.3, 0.4]]), torch.tensor([[0.5, 2.0]])])
    assert boxes().tolist() == [
        pytest.approx(row)
        for row in (
            [0.25, 0.5, 0.1, 0.2],
            [0.25, 0.5, 0.3, 0.4],
            [0.75, 0.5, 0.1, 0.2],
            [0.75, 0.5, 0.3, 0.4],
            [0.5, 0.5, 0.5, 1.0],
        )
    ]
