"""The enumerations of the published interface. Members arrive in documents as names or as values."""

from enum import IntEnum
from typing import Any, TypeVar

from schemas.numbers import whole_number

E = TypeVar("E", bound=IntEnum)


class TaskErrorCode(IntEnum):
    """Why a task was not accepted; 0 is normal. When several things are wrong, see `PRECEDENCE`."""

    OK = 0
    TASK_TYPE_ERROR = 1
    JASON_MONGOID_INVALID = 2
    IMAG_MONGOID_INVALID = 3
    TASK_ID_INVALID = 4
    COLLECTIONS_EMPTY = 5
    TASK_TEST_NOT_OVER = 6
    PARAM_INVALID = 7
    MODEL_INVALID = 8


class TaskTypeClass(IntEnum):
    """What a task asks for."""

    TRAIN = 0
    TEST = 1


class ModelScopeClass(IntEnum):
    """The scale of the network: input size and width."""

    SMALL = 0
    NORMAL = 1
    LARGE = 2


class DeviceClass(IntEnum):
    """The kind of device a task runs on."""

    CPU = 0
    GPU = 1


class ExpansionDataClass(IntEnum):
    """A data-expansion (augmentation) operation, applied at random to training images only.

    The first group (0 to 19) moves boxes with the pixels, the second (from 20) leaves boxes as they are. Ranges and
    pictures: docs/training.md.
    """

    HOR_FLIPE = 0
    VER_FLIPE = 1
    ROTATE_90 = 2
    ROTATE_180 = 3
    ROTATE_270 = 4
    RANDOM_CROP = 5
    ZOOM_OUT = 6
    TRANSLATE = 7
    SCALE = 8
    ROTATE_SMALL = 9

    BRIGHTNESS = 20
    CONTRAST = 21
    SATURATION = 22
    HUE = 23
    GRAYSCALE = 24
    GAUSSIAN_BLUR = 25
    GAUSSIAN_NOISE = 26
    JPEG_COMPRESSION = 27
    GAMMA = 28
    CLAHE = 29
    MOTION_BLUR = 30
    UNEVEN_LIGHT = 31


class TaskStatus(IntEnum):
    """The states of a task document, stored by name; absent until a worker has admitted or rejected it."""

    PENDING = 0
    RUNNING = 1
    SUCCEEDED = 2
    FAILED = 3
    CANCELLED = 4
    REJECTED = 5


#: A task in one of these states never changes again.
END_STATES = (TaskStatus.SUCCEEDED, TaskStatus.FAILED, TaskStatus.CANCELLED, TaskStatus.REJECTED)

#: Correct spellings that are read as the published, misspelled ones.
MEMBER_ALIASES = {"HOR_FLIP": "HOR_FLIPE", "VER_FLIP": "VER_FLIPE"}


def member(enum: type[E], value: Any) -> E:
    """The member of `enum` that `value` names: a member, its name, or its value (`1.0` is 1).

    Raises ValueError that lists the members.
    """
    if isinstance(value, enum):
        return value
    try:
        if isinstance(value, str):
            # BSON's JavaScript code is a text that cannot be looked up as it is.
            name = str(value)
            return enum[MEMBER_ALIASES.get(name, name)]
        return enum(whole_number(value))
    except (KeyError, ValueError):
        expected = ", ".join(f"{m.name} ({m.value})" for m in enum)
        raise ValueError(f"expected one of {expected}") from None
