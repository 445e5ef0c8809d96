"""Snapshots: everything a training needs to go on as if it had not been interrupted.

There is no random state in them but the seed: what is random about iteration i follows from (seed, i), see
`handlers.detection.batches`, and the network itself draws nothing.
"""

import hashlib
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handlers.detection.errors import SnapshotError

_FORMAT = 1


@dataclass(frozen=True)
class Identity:
    """Which training a snapshot belongs to. The batch size is not in it: running out of memory may change it."""

    net_model: str
    input_size: int
    class_names: tuple[str, ...]
    data_fingerprint: str
    max_num_iters: int
    #: The version whose weights it began with, `name:version`; None where it began with the network's own.
    start_from: str | None = None


@dataclass
class Best:
    """The averaged weights with the highest mAP on the validation images so far."""

    iteration: int
    map: float
    weights: dict[str, Tensor]


@dataclass
class TrainingState:
    """What a snapshot holds. Tensors are on the CPU or on the device, as they come."""

    #: Iterations done.
    iteration: int
    seed: int
    initial_weights: str
    network: dict[str, Tensor]
    #: Averaged weights.
    average: dict[str, Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    best: Best | None = None
    #: Images trained on since the last validation.
    unvalidated: int = 0
    #: (iteration, values) of every measurement so far.
    measurements: list[tuple[int, dict[str, float]]] = field(default_factory=list)


def write_snapshot(path: Path, identity: Identity, state: TrainingState) -> str:
    """Write `state` to `path`, whole or not at all; returns the sha256 of the file, hex."""
    best = vars(state.best) if state.best is not None else None
    document = {"format": _FORMAT, "identity": asdict(identity), "state": vars(state) | {"best": best}}
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(document, file)
        file.flush()
        os.fsync(file.fileno())
    with partial.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    partial.rename(path)
    return sha256


def read_snapshot(path: Path, identity: Identity) -> TrainingState:
    """The state in `path`, on the CPU. Raises SnapshotError if it cannot be read or is another training's."""
    try:
        # weights_only: a snapshot comes back from a database, and unpickling runs code.
        document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damage shows in many ways: zip, pickle, end of file, …
        raise SnapshotError(f"the snapshot {path.name} cannot be read: {str(error)[:200]}") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise SnapshotError(f"the snapshot {path.name} has not the format {_FORMAT}")
    try:
        for key, wanted in asdict(identity).items():
            # Release 0.1.0 knew no other beginning than the network's own, and wrote none.
            found = document["identity"][key] if key != "start_from" else document["identity"].get(key)
            if found != wanted:
                raise SnapshotError(
                    f"the snapshot {path.name} has {key} {found!r:.200}; this training has {wanted!r:.200}"
                )
        best = document["state"]["best"]
        return TrainingState(**{**document["state"], "best": None if best is None else Best(**best)})
    except (KeyError, TypeError) as error:
        raise SnapshotError(f"the snapshot {path.name} is not whole: {str(error)[:200]}") from error
