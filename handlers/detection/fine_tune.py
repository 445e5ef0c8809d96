"""Weights that a version keeps beside its ONNX file, and how a training begins with those of another.

A network has parameters of two kinds: those whose shape hangs on the number of classes, which are the last layers of
its classification head, and all others. The others are taken over as they are. Of the first kind are the rows of the
classes that both trainings know by name, wherever in either list they stand; a class that is new begins as the network
was built.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handlers.detection.errors import DataError

_FORMAT = 1

State = Mapping[str, Tensor]
#: Makes a network for this number of classes.
Build = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Rows:
    """The rows of a tensor that hangs on the classes: `groups` (an anchor each) of `common` (background) + classes."""

    groups: int
    common: int


@dataclass(frozen=True)
class CarriedOver:
    """What became of the weights that a training was to begin with."""

    #: For the new network, whole.
    state: dict[str, Tensor]
    #: The names of classes that were known already, in their new order.
    classes: tuple[str, ...]
    #: The names of tensors that begin as they were built, since nothing of them fits.
    fresh: tuple[str, ...]


def write_weights(path: Path, net_model: str, class_names: Sequence[str], state: State) -> None:
    """Write the state of a network, with what it takes to know which rows are whose."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    document = {"format": _FORMAT, "net_model": net_model, "class_names": list(class_names), "state": tensors}
    torch.save(document, path)


def begin_with(
    path: Path, reference: str, network: nn.Module, net_model: str, class_names: Sequence[str], build: Build
) -> str:
    """Load the weights in `path`, those of the version `reference`, into `network` as far as they fit.

    `build` makes such a network for a number of classes. Returns where the weights came from, for people. Raises
    DataError for a file that is none of weights, or of another network's.
    """
    old_classes, old = _read_weights(path, reference, net_model)
    built = network.state_dict()
    rows = class_rows(built, build(len(class_names) + 1).state_dict(), len(class_names))
    carried = carry_over(built, old, old_classes, class_names, rows)
    if len(carried.fresh) == len(built):
        raise DataError(f"no parameter of {reference!r} fits the network {net_model}", "model_name")
    network.load_state_dict(carried.state)
    text = f"{reference} ({len(carried.classes)} of {len(class_names)} classes carried over"
    if carried.fresh:
        text += f"; {len(carried.fresh)} of {len(built)} tensors did not fit and begin anew"
    return text + ")"


def class_rows(state: State, one_more: State, class_count: int) -> dict[str, Rows]:
    """Which tensors of a network for `class_count` classes hang on the classes, and how their rows lie.

    Told by holding `state` against `one_more`, the state of the same network with one class more. No rule of names or
    of sizes would do: a layer of 24 rows may be one of six anchors with background and three classes, or just a layer.
    """
    found = {}
    for name, tensor in state.items():
        larger = one_more[name]
        if tensor.shape != larger.shape:
            groups = len(larger) - len(tensor)
            found[name] = Rows(groups, len(tensor) // groups - class_count)
    return found


def carry_over(
    new: State, old: State, old_classes: Sequence[str], new_classes: Sequence[str], rows: Mapping[str, Rows]
) -> CarriedOver:
    """The state `new` of a network as it was built, with all that `old` knows of it.

    `rows` describes the tensors of `new` that hang on the classes. Their first dimension is
    groups x (common + classes), in this order: the rows of an anchor lie together.
    """
    state, fresh = {}, []
    shared = [name for name in new_classes if name in set(old_classes)]
    for name, built in new.items():
        known = old.get(name)
        if known is not None and name in rows:
            known = _mixed(built, known, old_classes, new_classes, rows[name])
        if known is None or known.shape != built.shape:
            known = built
            fresh.append(name)
        state[name] = known.to(built.dtype)
    return CarriedOver(state, tuple(shared), tuple(fresh))


def _mixed(
    built: Tensor, known: Tensor, old_classes: Sequence[str], new_classes: Sequence[str], rows: Rows
) -> Tensor | None:
    """`built` with the rows of what is common, and of the classes of both, from `known`; None if that does not fit."""
    if (
        known.dim() != built.dim()
        or len(known) != rows.groups * (rows.common + len(old_classes))
        or known.shape[1:] != built.shape[1:]
    ):
        return None
    old_place = {name: rows.common + index for index, name in enumerate(old_classes)}
    pairs = [(row, row) for row in range(rows.common)]
    pairs += [(rows.common + index, old_place[name]) for index, name in enumerate(new_classes) if name in old_place]
    mixed = built.clone()
    if pairs:
        ours, theirs = map(list, zip(*pairs, strict=True))
        by_group = mixed.view(rows.groups, -1, *built.shape[1:])
        by_group[:, ours] = known.to(built.dtype).view(rows.groups, -1, *built.shape[1:])[:, theirs]
    return mixed


def _read_weights(path: Path, reference: str, net_model: str) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    try:
        # weights_only: the file comes back from a database, and unpickling runs code.
        document: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damage shows in many ways: zip, pickle, end of file, …
        raise DataError(f"the weights of {reference!r} cannot be read: {str(error)[:200]}", "model_name") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise DataError(f"the weights of {reference!r} have not the format {_FORMAT}", "model_name")
    classes, state = document.get("class_names"), document.get("state")
    if (
        not isinstance(classes, list)
        or not isinstance(state, dict)
        or not all(isinstance(name, str) for name in classes)
        or not all(isinstance(tensor, Tensor) for tensor in state.values())
    ):
        raise DataError(f"the weights of {reference!r} are not whole", "model_name")
    if document.get("net_model") != net_model:
        raise DataError(
            f"the weights of {reference!r} are of the network {document.get('net_model')!r:.100}; "
            f"this training is of {net_model!r}",
            "net_model",
        )
    return tuple(classes), state
