"""A batch that does not fit into memory is taken in parts, and teaches what it would have taught as a whole."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from drawn import make_job
from torch import nn

from handlers.detection import devices
from handlers.detection.batches import Batch, Batches, BatchPlan, ImageStore
from handlers.detection.boxes import make_boxes
from handlers.detection.data import image_paths, load_samples, read_message
from handlers.detection.loop import Learner
from handlers.detection.networks.ssd import SSD, mobilenet_v2_ssd
from handlers.detection.ranks import Ranks
from handlers.detection.targets import Targets, collate

SIZE = 96


@pytest.fixture(scope="module")
def network() -> SSD:
    torch.manual_seed(0)
    return mobilenet_v2_ssd(2, SIZE)


def batches(folder: Path, network: SSD, images: int, parts: int) -> list[Batch]:
    """The first iteration's."""
    job = make_job(folder)
    samples, _ = load_samples(read_message(job.message), image_paths(job.images))
    plan = BatchPlan(7, images, range(images), parts, (), SIZE)
    made = Batches(plan, samples, ImageStore(SIZE, 1 << 30), network.assigner(), network.predictions)
    with ThreadPoolExecutor(2) as pool:
        return next(made.iterate(1, 1, pool))


def test_the_parts_are_the_batch(tmp_path: Path, network: SSD) -> None:
    """The same images in the same order, in parts of like size, each with its own targets."""
    (whole,) = batches(tmp_path, network, 7, 1)
    parts = batches(tmp_path, network, 7, 3)
    assert [len(part.mongodb_ids) for part in parts] == [2, 2, 3]
    assert tuple(name for part in parts for name in part.mongodb_ids) == whole.mongodb_ids
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    begins = (0, 2, 4)
    rows = [part.targets.rows + begin * network.predictions for part, begin in zip(parts, begins, strict=True)]
    assert torch.equal(torch.cat(rows), whole.targets.rows)


def learnt(network: SSD, parts: Sequence[Batch], ranks: Ranks | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and the weights after one step; statistics of batch normalisation stay as they are."""
    network.load_state_dict(torch.load("start.pt", weights_only=True))
    learner = Learner(network, 0.01, 25, iterations=100, images=1, ranks=ranks or Ranks())
    return float(learner.step(parts, 1)), {name: p.detach().clone() for name, p in network.named_parameters()}


def test_gradients_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: SSD) -> None:
    """Of a batch that holds the same images twice, both halves teach what the whole does."""
    monkeypatch.chdir(tmp_path)
    torch.save(network.state_dict(), "start.pt")
    (half,) = batches(tmp_path, network, 3, 1)
    shift = 3 * network.predictions
    targets = half.targets
    doubled = Targets(
        torch.cat([targets.rows, targets.rows + shift]),
        targets.classes.repeat(2),
        targets.corners.repeat(2, 1),
        torch.cat([targets.ignored, targets.ignored + shift]),
    )
    whole = Batch(half.images.repeat(2, 1, 1, 1), doubled, half.mongodb_ids * 2)
    loss, weights = learnt(network, [whole])
    loss_of_parts, weights_of_parts = learnt(network, [half, half])
    assert loss_of_parts == pytest.approx(loss, rel=1e-4)
    start = torch.load("start.pt", weights_only=True)
    step, difference = (
        torch.cat([(weights[name] - other[name]).flatten() for name in weights]).norm()
        for other in (start, weights_of_parts)
    )
    assert step > 0
    # Background boxes whose losses are as good as equal: rounding decides which of them count.
    assert difference < 0.01 * step


class OneOfTwo(Ranks):
    """A rank whose other one has 40 predictions that answer for an object, in 3 images."""

    def __init__(self) -> None:
        super().__init__(0, 2)

    def parallel(self, network: nn.Module) -> nn.Module:
        return network

    def total(self, *numbers: int) -> list[int]:
        answers, images = numbers
        return [answers + 40, images + 3]


def test_an_object_counts_as_much_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: SSD) -> None:
    """What a rank adds to the step is its part of the mean over all objects, not the mean over its own."""
    monkeypatch.chdir(tmp_path)
    torch.save(network.state_dict(), "start.pt")
    (mine,) = batches(tmp_path, network, 3, 1)
    answers = len(mine.targets.rows)
    assert answers > 3
    alone, _ = learnt(network, [mine])
    of_two, _ = learnt(network, [mine], OneOfTwo())
    # Gradients are averaged over the ranks, so that each counts twice.
    assert of_two == pytest.approx(2 * alone * answers / (answers + 40), rel=1e-5)


def test_a_batch_without_objects_teaches_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: SSD
) -> None:
    """Beside another or by itself: no division by nothing, and after a step there is less to learn of it."""
    monkeypatch.chdir(tmp_path)
    torch.save(network.state_dict(), "start.pt")
    (some,) = batches(tmp_path, network, 2, 1)
    empty = some._replace(targets=collate([network.assigner()(make_boxes([]))] * 2, network.predictions))
    with torch.no_grad():
        before = float(network.eval().loss(network(empty.images), empty.targets))
    for parts in ([empty], [empty, some]):
        loss, weights = learnt(network, parts)
        assert math.isfinite(loss)
        assert all(bool(weight.isfinite().all()) for weight in weights.values())
        with torch.no_grad():
            after = network.eval().loss(network(empty.images), empty.targets)
        assert 0 < float(after) < before


def test_a_small_container_takes_batches_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than be killed for its memory, and nobody know why; the kernel says a container's limit in either form."""
    monkeypatch.setattr(devices, "_CGROUP", tmp_path)
    cpu = torch.device("cpu")
    (tmp_path / "memory.max").write_text("max\n")
    assert devices.images_at_once(cpu, 320, 1) >= 1
    (tmp_path / "memory.max").write_text(f"{4 << 30}\n")
    # Ten images of 320 pixels fit into 4 GiB, ten of 544 do not; two ranks have half of it each.
    assert devices.images_at_once(cpu, 320, 1) >= 10
    assert 2 <= devices.images_at_once(cpu, 544, 1) <= 5
    assert 1 <= devices.images_at_once(cpu, 544, 2) <= 2
    assert devices.images_at_once(cpu, 100_000, 1) == 1
    # Images that are kept take their part: a sixteenth of the memory, a GiB at most.
    assert devices.image_store_bytes(1) == 2 * devices.image_store_bytes(2) == 1 << 28
    assert devices.images_at_once(torch.device("cuda", 0), 544, 1) > 1_000_000
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{4 << 30}\n")
    assert 2 <= devices.images_at_once(cpu, 544, 1) <= 5
