"""The deep-learning parameters of a request: `ParamClass`, and how a raw document's parameters are checked."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from schemas.enums import DeviceClass, ExpansionDataClass, ModelScopeClass, member
from schemas.numbers import UINT16_MAX, UINT32_MAX, UINT64_MAX, bson_uint64, whole_number

#: Correct spellings that are read as the published, misspelled ones.
PARAM_ALIASES = {
    "initial_learning_rate": "inital_learning_rate",
    "snap_shot_interval": "snap_shot_ivterval",
    "dataset_expansion_list": "dataset_expansion_lst",
}

#: A model's name is printed in terminals, pages and file names: letters, digits and a little punctuation.
#: The colon is left out because `name:version` names one version.
MODEL_NAME = re.compile(r"\w(?:[\w .+@()-]{0,126}[\w)+])?")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a number")
    return float(value)


Count16 = Annotated[int, BeforeValidator(whole_number), Field(ge=1, le=UINT16_MAX)]
Count32 = Annotated[int, BeforeValidator(whole_number), Field(ge=1, le=UINT32_MAX)]
Count64 = Annotated[int, BeforeValidator(whole_number), Field(ge=1, le=UINT64_MAX)]


@dataclass
class ParamClass:
    """The parameters of one training or test, by keyword or in this order by position.

    A plain class: any value can be assigned, and nothing is checked until the request is sent
    (`TaskProcess.task_start_request`) or a worker admits the document; both call `check_params`.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    #: TRAIN: the name under which the next version is registered; `name:version` begins with the weights of that one.
    #: TEST: `name` (newest version) or `name:version`.
    model_name: Annotated[str, Field(max_length=160)] = ""
    #: Each operation is applied to a training image with probability one half.
    dataset_expansion_lst: Annotated[
        list[Annotated[ExpansionDataClass, BeforeValidator(lambda v: member(ExpansionDataClass, v))]],
        Field(max_length=100),
    ] = field(default_factory=list)
    #: The network, by name; see `schemas.networks`.
    net_model: Annotated[str, Field(max_length=160)] = "MobileNet"
    model_scope: Annotated[ModelScopeClass, BeforeValidator(lambda v: member(ModelScopeClass, v))] = (
        ModelScopeClass.NORMAL
    )
    device_type: Annotated[DeviceClass, BeforeValidator(lambda v: member(DeviceClass, v))] = DeviceClass.GPU
    #: The initial rate of a one-cycle schedule whose peak is 25 times as high, for the larger networks 10 times.
    inital_learning_rate: Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)] = 0.001
    #: Devices (one process each) that share every batch.
    device_num: Count16 = 1
    #: Optimiser steps; one step sees `batch_size` images over all devices.
    max_num_iters: Count64 = 50_000
    batch_size: Count32 = 10
    #: Steps between two saved snapshots; a last one is saved at the end.
    snap_shot_ivterval: Count64 = 10_000


#: More than there are, with every alias beside its name.
_MOST_PARAMS = 100

_ADAPTER = TypeAdapter(ParamClass)


class ParamError(ValueError):
    """A parameter that cannot be accepted. `field` is its full name in the task document."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def shown(value: Any) -> str:
    """`value` for an error message: its repr, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_params(raw: Any) -> ParamClass:
    """The checked parameters of a raw `param_request` (None is all defaults).

    Raises ParamError for the first that is unknown, missing or out of range; names, value and expectation in the
    message. Whether the network and the model exist is not looked at here.
    """
    if raw is None:
        raw = {}
    if isinstance(raw, ParamClass):
        # vars, not asdict: an attribute somebody added by a slip of the pen must be found, not ignored.
        raw = vars(raw)
    if not isinstance(raw, Mapping):
        raise ParamError("param_request", f"param_request is {shown(raw)}; expected a document of parameters")
    if len(raw) > _MOST_PARAMS:
        # Each that is none would be an error of its own: of half a million, naming the first takes a minute.
        raise ParamError("param_request", f"param_request has {len(raw)} members; expected at most {_MOST_PARAMS}")
    named: dict[str, Any] = {}
    for key, value in raw.items():
        name = PARAM_ALIASES.get(str(key), str(key))
        if name in named:
            raise ParamError(f"param_request.{name}", f"param_request.{name} is given in both of its spellings")
        named[name] = value
    try:
        return _ADAPTER.validate_python(named)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            known = ", ".join(ParamClass.__dataclass_fields__)
            message = f"param_request.{place} is not a parameter; expected one of {known}"
        else:
            expected = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
            message = f"param_request.{place} is {shown(first['input'])}; {expected}"
        raise ParamError(f"param_request.{place}"[:200], message[:500]) from None


def stored_params(params: ParamClass) -> dict[str, Any]:
    """`params` as written into documents and messages: enumerations by name, 64-bit numbers as MongoDB holds them."""
    document = asdict(params)
    document["dataset_expansion_lst"] = [operation.name for operation in params.dataset_expansion_lst]
    document["model_scope"] = params.model_scope.name
    document["device_type"] = params.device_type.name
    for name in ("max_num_iters", "snap_shot_ivterval"):
        document[name] = bson_uint64(document[name])
    return document


def split_model_name(text: str) -> tuple[str, int | None]:
    """`name` or `name:version` as (name, version or None for the newest). Raises ValueError."""
    name, colon, version = text.partition(":")
    if not MODEL_NAME.fullmatch(name):
        raise ValueError("expected 1 to 128 letters, digits, spaces or . _ + @ ( ) -, beginning with a letter or digit")
    if not colon:
        return name, None
    if not version.isascii() or not version.isdigit() or not 1 <= len(version) <= 9 or int(version) < 1:
        raise ValueError("expected a version number from 1 after the colon")
    return name, int(version)
