"""Rows of the image and the label table of any content: tasks on them run, without the rows of which nothing can be
made, or end with a reason."""

import itertools
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bson import DatetimeMS, Decimal128, Int64, ObjectId
from bson.errors import BSONError
from gridfs import GridFSBucket
from hypothesis import strategies as st
from pymongo.database import Database
from pymongo.errors import PyMongoError

from handlers.detection.data import image_paths, load_samples, read_message
from handlers.errors import PermanentError
from handlers.images import ImageCache
from handlers.message import build_message
from handlers.store import connect_store
from handlers.store.database import StoreError, refused
from schemas.params import ParamClass
from schemas.task import Task
from tests.fuzz.conftest import Fuzz, Platform
from tests.fuzz.hostile import NUMBER, VALUES, Filled, drawn, fill
from tests.fuzz.raw_bson import raw_document
from tests.fuzz.watching import assert_calm, raw
from tests.helpers import END_STATES, Service, train_request, wait_for

Db = Database[dict[str, Any]]

FILE, NO_FILE = Filled("FILE"), Filled("NO_FILE")

#: Sides and numbers that boxes are made of.
SIDES = st.sampled_from(
    [1, 5, 0, -1, 2**31, 2**62, Int64(3), 0.5, 1e308, 5e-324, -1e300, float("nan"), float("inf"), "5", None, True]
) | st.sampled_from([Decimal128("5"), [1], {"x": 1}, DatetimeMS(2**60)])

BOXES = st.lists(SIDES, min_size=4, max_size=4) | st.lists(SIDES, max_size=6) | VALUES

NAMES = (
    st.sampled_from(["a", "b", "", "x" * 200, "x" * 201, "x" * 100_000, "\u202e", "\x00", 5, None, ["a"], "a.b"])
    | VALUES
)

#: `_id`s of images: half are those of the interface, and of the others most are unique.
KEYS = st.none() | VALUES.map(lambda value: {"n": NUMBER, "of": value}) | VALUES


@st.composite
def images(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An image with one thing or another wrong, and labels of it."""
    image: dict[str, Any] = {"file_name": "a.jpg", "width": 32, "height": 32, "file_id": FILE, "split": "train"}
    for name in draw(st.lists(st.sampled_from([*image, "extra"]), max_size=2)):
        image[name] = draw(VALUES | SIDES | st.sampled_from([NO_FILE, ObjectId(), "train", "val", "../../x"]))
    if draw(st.integers(0, 3)) == 0:
        image.pop(draw(st.sampled_from(sorted(image))))
    key = draw(KEYS)
    labels = []
    for _ in range(draw(st.integers(0, 3))):
        label = {"class_name": "a", "bbox": [1, 1, 8, 8]}
        label[draw(st.sampled_from(["class_name", "bbox", "difficult", "crowd"]))] = draw(VALUES)
        if draw(st.booleans()):
            label["bbox"] = draw(BOXES)
        if draw(st.booleans()):
            label["class_name"] = draw(NAMES)
        labels.append(label)
    return ({"_id": key, **image} if key is not None else image), labels


class Tables:
    """The tables, filled row by row."""

    def __init__(self, db: Db) -> None:
        self._db = db
        self._numbers = itertools.count(1)
        bucket = GridFSBucket(db, "images")
        self._files = [bucket.upload_from_stream("a.jpg", b"not really a picture") for _ in range(5)]
        # Records of files that are none: of another length, without chunks, of other types.
        self._broken = [bucket.upload_from_stream("a.jpg", b"x" * 100) for _ in range(8)]
        spoilt = (
            {"length": 99},
            {"length": "x"},
            {"chunkSize": 0},
            {"chunkSize": "x"},
            {"length": -1},
            {"uploadDate": 5},
        )
        for file_id, change in zip(self._broken, spoilt, strict=False):
            db["images.files"].update_one({"_id": file_id}, {"$set": change})
        db["images.files"].update_one({"_id": self._broken[6]}, {"$unset": {"length": "", "chunkSize": ""}})
        db["images.chunks"].update_one({"files_id": self._broken[7]}, {"$set": {"data": "x"}})
        self.refused = 0

    def insert(self, dataset: str, image: dict[str, Any], labels: list[dict[str, Any]]) -> None:
        number = next(self._numbers)
        files, broken = self._files, self._broken
        known = {FILE: files[number % len(files)], NO_FILE: broken[number % len(broken)], NUMBER: number}
        row = fill({"_id": ObjectId(), **image, "dataset": dataset}, known)
        try:
            raw(self._db, "IMG_INFO").insert_one(raw_document(row))
            for label in labels:
                label_row = {"_id": ObjectId(), "img_id": row["_id"], **fill(label, known)}
                raw(self._db, "IMG_LAB_INFO").insert_one(raw_document(label_row))
        except (PyMongoError, BSONError):
            self.refused += 1


async def test_a_message_is_built_of_rows_of_any_content(
    fuzz: Fuzz, db: Db, platform: Platform, mongo_uri: str, database_name: str, tmp_path: Path
) -> None:
    """The child can read each message that the worker builds, and every image has a file or a reason."""
    tables = Tables(db)
    each, built, why = 20, 0, Counter[str]()
    rows = drawn(images(), fuzz.documents, fuzz.seed)
    async with connect_store(mongo_uri, database_name) as store:
        await store.indexes.create()
        cache = ImageCache(tmp_path / "cache", max_bytes=1 << 20)
        for number, start in enumerate(range(0, len(rows), each)):
            for image, labels in rows[start : start + each]:
                tables.insert(f"d{number}", image, labels)
            folder = tmp_path / str(number)
            folder.mkdir()
            task = Task(
                **{"key": number, "task_id": number, "task_type": "TEST" if number % 2 else "TRAIN", "split": None},
                **{"params": ParamClass("m"), "dataset": f"d{number}", "json_mongodb_id": None, "snapshot": None},
                **{"owner": "w", "attempt": 1, "create_time": datetime.now(UTC), "batch_size_limit": None},
            )
            message, refs = folder / "message.json", folder / "refs.jsonl"
            try:
                await build_message(store, task, message, refs)
                listing = await cache.fetch(store, refs, folder)
            except PermanentError as error:
                why[error.kind] += 1
                continue
            except StoreError as error:
                # A row that is no valid BSON, where nothing can be told apart.
                why[str(error).partition(":")[0] if refused(error) else "away"] += 1
                continue
            read = read_message(message)
            samples, skipped = load_samples(read, image_paths(listing))
            assert len(samples) + len(skipped) == len(read.image_info)
            assert all(skip.reason for skip in skipped)
            built += 1
    assert built > 0
    assert set(why) <= {"a document is no valid BSON"}
    fuzz.say(
        fuzz="rows", seed=fuzz.seed, images=len(rows), refused_by_server=tables.refused, built=built, not_built=why
    )


def test_tasks_on_rows_of_any_content(fuzz: Fuzz, db: Db, platform: Platform, serve: Callable[..., Service]) -> None:
    """Each training and test ends, SUCCEEDED or FAILED with a reason, or is rejected; the worker goes on."""
    began = time.monotonic()
    tables, numbers = Tables(db), itertools.count(1)
    service = serve(cpu_devices=4)
    rows = drawn(images(), max(300, fuzz.documents // 10), fuzz.seed + 1)
    for number, start in enumerate(range(0, len(rows), 15)):
        for image, labels in rows[start : start + 15]:
            tables.insert(f"d{number}", image, labels)
        for kind in ("TRAIN", "TEST"):
            request = train_request(next(numbers), iterations=1, task_type=kind)
            db.DL_TASK.insert_one({**request, "dataset": f"d{number}", "split": None})
    wait_for(lambda: db.DL_TASK.count_documents({"status": {"$nin": END_STATES}}) == 0, 600)
    ends = Counter((task["status"], (task.get("error") or {}).get("kind")) for task in db.DL_TASK.find())
    assert set(ends) <= {
        ("SUCCEEDED", None),
        ("FAILED", "data"),
        ("FAILED", "database"),
        ("REJECTED", "IMAG_MONGOID_INVALID"),
    }
    assert service.stop() == 0
    assert_calm(service)
    fuzz.say(
        fuzz="tasks on rows",
        seed=fuzz.seed,
        images=len(rows),
        tasks={f"{status} {kind or ''}".strip(): count for (status, kind), count in ends.items()},
        seconds=round(time.monotonic() - began),
    )
