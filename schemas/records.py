"""The platform's records: images, labels, and the models that trainings leave."""

from datetime import datetime
from typing import Any

from bson import ObjectId
from pydantic import BaseModel, ConfigDict, Field

from schemas.version import SCHEMA_VERSION


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", arbitrary_types_allowed=True)


class ImageRecord(_Record):
    """IMG_INFO: one image. `width` and `height` in pixels of the image as it is labelled."""

    file_name: str
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    #: The image's bytes in GridFS `images`.
    file_id: ObjectId
    dataset: str | None = None
    split: str | None = None


class LabelRecord(_Record):
    """IMG_LAB_INFO: one labelled box, `[x, y, w, h]` in pixels."""

    img_id: ObjectId
    class_name: str
    bbox: tuple[float, float, float, float]
    #: Trained on, but neither a miss nor a mistake in a measurement (PASCAL VOC).
    difficult: bool = False
    #: The box covers many objects: not trained on, and as `difficult` in a measurement (COCO).
    crowd: bool = False


class ModelRecord(_Record):
    """DL_MODEL: one version of a named model. `task_id` is unique: one training makes one version."""

    model_name: str
    version: int
    task_id: int
    attempt: int
    net_model: str
    model_scope: str
    #: `class_names[i]` is class id i + 1 in the model's output.
    class_names: tuple[str, ...]
    #: Side of the square network input, pixels.
    input_size: int
    #: The ONNX file in GridFS `models`.
    file_id: ObjectId
    sha256: str
    #: What another training can begin with, in GridFS `models` too; None of a version that 0.1.0 made.
    weights_file_id: ObjectId | None = None
    weights_sha256: str | None = None
    #: `schemas.result.Metrics` of the file; with `per_class[].threshold`, the best score to cut each class at.
    metrics: dict[str, Any] | None = None
    data_fingerprint: str
    #: The version of the same name whose weights the training began with.
    parent_version: int | None = None
    #: `schemas.card.Card`; None of a version that 0.1.0 made.
    card: dict[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION
    create_time: datetime | None = None
