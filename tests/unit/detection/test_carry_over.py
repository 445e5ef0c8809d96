"""A training that begins with the weights of another version: all that fits is taken over, each class by its name."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from drawn import CLASSES, make_job
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSClassificationHead
from torchvision.models.detection.retinanet import RetinaNetClassificationHead
from torchvision.models.detection.ssd import SSDClassificationHead

from handlers.detection.errors import DataError, StoppedEarly
from handlers.detection.fine_tune import Rows, begin_with, carry_over, class_rows, write_weights
from handlers.detection.job import Event, Job, Progress, Snapshot, Started, Trained
from handlers.detection.networks.ssd import mobilenet_v2_ssd
from handlers.detection.ranks import Ranks
from handlers.detection.train import train

#: The row of anchor 4 that says "background" is 400, the one that says "disc" 400 + its number here.
NUMBERS = {"square": 1, "disc": 2, "ring": 3, "star": 4}


def marked(classes: Sequence[str], rows: Rows, sign: int = 1) -> Tensor:
    """[groups * (common + classes), 2], whose values say which row is whose."""
    of_group = [0] * rows.common + [NUMBERS[name] for name in classes]
    numbers = [sign * (100 * (group + 1) + number) for group in range(rows.groups) for number in of_group]
    return torch.tensor(numbers, dtype=torch.float32)[:, None].repeat(1, 2)


@pytest.mark.parametrize("rows", [Rows(6, 1), Rows(4, 1), Rows(9, 0), Rows(1, 0)])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["square", "disc"], ["square", "disc"]),
        (["square", "disc"], ["disc", "square"]),
        (["square", "disc"], ["ring", "disc", "square"]),
        (["square", "disc", "ring"], ["ring"]),
        (["square", "disc"], ["disc", "ring"]),
        (["square", "disc"], ["ring", "star"]),
        (["square"], ["star", "ring", "disc"]),
    ],
)
def test_rows_follow_their_class(rows: Rows, old: list[str], new: list[str]) -> None:
    """Background and classes of both lists have the old rows in their new places; those of new classes are as built."""
    built, known = marked(new, rows, sign=-1), marked(old, rows)
    carried = carry_over({"logits": built}, {"logits": known}, old, new, {"logits": rows})
    expected = marked(new, rows)
    fresh = torch.tensor([name not in old for name in new])
    by_group = expected.view(rows.groups, -1, 2)
    by_group[:, rows.common :][:, fresh] *= -1
    assert torch.equal(carried.state["logits"], expected)
    assert carried.classes == tuple(name for name in new if name in old)
    assert carried.fresh == ()
    assert torch.equal(built, marked(new, rows, sign=-1)), "what was built is not changed"


def test_what_does_not_fit_is_as_it_was_built() -> None:
    """Tensors that the old network lacks or has of another shape; its own that the new one lacks are left out."""
    built = {"a": torch.zeros(3), "b": torch.zeros(3, 2), "c": torch.zeros(2), "d": torch.zeros(4, 2)}
    old = {"a": torch.ones(3), "b": torch.ones(2, 3), "d": torch.ones(5, 2), "e": torch.ones(7)}
    carried = carry_over(built, old, ["square"], ["disc"], {"d": Rows(2, 1)})
    assert carried.fresh == ("b", "c", "d")
    assert {name: float(tensor.sum()) for name, tensor in carried.state.items()} == {"a": 3, "b": 0, "c": 0, "d": 0}


@pytest.mark.parametrize(
    ("build", "groups", "common", "tensors"),
    [
        (lambda classes: mobilenet_v2_ssd(classes, 224), 6, 1, 14),
        (lambda classes: SSDClassificationHead([8, 16], [4, 6], classes + 1), None, 1, 4),
        (lambda classes: RetinaNetClassificationHead(8, 9, classes), 9, 0, 2),
        (lambda classes: FCOSClassificationHead(32, 1, classes), 1, 0, 2),
    ],
)
def test_the_rows_of_each_kind_of_head(
    build: Callable[[int], nn.Module], groups: int | None, common: int, tensors: int
) -> None:
    """Weight and bias of the layers that give scores, and nothing else: not even layers of as many rows by chance."""
    # 31 classes and background at 6 anchors are 192 rows, as a layer before them has.
    for classes in (1, 31):
        rows = class_rows(build(classes).state_dict(), build(classes + 1).state_dict(), classes)
        assert len(rows) == tensors
        assert {one.common for one in rows.values()} == {common}
        if groups is not None:
            assert {one.groups for one in rows.values()} == {groups}
    assert not any("bbox" in name or "regression" in name for name in rows)


# ---- a training


def first_step(job: Job) -> tuple[str, float, dict[str, Tensor]]:
    """Where the weights came from, the loss of the first iteration, and the network after it."""
    events: list[Event] = []
    asked = iter((False, True))
    job.out.mkdir()
    with pytest.raises(StoppedEarly):
        train(job, events.append, lambda: next(asked), Ranks())
    (started,) = (event for event in events if isinstance(event, Started))
    (progress,) = (event for event in events if isinstance(event, Progress))
    (snapshot,) = (event for event in events if isinstance(event, Snapshot))
    network = torch.load(snapshot.path, weights_only=True)["state"]["network"]
    return started.initial_weights or "", progress.loss or 0.0, network


def with_classes(job: Job, names: Sequence[str]) -> Job:
    """The job with these classes instead; labels of `CLASSES` keep their names."""
    message = json.loads(job.message.read_text())
    message["class_info"] = [{"id": i, "name": name, "instance_count": 1} for i, name in enumerate(names, 1)]
    message["dataset_info"]["class_count"] = len(names)
    for instance in message["instance_info"]:
        instance["class_id"] = names.index(CLASSES[instance["class_id"] - 1]) + 1
    job.message.write_text(json.dumps(message))
    return job


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """What a training of squares and discs made."""
    job = make_job(tmp_path_factory.mktemp("parent"), max_num_iters=60, snap_shot_ivterval=60)
    job.out.mkdir()
    trained = train(job, lambda event: None, lambda: False, Ranks())
    assert trained is not None
    return trained


def test_the_weights_of_a_version_are_those_of_its_file(parent: Trained) -> None:
    """With the network and the classes; read without running anything."""
    assert parent.weights is not None
    document = torch.load(parent.weights, weights_only=True)
    assert (document["net_model"], document["class_names"]) == ("MobileNet", list(CLASSES))
    network = mobilenet_v2_ssd(len(CLASSES), 224)
    network.load_state_dict(document["state"])


def test_a_training_begins_with_the_weights_of_a_version(parent: Trained, tmp_path: Path) -> None:
    """With another class list, in another order: the first loss is far below that of a fresh
    start, and the rows of known classes are the parent's; the result says from where they are."""
    names = ["ring", "disc", "square"]
    # A rate of nothing, so that what the first step leaves is what it began with.
    changes = {"inital_learning_rate": 1e-12, "batch_size": 6}
    _, plain, _ = first_step(with_classes(make_job(tmp_path / "plain", **changes), names))
    job = make_job(tmp_path / "fine", model_name="cells:3", start_from=parent.weights, **changes)
    origin, loss, new = first_step(with_classes(job, names))
    assert origin == "cells:3 (2 of 3 classes carried over)"
    assert loss < 0.8 * plain
    assert parent.weights is not None
    old = torch.load(parent.weights, weights_only=True)["state"]
    for level in range(7):
        for part in ("weight", "bias"):
            name = f"head.classification_head.module_list.{level}.1.{part}"
            ours, theirs = new[name].unflatten(0, (6, 4)), old[name].unflatten(0, (6, 3))
            # background, disc, square
            torch.testing.assert_close(ours[:, [0, 2, 3]], theirs[:, [0, 2, 1]], rtol=0, atol=1e-6)
            if part == "weight":
                assert not torch.isclose(ours[:, 1], theirs[:, 1]).all()
    others = [name for name in new if name.endswith((".weight", ".bias")) and new[name].shape == old[name].shape]
    assert len(others) > 200
    for name in others:
        torch.testing.assert_close(new[name], old[name], rtol=0, atol=1e-6)


def spoil(path: Path, **changes: object) -> None:
    torch.save(torch.load(path, weights_only=True) | changes, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"no weights"), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "cannot be read"),
        (lambda path: torch.save({"a": path}, path), "cannot be read"),
        (lambda path: torch.save([1], path), "have not the format 1"),
        (lambda path: spoil(path, format=2), "have not the format 1"),
        (lambda path: spoil(path, class_names=[1]), "are not whole"),
        (lambda path: spoil(path, state={"a": 1}), "are not whole"),
        (lambda path: spoil(path, net_model="Other"), "are of the network 'Other'; this training is of 'MobileNet'"),
        (lambda path: spoil(path, state={"a": torch.zeros(1)}), "no parameter of 'cells:3' fits"),
    ],
)
def test_a_file_that_is_none_of_weights_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    """As an error of the data, which ends the task: never a silent start from something else."""
    path = tmp_path / "weights.pt"
    build = lambda classes: nn.Linear(2, classes)  # noqa: E731
    write_weights(path, "MobileNet", ["square"], build(1).state_dict())
    assert begin_with(path, "cells:3", build(1), "MobileNet", ["disc"], build) == (
        "cells:3 (0 of 1 classes carried over)"
    )
    damage(path)
    with pytest.raises(DataError, match=message):
        begin_with(path, "cells:3", build(1), "MobileNet", ["square"], build)


def test_what_began_anew_is_told(tmp_path: Path) -> None:
    """Tensors that do not fit are counted in the words of the result."""
    path = tmp_path / "weights.pt"
    build = lambda classes: nn.Sequential(nn.Linear(2, 3), nn.Linear(3, classes))  # noqa: E731
    other = nn.Sequential(nn.Linear(2, 3), nn.Linear(4, 1))
    write_weights(path, "MobileNet", ["square"], other.state_dict())
    assert begin_with(path, "cells:3", build(1), "MobileNet", ["square"], build) == (
        "cells:3 (1 of 1 classes carried over; 1 of 4 tensors did not fit and begin anew)"
    )
