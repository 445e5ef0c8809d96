"""Data sets go into MongoDB and out again without loss, whatever is wrong with single images."""

import hashlib
import json
import struct
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import cv2
import numpy as np
import pytest
from bson import ObjectId
from gridfs import GridFSBucket
from PIL import ExifTags, Image
from pymongo.database import Database

from handlers.store import Store
from service.dataset_files import Bad, DatasetError, Entry, Source
from service.datasets import Summary, export_dataset, import_dataset, list_datasets, open_source

pytestmark = pytest.mark.anyio
Db = Database[dict[str, Any]]


def picture(path: Path, width: int = 40, height: int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((height, width, 3), 90, np.uint8))
    return path


def coco_folder(folder: Path, names: list[str], *, boxes: list[list[float]] | None = None, **image: Any) -> Path:
    """A COCO folder whose images each have `boxes`, of the classes `a` and `b` in turn."""
    for name in names:
        picture(folder / "images" / name)
    boxes = [[1.5, 2.25, 10.0, 8.125]] if boxes is None else boxes
    document = {
        "images": [
            {"id": number, "file_name": name, "width": 40, "height": 30, **image} for number, name in enumerate(names)
        ],
        "annotations": [
            {"id": 10 * number + place, "image_id": number, "category_id": 7 + place % 2, "bbox": box, "iscrowd": 0}
            for number in range(len(names))
            for place, box in enumerate(boxes)
        ],
        "categories": [{"id": 7, "name": "a"}, {"id": 8, "name": "b"}],
    }
    (folder / "annotations.json").write_text(json.dumps(document))
    return folder


async def bring_in(store: Store, source: Source, name: str = "toy") -> Summary:
    return await import_dataset(store, source, name, lambda done, total: None)


def as_set(folder: Path) -> tuple[set[Any], set[Any], dict[str, set[str]]]:
    """A COCO folder by content: images with the bytes' hash, boxes by image and class name, splits."""
    coco = json.loads((folder / "annotations.json").read_text())
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    classes = {category["id"]: category["name"] for category in coco["categories"]}
    images = {
        (
            image["file_name"],
            image["width"],
            image["height"],
            hashlib.sha256((folder / "images" / image["file_name"]).read_bytes()).hexdigest(),
        )
        for image in coco["images"]
    }
    boxes = {
        (
            names[annotation["image_id"]],
            classes[annotation["category_id"]],
            *annotation["bbox"],
            annotation.get("iscrowd", 0),
            annotation.get("difficult", 0),
        )
        for annotation in coco["annotations"]
    }
    split_file = folder / "split.json"
    splits = json.loads(split_file.read_text()) if split_file.exists() else {}
    return images, boxes, {split: set(members) for split, members in splits.items()}


async def test_the_blood_cells_are_all_there(store: Store, db: Db, shared_datasets: Path, tmp_path: Path) -> None:
    """The real data set: 364 images, 4886 labels, its own splits; exported again it is the same."""
    calls: list[tuple[int, int]] = []
    folder = shared_datasets / "bccd"
    source = open_source("coco", folder, None, None)
    summary = await import_dataset(store, source, "bccd", lambda done, total: calls.append((done, total)))
    assert (summary.images, summary.labels, summary.failed_images, summary.failed_labels) == (364, 4886, 0, 0)
    assert calls[-1] == (364, 364)
    assert db.IMG_INFO.count_documents({"dataset": "bccd"}) == 364
    assert db.IMG_LAB_INFO.count_documents({}) == 4886
    # Trainings see images in the order of their ids: it must not depend on which upload was faster.
    listed = json.loads((folder / "annotations.json").read_text())["images"]
    assert [image["file_name"] for image in db.IMG_INFO.find().sort("_id")] == [image["file_name"] for image in listed]
    assert await list_datasets(store) == [
        {"dataset": "bccd", "images": 364, "splits": {"test": 72, "train": 205, "val": 87}}
    ]
    await export_dataset(store, "bccd", tmp_path / "out", lambda done, total: None)
    assert as_set(tmp_path / "out") == as_set(folder)


async def test_stored_files_are_the_bytes_on_disk(store: Store, db: Db, tmp_path: Path) -> None:
    """GridFS holds the file unchanged, with its sha256; the record has the fields of the interface and no more."""
    coco_folder(tmp_path, ["x.png"])
    await bring_in(store, open_source("coco", tmp_path, None, None))
    image = db.IMG_INFO.find_one({})
    assert image is not None
    assert set(image) == {"_id", "file_name", "width", "height", "file_id", "dataset"}
    out = GridFSBucket(db, "images").open_download_stream(image["file_id"])
    content = (tmp_path / "images" / "x.png").read_bytes()
    assert out.read() == content
    assert out.metadata is not None
    assert out.metadata["sha256"] == hashlib.sha256(content).hexdigest()
    label = db.IMG_LAB_INFO.find_one({})
    assert label is not None
    assert (label["img_id"], label["class_name"], label["bbox"]) == (image["_id"], "a", [1.5, 2.25, 10.0, 8.125])


async def test_an_interrupted_import_goes_on(store: Store, db: Db, tmp_path: Path) -> None:
    """Cancelled in the middle and started again, every image is there once, with its labels."""
    names = [f"{number}.png" for number in range(30)]
    coco_folder(tmp_path, names)
    with anyio.CancelScope() as scope:
        await import_dataset(
            store,
            open_source("coco", tmp_path, None, None),
            "toy",
            lambda done, total: scope.cancel() if done == 5 else None,
        )
    assert scope.cancelled_caught
    before = db.IMG_INFO.count_documents({})
    assert 5 <= before < 30
    again = await bring_in(store, open_source("coco", tmp_path, None, None))
    assert (again.images, again.already_there) == (30 - before, before)
    assert sorted(image["file_name"] for image in db.IMG_INFO.find()) == sorted(names)
    for image in db.IMG_INFO.find():
        assert db.IMG_LAB_INFO.count_documents({"img_id": image["_id"]}) == 1


async def test_an_import_removes_what_an_earlier_one_left_half(store: Store, db: Db, tmp_path: Path) -> None:
    """Chunks without a file, a day after an import noted that: a crash leaves them, and one under way has them too."""
    coco_folder(tmp_path, ["x.png"])
    cut_off, under_way = ObjectId(), ObjectId()
    noted = {"orphan_since": datetime(2020, 1, 1, tzinfo=UTC)}
    # With the index that every driver makes before the first chunk.
    db["images.chunks"].create_index([("files_id", 1), ("n", 1)], unique=True)
    db["images.chunks"].insert_many([{"files_id": cut_off, "n": 0, **noted}, {"files_id": under_way, "n": 0}])
    assert (await bring_in(store, open_source("coco", tmp_path, None, None))).images == 1
    image = db.IMG_INFO.find_one()
    assert image is not None
    assert {chunk["files_id"] for chunk in db["images.chunks"].find()} == {under_way, image["file_id"]}


async def test_the_same_names_in_two_data_sets(store: Store, db: Db, tmp_path: Path) -> None:
    """Only names of the same data set are passed over."""
    coco_folder(tmp_path, ["x.png"])
    for name in ("one", "two"):
        assert (await bring_in(store, open_source("coco", tmp_path, None, None), name)).images == 1


async def test_bad_images_are_named_and_the_rest_comes_in(store: Store, db: Db, tmp_path: Path) -> None:
    """Missing, no image, outside the folder, listed twice, a box that is none: counted, named, and passed over."""
    coco_folder(tmp_path / "d", ["good.png", "text.png", "gone.png"])
    (tmp_path / "d" / "images" / "text.png").write_text("not a picture")
    (tmp_path / "d" / "images" / "gone.png").unlink()
    picture(tmp_path / "secret.png")
    path = tmp_path / "d" / "annotations.json"
    document = json.loads(path.read_text())
    escapes = ["../../secret.png", str(tmp_path / "secret.png"), "a/../../../secret.png", "", "..", 5, "good.png"]
    document["images"] += [{"id": 100 + n, "file_name": name} for n, name in enumerate(escapes)]
    document["images"] += ["no image", {"id": [1], "file_name": "x.png"}]
    document["annotations"] += [
        {"id": 200, "image_id": 0, "category_id": 7, "bbox": [1, 2, 3]},
        {"id": 201, "image_id": 0, "category_id": 99, "bbox": [1, 2, 3, 4]},
        {"id": 202, "image_id": 0, "category_id": [7], "bbox": [1, 2, 3, 4]},
    ]
    path.write_text(json.dumps(document))
    summary = await bring_in(store, open_source("coco", tmp_path / "d", None, None))
    assert (summary.images, summary.labels, summary.failed_images, summary.failed_labels) == (1, 1, 11, 3)
    assert [image["file_name"] for image in db.IMG_INFO.find()] == ["good.png"]
    told = "\n".join(summary.problems)
    for part in ("text.png", "No such file", "inside the folder", "listed twice", "[1, 2, 3]", "category 99"):
        assert part in told


async def test_sizes_come_from_the_picture_where_they_are_not_given(store: Store, db: Db, tmp_path: Path) -> None:
    """Annotations without width and height are completed from the image."""
    coco_folder(tmp_path, ["x.png"], width=None, height=0)
    await bring_in(store, open_source("coco", tmp_path, None, None))
    image = db.IMG_INFO.find_one({})
    assert image is not None
    assert (image["width"], image["height"]) == (40, 30)


async def test_a_size_that_is_not_the_file_s(store: Store, tmp_path: Path) -> None:
    """Swapped, or from before the images were made smaller: named at the import. Turned by EXIF is no difference."""
    coco_folder(tmp_path, ["x.png", "y.png", "lying.jpg"])
    path = tmp_path / "annotations.json"
    document = json.loads(path.read_text())
    for image in document["images"][1:]:
        image |= {"width": 30, "height": 40}
    path.write_text(json.dumps(document))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(tmp_path / "images" / "x.png").save(tmp_path / "images" / "lying.jpg", exif=exif)
    summary = await bring_in(store, open_source("coco", tmp_path, None, None))
    assert (summary.images, summary.failed_images) == (2, 1)
    assert "y.png is 40 x 30 pixels; its annotation says 30 x 40" in summary.problems[0]


@pytest.mark.parametrize("size", [(40, 30), (30, 40)])
async def test_metadata_that_pillow_chokes_on(store: Store, tmp_path: Path, size: tuple[int, int]) -> None:
    """Are no reason to refuse an image that OpenCV reads, and end no import."""
    width, height = size
    coco_folder(tmp_path, ["x.png"], width=width, height=height)
    path = tmp_path / "images" / "x.png"
    junk = struct.pack(">I", 8) + b"eXIfjunkjunk"
    data = path.read_bytes()
    path.write_bytes(data[:33] + junk + struct.pack(">I", zlib.crc32(junk[4:])) + data[33:])
    assert (await bring_in(store, open_source("coco", tmp_path, None, None))).images == 1


async def test_splits(store: Store, db: Db, tmp_path: Path) -> None:
    """`split.json` is used by itself, `--split-file` and `--split` instead of it; unlisted images have no split."""
    coco_folder(tmp_path, ["x.png", "y.png"])

    async def splits(name: str, split_file: Path | None, split: str | None) -> dict[str, Any]:
        await bring_in(store, open_source("coco", tmp_path, split_file, split), name)
        return {image["file_name"]: image.get("split") for image in db.IMG_INFO.find({"dataset": name})}

    (tmp_path / "split.json").write_text(json.dumps({"train": ["x.png"]}))
    (tmp_path / "other.json").write_text(json.dumps({"val": ["y.png"]}))
    assert await splits("own", None, None) == {"x.png": "train", "y.png": None}
    assert await splits("given", tmp_path / "other.json", None) == {"x.png": None, "y.png": "val"}
    assert await splits("one", None, "test") == {"x.png": "test", "y.png": "test"}
    assert {row["dataset"]: row["splits"] for row in await list_datasets(store)} == {
        "given": {"": 1, "val": 1},
        "one": {"test": 2},
        "own": {"": 1, "train": 1},
    }
    (tmp_path / "split.json").write_text(json.dumps({"train": ["x.png"], "test": ["x.png"]}))
    with pytest.raises(DatasetError, match=r"'x.png' is in train and in test; expected one split"):
        open_source("coco", tmp_path, None, None)


VOC = """<annotation><folder>x</folder><filename>{filename}</filename>
<size><width>40</width><height>30</height><depth>3</depth></size>
<object><name>cat</name><difficult>1</difficult>
<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>13</xmax><ymax>24.5</ymax></bndbox></object>
<object><name>dog</name><bndbox><ymin>1</ymin><xmin>2</xmin><ymax>3</ymax><xmax>5</xmax></bndbox></object>
<object><name>dog</name><bndbox><xmin>oops</xmin><ymin>4</ymin><xmax>13</xmax><ymax>24</ymax></bndbox></object>
</annotation>"""


def voc_folder(folder: Path) -> Path:
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for name in ("a", "b", "c", "d"):
        picture(folder / "JPEGImages" / f"{name}.jpg")
        # What stands in `c` is the name it had before somebody renamed the files.
        filename = "before.jpg" if name == "c" else f"{name}.jpg"
        (folder / "Annotations" / f"{name}.xml").write_text(VOC.format(filename=filename))
    lists = {"train": "a\n", "test": "b  \n", "trainval": "a\nc\n", "cat_train": "a 1\nd -1\n"}
    for name, lines in lists.items():
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text(lines)
    return folder


async def test_voc(store: Store, db: Db, tmp_path: Path) -> None:
    """Corners become width and height without an offset, `difficult` is kept, splits come from ImageSets/Main."""
    summary = await bring_in(store, open_source("voc", voc_folder(tmp_path), None, None))
    assert (summary.images, summary.labels, summary.failed_images, summary.failed_labels) == (4, 8, 0, 4)
    assert {image["file_name"]: image.get("split") for image in db.IMG_INFO.find()} == {
        "a.jpg": "train",
        "b.jpg": "test",
        "c.jpg": "train",
        "d.jpg": None,
    }
    image = db.IMG_INFO.find_one({"file_name": "a.jpg"})
    assert image is not None
    labels = db.IMG_LAB_INFO.find({"img_id": image["_id"]}).sort("class_name", 1)
    assert [(label["class_name"], label["bbox"], label["difficult"]) for label in labels] == [
        ("cat", [3, 4, 10, 20.5], True),
        ("dog", [2, 1, 3, 2], False),
    ]


async def test_a_voc_image_is_the_one_that_the_file_is_named_after(tmp_path: Path) -> None:
    """Whatever stands inside: another image's name, one for all, a path of somebody's machine, nothing."""
    folder = voc_folder(tmp_path)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("a.jpg\nc\n")
    for name, inside in zip("abcd", ("b.jpg", "b.jpg", "C:\\me\\c.jpg", ""), strict=True):
        (folder / "Annotations" / f"{name}.xml").write_text(VOC.format(filename=inside))
    entries = [entry for entry in open_source("voc", folder, None, None).entries if isinstance(entry, Entry)]
    assert [(entry.file_name, entry.split) for entry in entries] == [
        ("a.jpg", "train"),
        ("b.jpg", "test"),
        ("c.jpg", "train"),
        ("d.jpg", None),
    ]


async def test_what_voc_names_otherwise(tmp_path: Path) -> None:
    """Images in a sub-folder, two endings, files with numbers for names; one whose image is gone takes no other's."""
    folder = tmp_path / "voc"
    names = {"a": "sub/a.jpg", "b": "b.png", "0001": "IMG_7.jpg", "gone": "b.png", "d": "was.jpg"}
    (folder / "Annotations").mkdir(parents=True)
    for stem, name in names.items():
        (folder / "Annotations" / f"{stem}.xml").write_text(VOC.format(filename=name))
    for name in ("sub/a.jpg", "b.jpg", "b.png", "IMG_7.jpg", "d.jpg", "d/x.jpg"):
        picture(folder / "JPEGImages" / name)
    (folder / "JPEGImages" / "d.csv").write_text("no image")
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": ["sub/a.jpg", "b.png"], "test": ["IMG_7.jpg", "d"]}))
    source = open_source("voc", folder, splits, None)
    found = {entry.file_name: entry.split for entry in source.entries if isinstance(entry, Entry)}
    assert found == {"sub/a.jpg": "train", "b.png": "train", "IMG_7.jpg": "test", "d.jpg": "test"}
    assert source.problems == ()
    bad = [entry for entry in open_source("voc", folder, splits, None).entries if isinstance(entry, Bad)]
    assert [(entry.name, entry.reason) for entry in bad] == [
        ("gone.xml", "there is no image of this name, and 'b.png' is that of b.xml")
    ]
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for name, line in (("test", "d"), ("trainval", "d.jpg")):
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text(line)
    found = {e.file_name: e.split for e in open_source("voc", folder, None, None).entries if isinstance(e, Entry)}
    assert found["d.jpg"] == "test"


async def test_splits_of_other_images(store: Store, db: Db, tmp_path: Path) -> None:
    """A list of which no name is known would leave tests to be trained on, and is refused; single names are told."""
    coco = coco_folder(tmp_path / "coco", ["train/x.png", "train/y.png"])
    voc = voc_folder(tmp_path / "voc")
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"train": ["x.png"], "test": ["y.png"]}))
    for form, folder in (("coco", coco), ("voc", voc)):
        with pytest.raises(DatasetError, match=r"2 of the 2 names in the splits are no image of .*, e.g. 'x.png'; exp"):
            open_source(form, folder, other, None)
        assert (await bring_in(store, open_source(form, folder, None, "test"), form)).failed_images == 0
    other.write_text(json.dumps({"train": ["a"], "test": ["b.jpg", "x.png"]}))
    summary = await bring_in(store, open_source("voc", voc, other, None))
    assert summary.splits == {"train": 1, "test": 1, "": 2}
    assert "1 of the 3 names in the splits" in summary.problems[0]


async def test_another_folder_with_the_same_names(store: Store, db: Db, tmp_path: Path) -> None:
    """Its images are not those that are there already: they are named, not passed over."""
    coco_folder(tmp_path / "one", ["x.png", "y.png"])
    coco_folder(tmp_path / "two", ["x.png", "z.png"])
    await bring_in(store, open_source("coco", tmp_path / "one", None, "train"))
    summary = await bring_in(store, open_source("coco", tmp_path / "two", None, "test"))
    assert (summary.images, summary.already_there, summary.failed_images) == (1, 0, 1)
    assert summary.problems == ["x.png: is there already, in split 'train' instead of 'test'"]
    again = await bring_in(store, open_source("coco", tmp_path / "one", None, "train"))
    assert (again.images, again.already_there, again.failed_images) == (0, 2, 0)


async def test_labels_of_no_image_are_counted(store: Store, tmp_path: Path) -> None:
    """Ids as text on one side and as numbers on the other; a category that is a double is its number."""
    path = coco_folder(tmp_path, ["x.png", "y.png"]) / "annotations.json"
    document = json.loads(path.read_text())
    document["annotations"][1] |= {"image_id": "1"}
    document["annotations"][0] |= {"category_id": 7.0}
    path.write_text(json.dumps(document))
    summary = await bring_in(store, open_source("coco", tmp_path, None, None))
    assert (summary.images, summary.labels, summary.failed_labels) == (2, 1, 1)
    assert summary.problems == ["toy: annotations.json: labels of images that it does not list, e.g. of image_id '1'"]


async def test_voc_files_cannot_do_harm(tmp_path: Path) -> None:
    """Entities (expansion, other files), paths out of the folder and broken XML are refused, file by file."""
    folder = voc_folder(tmp_path)
    secret = picture(tmp_path / "secret.jpg")
    bomb = '<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx"><!ENTITY y "&x;&x;&x;&x;">]><annotation>&y;</annotation>'
    reader = f'<!DOCTYPE a [<!ENTITY x SYSTEM "file://{secret}">]><annotation><filename>&x;</filename></annotation>'
    (folder / "Annotations" / "a.xml").write_text(bomb)
    (folder / "Annotations" / "b.xml").write_bytes(reader.encode("utf-16"))
    (folder / "JPEGImages" / "c.jpg").unlink()
    (folder / "Annotations" / "c.xml").write_text(VOC.format(filename="../secret.jpg"))
    (folder / "Annotations" / "d.xml").write_text("<annotation><filename>d.jpg</filename>")
    (folder / "Annotations" / "e.xml").write_text("<annotation/>")
    bad = list(open_source("voc", folder, None, None).entries)
    assert all(isinstance(entry, Bad) for entry in bad)
    reasons = [entry.reason for entry in bad if isinstance(entry, Bad)]
    assert "DOCTYPE" in reasons[0]
    assert "DOCTYPE" in reasons[1]
    assert "inside the folder" in reasons[2]
    assert "cannot be read" in reasons[3]
    assert "expected a filename" in reasons[4]


async def test_what_is_no_data_set_says_so(store: Store, tmp_path: Path) -> None:
    """A missing folder, no annotations, other JSON, and a name that cannot be one: one message each."""
    with pytest.raises(DatasetError, match="is no folder"):
        open_source("coco", tmp_path / "nowhere", None, None)
    with pytest.raises(DatasetError, match="cannot read COCO annotations"):
        open_source("coco", tmp_path, None, None)
    for content in ("[1]", '{"images": []}', '{"images": [], "categories": [3]}'):
        (tmp_path / "annotations.json").write_text(content)
        with pytest.raises(DatasetError, match="is no COCO document"):
            open_source("coco", tmp_path, None, None)
    with pytest.raises(DatasetError, match="expected a Pascal VOC folder"):
        open_source("voc", tmp_path, None, None)
    for name in ("", "a\nb", "x" * 201):
        with pytest.raises(DatasetError, match="expected a text of 1 to 200 printable characters"):
            await bring_in(store, open_source("coco", coco_folder(tmp_path, ["x.png"]), None, None), name)


async def test_export_leaves_out_what_it_cannot_write(store: Store, db: Db, tmp_path: Path) -> None:
    """Records of other writers: a name that would leave the folder, a file that is gone, a box that is none."""
    names = ["good.png", "gone.png", "deep/er.png", "bad.png"]
    coco_folder(tmp_path / "in", names)
    await bring_in(store, open_source("coco", tmp_path / "in", None, None))
    gone = db.IMG_INFO.find_one({"file_name": "gone.png"})
    good = db.IMG_INFO.find_one({"file_name": "good.png"})
    assert gone is not None
    assert good is not None
    GridFSBucket(db, "images").delete(gone["file_id"])
    db.IMG_INFO.update_one({"file_name": "bad.png"}, {"$set": {"file_name": "../bad.png"}})
    db.IMG_LAB_INFO.insert_one({"img_id": good["_id"], "class_name": "a", "bbox": "none"})
    summary = await export_dataset(store, "toy", tmp_path / "out", lambda done, total: None)
    assert (summary.images, summary.labels, summary.failed_images, summary.failed_labels) == (2, 2, 2, 1)
    images, _, _ = as_set(tmp_path / "out")
    assert {image[0] for image in images} == {"good.png", "deep/er.png"}
    assert not (tmp_path / "bad.png").exists()
    with pytest.raises(DatasetError, match=r"annotations.json exists"):
        await export_dataset(store, "toy", tmp_path / "out", lambda done, total: None)
    with pytest.raises(DatasetError, match="there is no data set 'other'"):
        await export_dataset(store, "other", tmp_path / "more", lambda done, total: None)


async def test_crowd_and_difficult_survive_the_round_trip(store: Store, tmp_path: Path) -> None:
    """Import and export keep every property of a box, odd boxes included: readers judge them, not the import."""
    coco_folder(tmp_path / "in", ["x.png", "y.png"], boxes=[[1, 2, 3, 4], [5, 5, 0, 2], [-3, -3, 100, 100]])
    path = tmp_path / "in" / "annotations.json"
    document = json.loads(path.read_text())
    document["annotations"][0]["iscrowd"] = 1
    document["annotations"][1]["difficult"] = 1
    path.write_text(json.dumps(document))
    (tmp_path / "in" / "split.json").write_text(json.dumps({"train": ["x.png"], "test": ["y.png"]}))
    await bring_in(store, open_source("coco", tmp_path / "in", None, None))
    await export_dataset(store, "toy", tmp_path / "out", lambda done, total: None)
    assert as_set(tmp_path / "out") == as_set(tmp_path / "in")
