"""The side of the square that a network takes its images as: what the scope names, or more where objects are small."""

from collections import defaultdict
from statistics import median

from schemas.enums import ModelScopeClass
from schemas.message import RequestMessage

#: Side in pixels of the input that objects should have: COCO's border between small and medium objects.
_OBJECT_SIDE = 32
#: The input is at most this many times what the scope names: time and memory go by its square.
_MOST_TIMES = 2
#: A multiple of the stride of the level on which most channels are.
_STEP = 32
#: Objects of a class below which its median says little.
_FEWEST = 10


def suited_size(named: int, scope: ModelScopeClass, message: RequestMessage) -> int:
    """The side of the input for a training on `message`, in pixels; `named` is what the network has for `scope`.

    Who asks for SMALL wants speed before all, and gets what is named.

    As large as the median of the classes asks for, but no larger than the images are, where no more is to be seen. Not
    as the smallest class asks for: on blood cells with platelets between them that found platelets no better, and cells
    worse. It follows from the labels alone, not from which images can be read, so that an attempt that resumes has what
    the one before it had. Images of unknown size and crowds do not count.
    """
    if scope is ModelScopeClass.SMALL:
        return named
    images = {image.id: image for image in message.image_info if image.split != "test" and image.width and image.height}
    sides: defaultdict[int, list[float]] = defaultdict(list)
    for instance in message.instance_info:
        image = images.get(instance.image_id)
        if image and not instance.iscrowd:
            _, _, width, height = instance.bbox
            share = min(width / image.width, 1.0) * min(height / image.height, 1.0)
            sides[instance.class_id].append(share**0.5)
    of_classes = [median(of_class) for of_class in sides.values() if len(of_class) >= _FEWEST]
    typical = median(of_classes) if of_classes else 0.0
    if typical == 0:
        return named
    # Of the image in the middle: one stray photograph must not make all others four times as much work.
    there = median(max(image.width, image.height) for image in images.values())
    wanted = min(_OBJECT_SIDE / typical, _MOST_TIMES * named, there)
    return max(named, -(-int(wanted) // _STEP) * _STEP)
