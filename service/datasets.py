"""Data sets between folders and MongoDB: `dltask dataset import`, `list` and `export`."""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import orjson
from bson import ObjectId

from handlers.store import Store
from handlers.store.database import Document
from handlers.store.files import FileMissing
from schemas.records import ImageRecord
from service.dataset_files import (
    Bad,
    DatasetError,
    Entry,
    Source,
    box_of,
    name_is_safe,
    read_coco,
    read_split_file,
    read_voc,
)
from service.janitor import ORPHAN_SECONDS, remove_chunks

#: Transfers at once: the round trips overlap, and the connection pool (100) stays free for others.
_PARALLEL = 8

#: Problems named in a summary; the count beside them is whole.
_PROBLEMS_NAMED = 20

#: Called after each image: (images done, images in all).
OnProgress = Callable[[int, int], None]


@dataclass
class Summary:
    """What became of an import or an export. Problems are about images or labels that were left out."""

    dataset: str
    #: Images and labels written now.
    images: int = 0
    labels: int = 0
    #: Images that an earlier import had already brought in.
    already_there: int = 0
    failed_images: int = 0
    failed_labels: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def problem(self, name: str, reason: str) -> None:
        """Name a problem, if not too many are named already."""
        if len(self.problems) < _PROBLEMS_NAMED:
            self.problems.append(f"{name}: {reason}"[:300])

    def document(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self) | {"splits": dict(sorted(self.splits.items()))}


def open_source(form: str, folder: Path, split_file: Path | None, split: str | None) -> Source:
    """The data set in `folder`; `form` is `coco` or `voc`. Raises DatasetError.

    Splits are those of `split_file`; else every image is in `split`; else they are the folder's own (`split.json`, or
    VOC's ImageSets). An image in none of them has no split.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder} is no folder")
    own = folder / "split.json"
    if split_file is None and split is None and own.is_file():
        split_file = own
    splits = read_split_file(split_file) if split_file else {}
    return read_coco(folder, splits, split) if form == "coco" else read_voc(folder, splits, split)


async def import_dataset(store: Store, source: Source, name: str, on_progress: OnProgress) -> Summary:
    """Bring the images and labels of `source` into MongoDB as data set `name`, but for images that are there
    already, by name and split.

    Raises DatasetError for a name that cannot be one; whatever is wrong with an image is counted in the summary.
    """
    if not name or len(name) > 200 or any(unicodedata.category(c) in ("Cc", "Cf") for c in name):
        raise DatasetError(f"--name is {name!r}; expected a text of 1 to 200 printable characters")
    await store.indexes.create("IMG_INFO", "IMG_LAB_INFO")
    await remove_chunks(store.files.images, older_than=ORPHAN_SECONDS)
    present = await store.records.splits_in(name)
    summary = Summary(name, failed_labels=source.stray_labels)
    for problem in source.problems:
        summary.problem(name, problem)
    done = 0

    async def work() -> None:
        nonlocal done
        # One iterator for all workers: `next` does not await, so no two of them meet in it. Ids are given here too, in
        # the order of the source: messages list images by id, and the same folder must train to the same model.
        for entry in source.entries:
            image_id = ObjectId()
            if isinstance(entry, Bad):
                summary.failed_images += 1
                summary.problem(entry.name, entry.reason)
            elif entry.file_name not in present:
                await _import_one(store, image_id, entry, name, summary)
            elif (entry.split or None) == (present[entry.file_name] or None):
                summary.already_there += 1
            else:
                # Most likely another image, of a second folder that has the same names.
                summary.failed_images += 1
                there = present[entry.file_name]
                summary.problem(entry.file_name, f"is there already, in split {there!r} instead of {entry.split!r}")
            done += 1
            on_progress(done, source.total)

    async with anyio.create_task_group() as group:
        for _ in range(_PARALLEL):
            group.start_soon(work)
    return summary


async def _import_one(store: Store, image_id: ObjectId, entry: Entry, dataset: str, summary: Summary) -> None:
    try:
        sha256, width, height = await anyio.to_thread.run_sync(_inspect, entry)
    except (OSError, ValueError) as error:
        summary.failed_images += 1
        summary.problem(entry.file_name, str(error))
        return
    file_id = await store.files.images.put(entry.path, entry.file_name, {"sha256": sha256, "dataset": dataset})
    image = ImageRecord(
        file_name=entry.file_name, width=width, height=height, file_id=file_id, dataset=dataset, split=entry.split
    )
    # If this fails the file stays: the record may have been written although the answer was lost, and a file too many
    # harms less than a record without its file.
    await store.records.add(image_id, image, entry.labels)
    summary.images += 1
    summary.labels += len(entry.labels)
    summary.splits[entry.split or ""] += 1
    summary.failed_labels += len(entry.bad_labels)
    for reason in entry.bad_labels:
        summary.problem(entry.file_name, reason)


def _inspect(entry: Entry) -> tuple[str, int, int]:
    """The sha256, width and height of an image file. Raises OSError or ValueError if it is none.

    Where the size is known only the head of the file is looked at: a damaged image is the business of whoever reads it,
    who names it in the result. A size that is not given is that of the picture as a viewer shows it (EXIF applied).
    """
    import cv2  # a tenth of a second that no other command needs

    with entry.path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if not cv2.haveImageReader(str(entry.path)):
        raise ValueError(f"{entry.path} is no image that can be read")
    if entry.width and entry.height:
        _check_size(entry)
        return sha256, entry.width, entry.height
    picture = cv2.imread(str(entry.path), cv2.IMREAD_COLOR)
    if picture is None:
        raise ValueError(f"{entry.path} cannot be decoded, and its annotation gives no size")
    return sha256, picture.shape[1], picture.shape[0]


def _check_size(entry: Entry) -> None:
    """Raise ValueError if the file says another size than its annotation: nobody would know where the boxes lie, and
    every training would skip it.
    """
    from PIL import ExifTags, Image

    known = (entry.width, entry.height)
    try:
        with Image.open(entry.path) as image:
            found = image.size
            # The labels may be about the picture as it lies in the file, or as a viewer turns it. Asked only then,
            # since of some formats Pillow reads all for it.
            turned = known == found[::-1] and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception:  # noqa: BLE001
        return  # OpenCV reads what Pillow does not, or stumbles over: it says so in errors of every kind.
    if known != found and not turned:
        raise ValueError(f"{entry.path} is {found[0]} x {found[1]} pixels; its annotation says {known[0]} x {known[1]}")


async def list_datasets(store: Store) -> list[dict[str, Any]]:
    """Each data set: `{dataset, images, splits: {split: images}}`; the split of images without one is `''`."""
    found: dict[str, dict[str, Any]] = {}
    for row in await store.records.datasets():
        entry = found.setdefault(row["dataset"], {"dataset": row["dataset"], "images": 0, "splits": {}})
        entry["images"] += row["images"]
        entry["splits"][row["split"] or ""] = row["images"]
    return list(found.values())


async def export_dataset(store: Store, name: str, folder: Path, on_progress: OnProgress) -> Summary:
    """Write data set `name` into `folder` in the COCO layout, so that importing it again gives the same data set.

    Raises DatasetError for an unknown data set, or if `folder` already has `annotations.json`.
    """
    total = sum(row["images"] for row in await list_datasets(store) if row["dataset"] == name)
    if not total:
        raise DatasetError(f"there is no data set {name!r}; see `dltask dataset list`")
    target = folder / "annotations.json"
    if target.exists():
        raise DatasetError(f"{target} exists; expected a folder without one")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    export = _Export(name)
    # The table's reader leaves `test` out unless it is asked for, so that nobody trains on it by accident.
    for split in (None, "test"):
        async with aclosing(store.records.images_of(name, split)) as batches:
            async for batch in batches:
                labels = await store.records.labels_of(batch)
                await _fetch_all(store, batch, folder / "images", export, lambda done: on_progress(done, total))
                for image in batch:
                    export.add(image, labels.get(str(image["_id"]), []))
    (folder / "split.json").write_bytes(orjson.dumps(export.splits, option=orjson.OPT_INDENT_2))
    # Last, since it is what makes the folder a data set.
    target.write_bytes(orjson.dumps(export.coco))
    return export.summary


class _Export:
    """A COCO document in the making."""

    def __init__(self, dataset: str) -> None:
        self.summary = Summary(dataset)
        self.coco: dict[str, Any] = {
            "info": {"description": dataset},
            "images": [],
            "annotations": [],
            "categories": [],
        }
        self.splits: dict[str, list[str]] = {}
        self.failed: set[Any] = set()
        self.done = 0
        self._names: set[str] = set()
        self._classes: dict[str, int] = {}

    def claim_name(self, name: Any) -> bool:
        """Whether an image can be written under its name; the first that asks has it."""
        if not name_is_safe(name) or name in self._names:
            return False
        self._names.add(name)
        return True

    def fail(self, image: Document, reason: str) -> None:
        """Leave this image out."""
        self.failed.add(image["_id"])
        self.summary.failed_images += 1
        self.summary.problem(f"{image.get('file_name')!r} ({image['_id']})", reason)

    def add(self, image: Document, labels: list[Document]) -> None:
        """Write down one image, unless it failed, and its labels."""
        if image["_id"] in self.failed:
            return
        image_id = len(self.coco["images"]) + 1
        size = {side: image.get(side) for side in ("width", "height")}
        self.coco["images"].append({"id": image_id, "file_name": image["file_name"], **size})
        if image.get("split"):
            self.splits.setdefault(image["split"], []).append(image["file_name"])
        self.summary.images += 1
        self.summary.splits[image.get("split") or ""] += 1
        for label in labels:
            box, name = box_of(label.get("bbox")), label.get("class_name")
            if box is None or not isinstance(name, str):
                self.summary.failed_labels += 1
                self.summary.problem(f"label {label['_id']}", f"class_name {name!r}, bbox {label.get('bbox')!r}")
                continue
            class_id = self._classes.setdefault(name, len(self._classes) + 1)
            if class_id > len(self.coco["categories"]):
                self.coco["categories"].append({"id": class_id, "name": name})
            self.coco["annotations"].append(
                {
                    "id": len(self.coco["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": class_id,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(label.get("crowd") is True),
                    "difficult": int(label.get("difficult") is True),
                }
            )
            self.summary.labels += 1


async def _fetch_all(
    store: Store, batch: list[Document], root: Path, export: _Export, on_image: Callable[[int], None]
) -> None:
    images = iter(batch)

    async def work() -> None:
        for image in images:
            name = image.get("file_name")
            if export.claim_name(name):
                path = root / str(name)
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    await store.files.images.fetch(image.get("file_id"), path)
                except (FileMissing, OSError) as error:
                    export.fail(image, str(error))
            else:
                export.fail(image, "its file name cannot be written, or another image has it")
            export.done += 1
            on_image(export.done)

    async with anyio.create_task_group() as group:
        for _ in range(_PARALLEL):
            group.start_soon(work)
