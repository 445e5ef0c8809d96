"""The side of the square that a network takes its images as: what the scope names, or more where objects are small."""

from collections import defaultdict
from statistics import median

from schemas.enums import ModelScopeClass
from schemas.message import RequestMessage

#: Side in pixels of the input that objects should have, each class's by its median: COCO's border between small and
#: medium objects. Below it the detectors that we train lose most of what they lose.
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

    As large as the class with the smallest objects asks for, but no larger than the images are, where no more is to be
    seen. It follows from the labels alone, not from which images can be read, so that an attempt that resumes has what
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
    smallest = min((median(of_class) for of_class in sides.values() if len(of_class) >= _FEWEST), default=0.0)
    if smallest == 0:
        return named
    largest = max(max(image.width, image.height) for image in images.values())
    wanted = min(_OBJECT_SIDE / smallest, _MOST_TIMES * named, largest)
    return max(named, -(-int(wanted) // _STEP) * _STEP)
