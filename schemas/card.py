"""The card of a model, `DL_MODEL.card`: what a version was made of, and how.

What the version's document says already (network, scope, classes, metrics, fingerprint, …) is not said twice. Every
field is bounded, so that the whole is below `MAX_CARD_BYTES` as BSON.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from schemas.message import MAX_CLASSES
from schemas.numbers import Count

MAX_CARD_BYTES = 120_000

Name = Annotated[str, Field(max_length=200)]


class TrainingFacts(BaseModel):
    """What only the child knows of a training."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    #: As the request message has them: empty where images were given by id, or no split was asked for.
    dataset: Name
    split: Name
    #: Images that could be used.
    train_images: Count
    val_images: Count
    #: Labelled boxes of each class in the training images, in the order of `class_names`; crowds are not counted.
    boxes: tuple[Count, ...] = Field(max_length=MAX_CLASSES)
    #: Images in a step over all devices, as it was: more than was asked for if there were more devices.
    batch_size: Count
    seed: Count
    #: Optimiser, schedule, averaging, what is done to every image, and patience, in words.
    recipe: str = Field(max_length=1000)
    #: Of Python, the libraries and dltask, by name.
    versions: dict[Annotated[str, Field(pattern="^[a-z][a-z0-9_]{0,39}$")], Name] = Field(max_length=20)


class Card(TrainingFacts):
    """The whole card."""

    images_skipped: Count
    #: `param_request` as it was applied, defaults included.
    parameters: dict[str, Any]
    initial_weights: str
    iterations: Count
    best_iteration: Count
    device: str
    #: What the last attempt took.
    seconds: float = Field(ge=0)
