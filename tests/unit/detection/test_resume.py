"""A training that was interrupted ends as if it had not been: bit for bit on the CPU, from a snapshot that is whole."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import make_job

from handlers.detection.errors import SnapshotError, StoppedEarly
from handlers.detection.job import Event, Job, Note, Snapshot, Started
from handlers.detection.ranks import Ranks
from handlers.detection.train import train
from schemas.enums import ExpansionDataClass


def run_until(job: Job, iteration: int) -> list[Event]:
    """Train up to `iteration`, as a SIGTERM during it would; the events."""
    events: list[Event] = []
    asked = 0
    job.out.mkdir(exist_ok=True)

    def stopping() -> bool:
        # Asked once before the first iteration and once after each.
        nonlocal asked
        asked += 1
        return asked > iteration

    with pytest.raises(StoppedEarly):
        train(job, events.append, stopping, Ranks())
    return events


def last_snapshot(events: list[Event]) -> Snapshot:
    return [event for event in events if isinstance(event, Snapshot)][-1]


def assert_equal(one: Any, other: Any, place: str = "snapshot") -> None:
    """Every tensor and number, however deep."""
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_equal(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_equal(left, right, f"{place}.{index}")
    else:
        assert one == other, place


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """As on any machine with two cores, also where other tests run beside (see tests/conftest.py)."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch_size", [4, 1])
def test_resumed_equals_uninterrupted(tmp_path: Path, batch_size: int) -> None:
    """Weights, average, optimiser, schedule, best so far and measurements are equal at the last iteration.

    With every data expansion on; and with single images, for which batch normalisation is frozen.
    """
    everything = [operation.name for operation in ExpansionDataClass]
    make: Callable[..., Job] = lambda name, **more: make_job(  # noqa: E731
        tmp_path / name,
        dataset_expansion_lst=everything,
        batch_size=batch_size,
        max_num_iters=6,
        snap_shot_ivterval=3,
        **more,
    )
    whole = last_snapshot(run_until(make("whole"), 6))
    half = last_snapshot(run_until(make("half"), 3))
    events = run_until(make("half", resume_from=half.path), 3)
    assert next(event for event in events if isinstance(event, Started)).iteration == 3
    rest = last_snapshot(events)
    assert (half.iteration, rest.iteration, whole.iteration) == (3, 6, 6)
    expected = torch.load(whole.path, weights_only=True)
    # Measured losses are means since the last one, so a resumed run may measure once more.
    assert expected["state"]["best"] is not None
    assert_equal(torch.load(rest.path, weights_only=True), expected)


def test_a_resumed_fine_tuning_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """So it does when it began with the weights of another version; those are not needed any more, and of another
    beginning no snapshot is taken."""
    first = make_job(tmp_path / "first", max_num_iters=2)
    first.out.mkdir()
    trained = train(first, lambda event: None, lambda: False, Ranks())
    assert trained is not None
    make: Callable[..., Job] = lambda name, **more: make_job(  # noqa: E731
        tmp_path / name, model_name="cells:3", batch_size=1, max_num_iters=4, snap_shot_ivterval=2, **more
    )
    whole = last_snapshot(run_until(make("whole", start_from=trained.weights), 4))
    half = last_snapshot(run_until(make("half", start_from=trained.weights), 2))
    events = run_until(make("half", resume_from=half.path), 2)
    started = next(event for event in events if isinstance(event, Started))
    assert (started.iteration, started.initial_weights) == (2, "cells:3 (2 of 2 classes carried over)")
    assert_equal(torch.load(last_snapshot(events).path, weights_only=True), torch.load(whole.path, weights_only=True))
    other = make_job(tmp_path / "half", model_name="cells", max_num_iters=4, resume_from=half.path)
    with pytest.raises(SnapshotError, match="has start_from 'cells:3'; this training has None"):
        train(other, lambda event: None, lambda: True, Ranks())


def test_patience_ends_a_training_early(tmp_path: Path) -> None:
    """Once mAP has not been better for that long, counted from the first of equals; the rest is as at any end.

    One that is resumed from the snapshot of that very iteration ends there too, with the same weights.
    """
    # A rate with which nothing is learnt: mAP is the same at each of the ten looks.
    job = make_job(tmp_path, max_num_iters=20, snap_shot_ivterval=20, inital_learning_rate=1e-12)
    job = job.model_copy(update={"patience": 3})
    job.out.mkdir()
    events: list[Event] = []
    trained = train(job, events.append, lambda: False, Ranks())
    assert trained is not None
    # Looks at iterations 2, 4 and 6: from 2 to 6 are more than three, from 2 to 4 are not.
    assert (trained.iterations, last_snapshot(events).iteration) == (6, 6)
    said = "ended at iteration 6 of 20: mAP on the validation images has not been better for 3 iterations (patience)"
    assert said in [event.message for event in events if isinstance(event, Note)]
    assert trained.card is not None
    assert trained.card.recipe.endswith("To end early once 3 iterations bring no better mAP.")
    weights = torch.load(trained.weights, weights_only=True)

    resumed = train(
        job.model_copy(update={"resume_from": last_snapshot(events).path}), events.append, lambda: False, Ranks()
    )
    assert resumed is not None
    assert (resumed.iterations, resumed.resumed_from_iteration) == (6, 6)
    assert_equal(torch.load(resumed.weights, weights_only=True), weights)


def test_a_snapshot_of_the_first_release_is_read(tmp_path: Path, whole: Path) -> None:
    """Its identity has no `start_from`."""
    document = torch.load(whole, weights_only=True)
    del document["identity"]["start_from"]
    torch.save(document, tmp_path / "old.pt")
    job = make_job(tmp_path, max_num_iters=9, resume_from=tmp_path / "old.pt")
    with pytest.raises(StoppedEarly, match="iteration 1"):
        train(job, lambda event: None, lambda: True, Ranks())


def test_a_stop_is_snapshot_at_once(tmp_path: Path) -> None:
    """Between two intervals too; nothing half written is left beside it."""
    job = make_job(tmp_path, max_num_iters=9, snap_shot_ivterval=5)
    events = run_until(job, 2)
    assert last_snapshot(events).iteration == 2
    assert [path.name for path in job.out.iterdir()] == ["snapshot-000000002.pt"]


def test_a_damaged_snapshot_is_refused(tmp_path: Path) -> None:
    """Cut short, or not a snapshot at all: a snapshot error, not a crash, and no code of it runs."""
    job = make_job(tmp_path, max_num_iters=9)
    path = last_snapshot(run_until(job, 1)).path
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(SnapshotError, match="cannot be read"):
        train(job.model_copy(update={"resume_from": path}), lambda event: None, lambda: True, Ranks())
    torch.save({"anything": Path("x")}, path)
    with pytest.raises(SnapshotError, match="cannot be read"):
        train(job.model_copy(update={"resume_from": path}), lambda event: None, lambda: True, Ranks())


def test_a_snapshot_of_another_training_is_refused(tmp_path: Path) -> None:
    """The message names what differs."""
    path = last_snapshot(run_until(make_job(tmp_path, max_num_iters=9), 1)).path
    other = make_job(tmp_path, max_num_iters=8, resume_from=path)
    with pytest.raises(SnapshotError, match="has max_num_iters 9; this training has 8"):
        train(other, lambda event: None, lambda: True, Ranks())


class Payload:
    """Unpickled with everything allowed, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_planted_snapshot_does_not_run(tmp_path: Path) -> None:
    """Neither as torch writes it nor as a plain pickle, nor with the payload among whole weights."""
    job = make_job(tmp_path, max_num_iters=9)
    whole = torch.load(last_snapshot(run_until(job, 1)).path, weights_only=True)
    planted = tmp_path / "planted.pt"
    payload = Payload(tmp_path / "ran")
    among_weights = whole | {"state": whole["state"] | {"seed": payload}}
    writers: list[Callable[[], object]] = [
        lambda: torch.save(payload, planted),
        lambda: torch.save(among_weights, planted),
        lambda: torch.save(among_weights, planted, _use_new_zipfile_serialization=False),
        lambda: planted.write_bytes(pickle.dumps(payload)),
    ]
    for write in writers:
        write()
        with pytest.raises(SnapshotError, match="cannot be read"):
            train(job.model_copy(update={"resume_from": planted}), lambda event: None, lambda: True, Ranks())
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: document.pop("identity"),
        lambda document: document["identity"].pop("class_names"),
        lambda document: document.update(state=None),
        lambda document: document["state"].pop("optimizer"),
        lambda document: document["state"].update(more=1),
        lambda document: document["state"].update(best={"iteration": 1}),
        lambda document: document["state"].update(network=5),
        lambda document: document["state"]["network"].popitem(last=False),
    ],
)
def test_a_snapshot_with_parts_missing_is_refused(tmp_path: Path, whole: Path, damage: Callable[[Any], object]) -> None:
    """A snapshot error, so that the training starts over, and not a bug, which would end it."""
    document = torch.load(whole, weights_only=True)
    damage(document)
    torch.save(document, tmp_path / "damaged.pt")
    job = make_job(tmp_path, max_num_iters=9, resume_from=tmp_path / "damaged.pt")
    with pytest.raises(SnapshotError):
        train(job, lambda event: None, lambda: True, Ranks())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return last_snapshot(run_until(make_job(tmp_path_factory.mktemp("whole"), max_num_iters=9), 1)).path
