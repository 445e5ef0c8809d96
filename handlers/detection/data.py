"""What a job trains or tests on: the request message, the list of image files, and the images themselves."""

import os
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

#: Larger images are skipped unread: 100 megapixels take 300 MB decoded.
MAX_PIXELS = 100_000_000

# OpenCV reads its own limit once, when its library is loaded; it covers the formats whose header `_inspect` skips.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from pydantic import BaseModel, ConfigDict, ValidationError  # noqa: E402

from handlers.detection.boxes import Boxes, Image, make_boxes  # noqa: E402
from handlers.detection.errors import DataError, machine_fault  # noqa: E402
from schemas.message import InstanceInfo, RequestMessage, Split, choose_validation, strata  # noqa: E402
from schemas.result import MAX_EXAMPLES, ImagesUsed, SkippedImage  # noqa: E402

#: How PNG and TIFF files begin.
_CAN_HAVE_16_BITS = (b"\x89PNG", b"II*\0", b"MM\0*")


class ImageError(Exception):
    """One image cannot be used; the text is the reason, for the client."""


@dataclass(frozen=True)
class Sample:
    """One image of the message, with its labels."""

    #: Its small number in the message.
    id: int
    mongodb_id: str
    split: Split
    path: Path
    #: Recorded size in pixels; 0 is unknown.
    width: int
    height: int
    #: In pixels of the image as labelled; inside the image already if its size is known.
    boxes: Boxes


class _ImageLine(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    id: int
    path: Path | None = None
    reason: str | None = None


def read_message(path: Path) -> RequestMessage:
    """The message in the JSON file `path`, checked against the schema and for references that lead nowhere.

    Raises DataError, with the field.
    """
    try:
        message = RequestMessage.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "message"
        raise DataError(f"{field} of the request message is {first['input']!r:.80}; {first['msg']}", field) from None
    images: set[int] = set()
    for index, image in enumerate(message.image_info):
        if image.id in images:
            raise DataError(
                f"image_info.{index}.id of the request message is {image.id} once more; expected each id once",
                f"image_info.{index}.id",
            )
        images.add(image.id)
    for index, known in enumerate(message.class_info):
        if known.id != index + 1:
            raise DataError(
                f"class_info.{index}.id of the request message is {known.id}; expected {index + 1}, its position",
                f"class_info.{index}.id",
            )
    for index, instance in enumerate(message.instance_info):
        if instance.image_id not in images:
            raise DataError(
                f"instance_info.{index}.image_id of the request message is {instance.image_id}; "
                "expected the id of an image in image_info",
                f"instance_info.{index}.image_id",
            )
        if instance.class_id > len(message.class_info):
            raise DataError(
                f"instance_info.{index}.class_id of the request message is {instance.class_id}; "
                f"expected 1 to {len(message.class_info)}, the id of a class in class_info",
                f"instance_info.{index}.class_id",
            )
    return message


def image_paths(path: Path) -> dict[int, Path | str]:
    """The image files of a job: for each image id its file, or (a text) why there is none. Raises DataError."""
    found: dict[int, Path | str] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                image = _ImageLine.model_validate_json(line)
            except ValidationError as error:
                raise DataError(f"line {number} of {path.name} is {line[:80]!r}; {error}") from None
            found[image.id] = image.path or image.reason or "the image is not there"
    return found


def load_samples(
    message: RequestMessage, paths: dict[int, Path | str], splits: Collection[Split] | None = None
) -> tuple[list[Sample], list[SkippedImage]]:
    """The images of `splits` (None is all), in the order of the message, and those for which there is no file.

    No image file is opened here.
    """
    labels: defaultdict[int, list[InstanceInfo]] = defaultdict(list)
    for instance in message.instance_info:
        labels[instance.image_id].append(instance)
    samples: list[Sample] = []
    skipped: list[SkippedImage] = []
    for image in message.image_info:
        if splits is not None and image.split not in splits:
            continue
        path = paths.get(image.id, "the image is not there")
        if isinstance(path, str):
            skipped.append(SkippedImage(img_id=image.mongodb_id, reason=path))
            continue
        boxes = make_boxes(
            [(label.bbox, label.class_id, bool(label.iscrowd)) for label in labels[image.id]],
            [bool(label.difficult) for label in labels[image.id]],
        )
        if image.width and image.height:
            boxes = boxes.clipped(image.width, image.height)
        samples.append(Sample(image.id, image.mongodb_id, image.split, path, image.width, image.height, boxes))
    return samples, skipped


def images_used(used: int, skipped: Collection[SkippedImage]) -> ImagesUsed:
    """The count of images for the result, with the first few that were left out."""
    return ImagesUsed(used=used, skipped=len(skipped), skipped_examples=tuple(skipped)[:MAX_EXAMPLES])


def separate_validation(samples: list[Sample], seed: int = 0) -> tuple[list[Sample], list[Sample]]:
    """(train, val): as the message splits them; where it has no validation images, a tenth is chosen if there are
    enough images. Images of the split test are in neither.
    """
    train = [sample for sample in samples if sample.split == "train"]
    val = [sample for sample in samples if sample.split == "val"]
    if val:
        return train, val
    classes = [(sample.id, tuple(set(sample.boxes.class_ids.tolist()))) for sample in train]
    chosen = choose_validation(strata(classes), seed)
    return (
        [sample for sample in train if sample.id not in chosen],
        [replace(sample, split="val") for sample in train if sample.id in chosen],
    )


def read_image(path: Path, width: int = 0, height: int = 0) -> Image:
    """The image file `path`, uint8 RGB [height, width, 3]; `width` and `height` are as recorded, 0 for unknown.

    Grey and palette images become RGB, an alpha channel is dropped, CMYK is converted. 16 bits a channel become the
    upper 8 of them, or of 12 where none is above 4095, as many cameras write them. The recorded size tells in which
    frame the labels are: the image is turned as its EXIF orientation says unless only the file as it lies has the
    recorded size.

    Raises ImageError where the file is no whole image, is larger than `MAX_PIXELS`, or has another size.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        if machine_fault(error):
            raise  # Another attempt may read it: it must not be trained without.
        raise ImageError(f"the file cannot be read: {error.strerror}") from None
    _inspect(data)
    image = _decode(data, cv2.IMREAD_COLOR)
    found = (image.shape[1], image.shape[0])
    recorded = (width, height)
    if width and height and recorded != found:
        image = _decode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if recorded != (image.shape[1], image.shape[0]):
            raise ImageError(f"the file is {found[0]} x {found[1]} pixels; recorded is {width} x {height}")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image), np.uint8)


def read_sample(sample: Sample) -> tuple[Image, Boxes]:
    """The image of `sample`, and its boxes inside that image. Raises ImageError."""
    image = read_image(sample.path, sample.width, sample.height)
    return image, sample.boxes.clipped(image.shape[1], image.shape[0])


def fit(image: Image, size: int) -> Image:
    """`image` stretched to `size` x `size`, as the network takes it; thin things stay visible.

    Each pixel is of all that it covers, weighed by a triangle, which is what Pillow calls `BILINEAR`: no more loss than
    by area (OpenCV), in a third of the time or less.
    """
    # torch takes no negative strides, and warns of arrays that cannot be written to.
    planes = torch.from_numpy(np.require(image, requirements=["C", "W"]))[None].permute(0, 3, 1, 2)
    stretched = F.interpolate(planes, (size, size), mode="bilinear", antialias=True)
    return np.ascontiguousarray(stretched[0].permute(1, 2, 0).numpy())


def shrink(image: Image, boxes: Boxes, shorter_side: int) -> tuple[Image, Boxes]:
    """Image and boxes, scaled down so that the image's shorter side is `shorter_side`; as they are if it is less."""
    height, width = image.shape[:2]
    scale = shorter_side / min(height, width)
    if scale >= 1:
        return image, boxes
    new = (max(round(width * scale), 1), max(round(height * scale), 1))
    factors = np.array([new[0] / width, new[1] / height] * 2, np.float32)
    return np.asarray(cv2.resize(image, new, interpolation=cv2.INTER_AREA), np.uint8), boxes.moved(boxes.xyxy * factors)


def _decode(data: bytes, flags: int) -> Image:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        if "PIXELS" in str(error):
            raise ImageError(f"the image has more than {MAX_PIXELS // 1_000_000} megapixels") from None
        raise ImageError(f"the file cannot be decoded: {error.err}") from None
    if image is None:
        raise ImageError("the file is not an image, or a damaged one")
    if data.startswith(_CAN_HAVE_16_BITS) and image.max() < 16:
        # All but black: perhaps 12 bits in 16, of which OpenCV has taken the upper 8 of 16.
        whole: Any = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_ANYDEPTH)
        if whole is not None and whole.dtype == np.uint16 and whole.max() < 1 << 12:
            image = whole >> 4
    return np.asarray(image, np.uint8)


def _inspect(data: bytes) -> None:
    """Look at the file before it is decoded, whatever its name ends in.

    OpenCV fills what is missing of a truncated JPEG or PNG with grey and says nothing; and a small file can claim a
    size that no memory holds. Raises ImageError.
    """
    if not data:
        raise ImageError("the file is empty")
    if data.startswith(b"\xff\xd8"):
        size, whole = _inspect_jpeg(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        size, whole = _inspect_png(data)
    else:
        return
    if size and size[0] * size[1] > MAX_PIXELS:
        raise ImageError(f"the image is {size[0]} x {size[1]}: more than {MAX_PIXELS // 1_000_000} megapixels")
    if not whole:
        raise ImageError("the file is truncated")


def _inspect_jpeg(data: bytes) -> tuple[tuple[int, int] | None, bool]:
    """((width, height) if there, whether the end is there); ITU-T T.81, B.1 and B.2."""
    size = None
    at = 2
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0:
            # Bytes between segments that belong to nothing: every decoder passes over them.
            at = data.find(b"\xff", at + 1)
            if at < 0:
                break
            continue
        if marker == 0xFF:  # A fill byte.
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4])
        # SOF0 to SOF15 but DHT, JPG and DAC, which lie between them.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            size = (int.from_bytes(data[at + 7 : at + 9]), int.from_bytes(data[at + 5 : at + 7]))
        if marker == 0xDA:
            # In the scan a byte FF is always followed by 00 or a restart marker, so the first FFD9 is the end; one
            # before it may be that of a thumbnail.
            return size, data.find(b"\xff\xd9", at + 2 + length) >= 0
        at += 2 + length
    return size, False


def _inspect_png(data: bytes) -> tuple[tuple[int, int] | None, bool]:
    """((width, height) if there, whether the end is there); PNG (ISO/IEC 15948), clause 5."""
    size = (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) if len(data) >= 24 else None
    at = 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4])
        if data[at + 4 : at + 8] == b"IEND":
            return size, True
        at += 12 + length
    return size, False
