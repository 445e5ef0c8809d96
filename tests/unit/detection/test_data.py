"""What a job's files become: samples with boxes inside their image, checked references, a validation split."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from drawn import make_job, message
from PIL import Image as PilImage

from handlers.detection.boxes import make_boxes
from handlers.detection.data import fit, image_paths, load_samples, read_message, separate_validation, shrink
from handlers.detection.errors import DataError
from schemas.message import RequestMessage


def test_samples_have_clipped_boxes_and_known_splits(tmp_path: Path) -> None:
    """A box is cut at the image's edge, and dropped if less than a pixel of it is left; other splits are left out."""
    labels = [[(1, [-10.0, 5.0, 30.0, 20.0]), (2, [95.5, 0.0, 40.0, 40.0])], [], [(1, [1.0, 1.0, 5.0, 5.0])]]
    checked = RequestMessage.model_validate(message(["train", "val", "test"], labels))
    samples, skipped = load_samples(checked, {1: tmp_path, 3: tmp_path}, ("train", "val"))
    assert [(sample.id, sample.split) for sample in samples] == [(1, "train")]
    assert samples[0].boxes.xyxy.tolist() == [[0.0, 5.0, 20.0, 25.0]]
    assert [(image.img_id, image.reason) for image in skipped] == [(f"{2:024x}", "the image is not there")]


def test_crowds_and_difficult_objects_are_known(tmp_path: Path) -> None:
    """Also after a box before them was dropped."""
    content = message(["train"], [[(1, [500.0, 0.0, 9.0, 9.0]), *[(1, [0.0, 0.0, 9.0, 9.0])] * 3]])
    content["instance_info"][2]["iscrowd"] = content["instance_info"][3]["difficult"] = 1
    (sample,), _ = load_samples(RequestMessage.model_validate(content), {1: tmp_path}, ("train",))
    assert sample.boxes.crowd.tolist() == [False, True, False]
    assert sample.boxes.difficult.tolist() == [False, False, True]
    assert sample.boxes.counted.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda m: m["instance_info"][0].update(image_id=99), "instance_info.0.image_id"),
        (lambda m: m["class_info"][1].update(id=5), "class_info.1.id"),
        (lambda m: m["class_info"][1].update(name="x" * 201), "class_info.1.name"),
        (lambda m: m["class_info"].extend(m["class_info"] * 2500), "class_info"),
        (lambda m: m["image_info"][1].update(id=1), "image_info.1.id"),
        (lambda m: m["image_info"][0].update(split="dev"), "image_info.0.split"),
        (lambda m: m["instance_info"][0].update(area=-1), "instance_info.0.area"),
        (lambda m: m["image_info"][0].update(width=10**400), "image_info.0.width"),
        (lambda m: m["image_info"][0].update(id=2**63), "image_info.0.id"),
        (lambda m: m["instance_info"][0].update(bbox=[0, math.nan, 5, 5]), "instance_info.0.bbox.1"),
        (lambda m: m["instance_info"][0].update(bbox=[0, 0, math.inf, 5]), "instance_info.0.bbox.2"),
        (lambda m: m["instance_info"][0].update(bbox=[0, 0, 5]), "instance_info.0.bbox.3"),
    ],
)
def test_a_wrong_message_is_refused_with_its_field(tmp_path: Path, change: object, field: str) -> None:
    """The field is named, in the form in which a client finds it."""
    job = make_job(tmp_path, 4)
    document = json.loads(job.message.read_text())
    change(document)  # type: ignore[operator]
    job.message.write_text(json.dumps(document))
    with pytest.raises(DataError) as raised:
        read_message(job.message)
    assert raised.value.field == field
    assert field in str(raised.value)


def test_a_wrong_line_in_the_list_of_images_is_named(tmp_path: Path) -> None:
    """By its number."""
    path = tmp_path / "images.jsonl"
    path.write_text('{"id": 1, "path": "x"}\n{"id": "two"}\n')
    with pytest.raises(DataError, match=r"line 2 of images.jsonl"):
        image_paths(path)


def test_validation_images_are_the_message_s_or_a_tenth(tmp_path: Path) -> None:
    """Given ones are kept; else a stratified tenth that is the same every time; none of fewer than 20 images."""
    for count, given, expected in ((40, ["val", "train"] * 20, 20), (40, ["train"] * 40, 4), (19, ["train"] * 19, 0)):
        job = make_job(tmp_path / str(count) / given[0], count, splits=given)
        samples, _ = load_samples(read_message(job.message), image_paths(job.images))
        train, val = separate_validation(samples, seed=3)
        assert (len(train) + len(val), len(val)) == (count, expected)
        assert {sample.split for sample in val} <= {"val"}
        assert [sample.id for sample in separate_validation(samples, seed=3)[1]] == [sample.id for sample in val]


def test_large_images_shrink_with_their_boxes() -> None:
    """To the shorter side asked for; small ones stay."""
    boxes = make_boxes([((100.0, 50.0, 200.0, 100.0), 1, False)])
    image, smaller = shrink(np.zeros((400, 800, 3), np.uint8), boxes, 200)
    assert image.shape == (200, 400, 3)
    assert smaller.xyxy.tolist() == [[50.0, 25.0, 150.0, 75.0]]
    same, _ = shrink(image, boxes, 500)
    assert same is image


@pytest.mark.parametrize("shape", [(480, 640), (97, 300), (30, 400), (64, 64), (129, 129), (1000, 65)])
def test_no_line_of_a_tested_image_is_lost(shape: tuple[int, int]) -> None:
    """Of every column that is white in a black image, as much is left as its share of the image."""
    height, width = shape
    for column in range(width):
        image = np.zeros((height, width, 3), np.uint8)
        image[:, column] = 255
        assert fit(image, 64).mean() * width > 0.5 * 255


@pytest.mark.parametrize("shape", [(480, 640), (640, 300), (100, 33), (3, 500)])
def test_images_are_stretched_as_pillow_does(shape: tuple[int, int]) -> None:
    """With `BILINEAR`, as the page on the ONNX file says; so is a mirrored view that cannot be written to."""
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    expected = np.asarray(PilImage.fromarray(image).resize((96, 96), PilImage.Resampling.BILINEAR))
    view = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    view.setflags(write=False)
    for given in (image, view):
        stretched = fit(given, 96)
        assert stretched.dtype == np.uint8
        assert stretched.flags.c_contiguous
        assert np.abs(stretched.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 100_000), (100_000, 1), (3, 129), (7, 64)])
def test_an_image_of_any_form_is_stretched(shape: tuple[int, int]) -> None:
    assert (fit(np.full((*shape, 3), 77, np.uint8), 64) == 77).all()
