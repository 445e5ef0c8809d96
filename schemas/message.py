"""The request message: the frozen data that one task trains or tests on, and its COCO form.

Ids in a message are small integers from 1, counted in the order of the lists; the MongoDB ids stand beside them as
`mongodb_id` (24 hex digits). A message is stored as JSON in the GridFS bucket `messages`.
"""

import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.numbers import INT64_MAX

Split = Literal["train", "val", "test"]

SCHEMA_VERSION = 1

#: Bounds of what a task's result repeats of its data, so that it fits into the task's document.
MAX_CLASSES = 5000
MAX_CLASS_NAME = 200

#: With fewer training images than this, no validation images are set apart.
MIN_IMAGES_FOR_VALIDATION = 20


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


#: A small number that stands for an id in the message.
MessageId = Annotated[int, Field(ge=1, le=INT64_MAX)]


class SkippedLabels(_Frozen):
    """Labels left out of a message because no box can be made of them."""

    count: int = Field(0, ge=0)
    #: At most ten.
    examples: tuple[dict[str, str], ...] = ()


class DatasetInfo(_Frozen):
    """Which data this is, and how much of it."""

    task_id: str
    task_type: Literal["TRAIN", "TEST"]
    #: The data set's name, or empty where images were given by id.
    dataset: str = ""
    #: UTC, ISO 8601.
    created: str
    image_count: int = Field(ge=0)
    instance_count: int = Field(ge=0)
    class_count: int = Field(ge=0)
    split: str = ""
    #: sha256 over images, labels and splits; equal data has an equal fingerprint, whatever the task.
    fingerprint: str
    schema_version: int = SCHEMA_VERSION
    skipped_labels: SkippedLabels = SkippedLabels()


#: Pixels. Larger numbers are no image's, and do not fit where they are reckoned with.
MAX_SIDE = 1_000_000


class ImageInfo(_Frozen):
    """One image. `width` and `height` are in pixels as recorded in IMG_INFO; 0 is unknown."""

    id: MessageId
    file_name: str
    width: int = Field(ge=0, le=MAX_SIDE)
    height: int = Field(ge=0, le=MAX_SIDE)
    split: Split
    mongodb_id: str


class InstanceInfo(_Frozen):
    """One labelled box `[x, y, w, h]`: pixels from the image's upper left corner, w and h above 0.

    A box may reach outside its image; the data path clips it.
    """

    id: MessageId
    image_id: MessageId
    class_id: MessageId
    bbox: tuple[float, float, float, float]
    area: float = Field(gt=0)
    iscrowd: Literal[0, 1] = 0
    difficult: Literal[0, 1] = 0
    mongodb_id: str


class ClassInfo(_Frozen):
    """One class; `id` is its position in `class_info` from 1."""

    id: MessageId
    name: str = Field(max_length=MAX_CLASS_NAME)
    instance_count: int = Field(ge=0)


class RequestMessage(_Frozen):
    """A whole message, in the order in which it is built."""

    dataset_info: DatasetInfo
    image_info: tuple[ImageInfo, ...]
    instance_info: tuple[InstanceInfo, ...]
    class_info: tuple[ClassInfo, ...] = Field(max_length=MAX_CLASSES)


def to_coco(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message (as parsed JSON) as a COCO detection document; `from_coco` is its exact inverse."""
    return {
        "info": message["dataset_info"],
        "images": message["image_info"],
        "annotations": [
            {"category_id" if key == "class_id" else key: value for key, value in instance.items()}
            for instance in message["instance_info"]
        ],
        "categories": message["class_info"],
    }


def from_coco(coco: Mapping[str, Any]) -> dict[str, Any]:
    """The message of which `coco` is the COCO form."""
    return {
        "dataset_info": coco["info"],
        "image_info": coco["images"],
        "instance_info": [
            {"class_id" if key == "category_id" else key: value for key, value in annotation.items()}
            for annotation in coco["annotations"]
        ],
        "class_info": coco["categories"],
    }


def strata(images: Sequence[tuple[int, Collection[int]]]) -> list[tuple[int, int]]:
    """(image id, stratum) for each (image id, classes of its boxes): the rarest of its classes, 0 without any.

    The rarest, so that rare classes are validated too: they are in few images, and seldom alone there.
    """
    counts = Counter(class_id for _, classes in images for class_id in classes)
    return [(image_id, min(classes, key=lambda c: (counts[c], c), default=0)) for image_id, classes in images]


def choose_validation(image_strata: Iterable[tuple[int, int]], seed: int = 0) -> frozenset[int]:
    """A seeded, stratified tenth of the images, for validation; none where there are fewer than 20.

    `image_strata` is (image id, stratum) for each image, see `strata`. Every stratum of at least five images gives at
    least one. The same input gives the same choice.
    """
    groups: dict[int, list[int]] = {}
    for image_id, stratum in image_strata:
        groups.setdefault(stratum, []).append(image_id)
    if sum(map(len, groups.values())) < MIN_IMAGES_FOR_VALIDATION:
        return frozenset()
    chosen: set[int] = set()
    for stratum in sorted(groups):
        images = sorted(groups[stratum])
        random.Random(f"{seed}/{stratum}").shuffle(images)
        count = max(round(len(images) / 10), 1 if len(images) >= 5 else 0)
        chosen.update(images[:count])
    return frozenset(chosen)
