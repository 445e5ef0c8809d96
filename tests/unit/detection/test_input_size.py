"""How large the input of a network is made, from the labels."""

from typing import Any

import pytest
from drawn import message

from handlers.detection.input_size import suited_size
from schemas.enums import ModelScopeClass
from schemas.message import RequestMessage

NAMED = 320


def _message(*sides: float, image: int = 640, split: str = "train", **changes: Any) -> RequestMessage:
    """An image of ten objects for each of `sides`, every side a class of its own."""
    document = message([split], [[(1 + index % 2, [1.0, 1.0, side, side]) for index, side in enumerate(sides)] * 10])
    document["image_info"][0] |= {"width": image, "height": image}
    for instance in document["instance_info"]:
        instance.update(changes)
    return RequestMessage.model_validate(document)


def size_of(message: RequestMessage, scope: ModelScopeClass = ModelScopeClass.NORMAL) -> int:
    return suited_size(NAMED, scope, message)


@pytest.mark.parametrize(
    ("sides", "size"),
    [
        ((64.0,), 320),  # 32 pixels of the input, as wanted
        ((300.0,), 320),  # never below what is named
        ((40.0,), 512),  # 32 of 512 is as 40 of 640
        ((41.0,), 512),  # in whole steps, upwards
        ((35.0,), 608),
        ((80.0, 40.0), 352),  # the class in the middle decides; of two, what is between them
        ((4.0,), 640),  # twice what is named, at most
    ],
)
def test_small_objects_get_a_larger_input(sides: tuple[float, ...], size: int) -> None:
    """Such that they are 32 pixels of it."""
    assert size_of(_message(*sides)) == size


def test_no_more_than_the_images_have() -> None:
    """Enlarging shows nothing new."""
    assert size_of(_message(4.0, image=400)) == 416
    assert size_of(_message(4.0, image=100)) == NAMED


def test_one_large_image_does_not_make_all_others_large() -> None:
    """What there is to see is what the image in the middle has."""
    few = _message(4.0, image=200)
    sizes = [few.image_info[0].model_copy(update={"id": number}) for number in (2, 3)]
    sizes.append(sizes[0].model_copy(update={"id": 4, "width": 4000, "height": 3000}))
    assert size_of(few.model_copy(update={"image_info": (*few.image_info, *sizes)})) == NAMED


def test_what_tells_nothing_does_not_count() -> None:
    """Crowds, images to test on, images of unknown size, fewer than ten objects, and no object at all."""
    assert size_of(_message(4.0, iscrowd=1)) == NAMED
    assert size_of(_message(4.0, split="test")) == NAMED
    unknown = _message(4.0)
    image = unknown.image_info[0].model_copy(update={"width": 0, "height": 0})
    assert size_of(unknown.model_copy(update={"image_info": (image,)})) == NAMED
    assert size_of(unknown.model_copy(update={"instance_info": unknown.instance_info[:9]})) == NAMED
    assert size_of(unknown.model_copy(update={"instance_info": ()})) == NAMED


def test_a_box_counts_as_far_as_it_is_in_the_image() -> None:
    """Labels may say anything."""
    assert size_of(_message(1e9)) == NAMED
    assert size_of(_message(1e-9)) == 640


def test_who_wants_it_small_gets_it_small() -> None:
    """Speed before all."""
    assert size_of(_message(4.0), ModelScopeClass.SMALL) == NAMED
    assert size_of(_message(4.0), ModelScopeClass.LARGE) == 2 * NAMED
