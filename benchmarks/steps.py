"""How many images a second a training on the CPU takes: MobileNet at 320 pixels, 10 images a step.

    python benchmarks/steps.py [--folder ../shared/datasets/bccd] [--iterations 12] [--rounds 3]

Ours is the loop of a training with all that it does at each iteration; its images are in memory, as they are once a
training has begun. The floor makes a forward pass, the loss, a backward pass and a step of SGD with the same network on
batches that are ready. The peer is the loop of torchvision's reference script (PIL, transforms v2, a `DataLoader` with
a process for each core, the resize that its models begin with), once with our network and loss, and once with its own
SSDLite on MobileNetV2, a smaller network: six levels from stride 16 on instead of seven from stride 8.
"""

import argparse
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

# As the child has it, before torch loads OpenMP; the floor and the peer have the good of it too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from accuracy import DATASETS
from accuracy_peers import torchvision_ssdlite
from figures import figure, in_turn
from image_path import BATCH, MIRRORED, SIZE, Loader, as_in_a_child, reference_data, reference_loader
from torch import Tensor, nn
from torch.utils.data import Subset
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from training import message_of

from handlers.detection.batches import Batch, Batches, BatchPlan, ImageStore
from handlers.detection.boxes import Boxes
from handlers.detection.data import Sample, load_samples
from handlers.detection.devices import image_store_bytes, reader_threads
from handlers.detection.loop import Learner, iterate
from handlers.detection.networks import NETWORKS, Network
from handlers.detection.ranks import Ranks
from handlers.detection.targets import collate
from schemas.message import RequestMessage
from schemas.params import ParamClass

_RECIPE = NETWORKS["MobileNet"]
_RATE = ParamClass("m").inital_learning_rate
#: Of the schedule, which must only not end.
_MANY = 10_000


class Ours:
    """A training that goes on at each turn."""

    def __init__(self, samples: Sequence[Sample], network: Network) -> None:
        self.network, self._ranks = network, Ranks()
        self._learner = Learner(network, _RATE, _RECIPE.peak, iterations=_MANY, images=BATCH, ranks=self._ranks)
        store = ImageStore(SIZE, image_store_bytes(1))
        with ThreadPoolExecutor(reader_threads(1)) as pool:
            store.usable(samples, pool)
        plan = BatchPlan(1, BATCH, range(BATCH), 1, MIRRORED, SIZE)
        self._batches = Batches(plan, samples, store, network.assigner(), network.predictions)
        self._next = 1

    def run(self, iterations: int) -> float:
        """Images a second over so many iterations."""
        first, self._next = self._next, self._next + iterations
        with ThreadPoolExecutor(reader_threads(1)) as pool:
            began = time.monotonic()
            coming = self._batches.iterate(first, self._next - 1, pool)
            for _ in iterate(self._learner, coming, first, self._ranks, lambda: False, lambda *told: None):
                pass
            return iterations * BATCH / (time.monotonic() - began)

    def ready(self, iterations: int) -> list[Batch]:
        """The batches of so many iterations."""
        with ThreadPoolExecutor(reader_threads(1)) as pool:
            return [batch for (batch,) in self._batches.iterate(1, iterations, pool)]


class Reference(nn.Module):
    """A network of ours as torchvision's are called: a list of images and their targets in, losses out."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self._resize = GeneralizedRCNNTransform(
            SIZE, SIZE, [0.0] * 3, [1.0] * 3, size_divisible=1, fixed_size=(SIZE, SIZE)
        )
        self._assign = network.assigner()

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The loss, by the one name it has."""
        resized, targets = self._resize(images, targets)
        assigned = [self._assign(boxes_of(target)) for target in targets]
        outputs = self.network((255 * resized.tensors).permute(0, 2, 3, 1))
        found = collate(assigned, self.network.predictions)
        return {"loss": self.network.loss(outputs, found) / max(len(found.rows), len(images))}


def boxes_of(target: dict[str, Tensor]) -> Boxes:
    """The boxes of a target of torchvision, as fractions of the resized image."""
    none = torch.zeros(len(target["labels"]), dtype=torch.bool).numpy()
    return Boxes((target["boxes"] / SIZE).numpy(), target["labels"].numpy(), none, none)


def new_network(classes: int) -> Network:
    """Ours, from a random start, as a training has it in memory."""
    network = _RECIPE.make(classes, SIZE, None).train()
    return network.to(memory_format=torch.channels_last)


def floor(network: Network, optimizer: torch.optim.Optimizer, batches: Sequence[Batch]) -> float:
    """Images a second of the bare steps."""
    began = time.monotonic()
    for batch in batches:
        optimizer.zero_grad()
        loss = network.loss(network(batch.images), batch.targets) / len(batch.targets.rows)
        loss.backward()
        optimizer.step()
    return len(batches) * BATCH / (time.monotonic() - began)


def peer(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Loader | list[Any]) -> float:
    """Images a second of `train_one_epoch` in torchvision's references/detection/engine.py, without what it logs."""
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.001, total_iters=len(loader))
    model.train()
    began = time.monotonic()
    for images, targets in loader:
        losses = model(list(images), [dict(target) for target in targets])
        loss = sum(losses.values())
        assert math.isfinite(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return len(loader) * BATCH / (time.monotonic() - began)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """As torchvision's script has it."""
    return torch.optim.SGD(model.parameters(), lr=_RATE, momentum=0.9, weight_decay=4e-5)


def samples_of(folder: Path, split: str) -> tuple[RequestMessage, list[Sample]]:
    """The message of a task on the images of `split`, and the images, which are read from the folder."""
    kind = "TEST" if split == "test" else "TRAIN"
    message = RequestMessage.model_validate(message_of(folder, kind, (split,)))
    samples, skipped = load_samples(message, {i.id: folder / "images" / i.file_name for i in message.image_info})
    assert not skipped
    return message, samples


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DATASETS / "bccd", help="a COCO folder")
    parser.add_argument("--iterations", type=int, default=12, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    folder, iterations = arguments.folder.resolve(), arguments.iterations
    message, samples = samples_of(folder, "train")
    classes = len(message.class_info)
    # The processes of the loader first, while this one is small.
    data = reference_data(folder, 1 + iterations * BATCH // len(samples))
    loader = reference_loader(Subset(data, range(iterations * BATCH)), reader_threads(1))
    first = [next(iter(loader))]
    as_in_a_child()
    ours, bare = Ours(samples, new_network(classes)), new_network(classes)
    same, own = Reference(new_network(classes)), torchvision_ssdlite(classes)
    runs = {
        "ours": partial(ours.run, iterations),
        "floor": partial(floor, bare, sgd(bare), ours.ready(iterations)),
        "same": partial(peer, same, sgd(same), loader),
        "own": partial(peer, own, sgd(own), loader),
    }
    # A first step takes twice as long as a later one.
    ours.run(2)
    floor(bare, sgd(bare), ours.ready(1))
    for model in (same, own):
        peer(model, sgd(model), first)
    found = in_turn(runs, arguments.rounds)
    common = {"floor": found["floor"], "floor_is": "bare steps on batches in memory"}
    reach = ">= 0.95 x floor; >= 1.1 x peer"
    figure(
        "training on a CPU",
        "images/s",
        found["ours"],
        **common,
        peer=found["same"],
        peer_is="torchvision's reference loop, same network",
        reach=reach,
    )
    figure(
        "training on a CPU, beside a smaller network",
        "images/s",
        found["ours"],
        **common,
        peer=found["own"],
        peer_is="torchvision's reference loop, its SSDLite on MobileNetV2",
    )


if __name__ == "__main__":
    main()
