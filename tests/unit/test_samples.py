"""The sample set is a small COCO data set of surfaces with drawn defects, the same for the same seed."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from service.dataset_files import read_coco, read_split_file
from service.samples import make_samples

COUNTS = {"train": 24, "val": 4, "test": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples")
    make_samples(path, COUNTS)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_our_own_import_reads_it(folder: Path) -> None:
    """Every image is there, in its split, with its size, and no label is refused."""
    entries = list(read_coco(folder, read_split_file(folder / "split.json")).entries)
    assert len(entries) == sum(COUNTS.values())
    for entry in entries:
        assert entry.bad_labels == ()
        assert cv2.imread(str(entry.path)).shape == (entry.height, entry.width, 3)
    splits = [entry.split for entry in entries]
    assert {split: splits.count(split) for split in COUNTS} == COUNTS
    assert len({(entry.width, entry.height) for entry in entries}) > 10


def test_three_classes_and_images_without_any_defect(folder: Path) -> None:
    coco = json.loads((folder / "annotations.json").read_text())
    assert [category["name"] for category in coco["categories"]] == ["scratch", "pit", "stain"]
    assert {annotation["category_id"] for annotation in coco["annotations"]} == {1, 2, 3}
    labelled = {annotation["image_id"] for annotation in coco["annotations"]}
    assert 1 / 10 < 1 - len(labelled) / len(coco["images"]) < 1 / 4


def test_boxes_lie_inside_their_images_and_apart(folder: Path) -> None:
    coco = json.loads((folder / "annotations.json").read_text())
    for image in coco["images"]:
        boxes = np.array([a["bbox"] for a in coco["annotations"] if a["image_id"] == image["id"]]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        assert (boxes >= 0).all()
        assert (boxes[:, 2:] <= (image["width"], image["height"])).all()
        for index, box in enumerate(boxes):
            others = np.delete(boxes, index, axis=0)
            common = np.minimum(others[:, 2:], box[2:]) - np.maximum(others[:, :2], box[:2])
            assert (common.min(axis=1) <= 0).all()


def test_boxes_are_where_something_was_drawn(folder: Path) -> None:
    """The picture differs more from its own smooth lighting inside the boxes of dark pits than elsewhere."""
    coco = json.loads((folder / "annotations.json").read_text())
    darker = []
    for image in coco["images"]:
        grey = cv2.imread(str(folder / "images" / image["file_name"]), cv2.IMREAD_GRAYSCALE).astype(float)
        for annotation in coco["annotations"]:
            if annotation["image_id"] == image["id"] and annotation["category_id"] == 2:
                x, y, w, h = annotation["bbox"]
                ring = grey[max(y - 5, 0) : y + h + 5, max(x - 5, 0) : x + w + 5]
                # The middle of the box is pit, the ring around the box is not.
                outside = (ring.sum() - grey[y : y + h, x : x + w].sum()) / (ring.size - w * h)
                darker.append(outside - grey[y + h // 4 : y + 3 * h // 4, x + w // 4 : x + 3 * w // 4].mean())
    assert len(darker) > 5
    assert min(darker) > 15


def test_same_seed_same_files_other_seed_others(tmp_path: Path) -> None:
    made = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / name).mkdir()
        make_samples(tmp_path / name, {"train": 3}, seed)
        made.append(files(tmp_path / name))
    assert made[0] == made[1]
    assert set(made[0]) == {f"images/surface_000{n}.jpg" for n in (1, 2, 3)} | {"annotations.json", "split.json"}
    assert made[0]["images/surface_0001.jpg"] != made[2]["images/surface_0001.jpg"]
