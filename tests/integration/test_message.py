"""The request message, built from real tables: complete, in order, equal for equal data, never whole in memory."""

import json
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import orjson
import pytest
from bson import Code, Decimal128, Int64, ObjectId
from pymongo.database import Database

from handlers.errors import PermanentError
from handlers.message import build_message, read_given
from handlers.store import Store
from schemas.enums import TaskErrorCode
from schemas.message import RequestMessage, from_coco, to_coco
from schemas.params import ParamClass
from schemas.task import Task

Db = Database[dict[str, Any]]


def image(number: int, **fields: Any) -> dict[str, Any]:
    """A row of IMG_INFO; ids rise with `number`."""
    return {
        "_id": ObjectId(f"{number:024x}"),
        "file_name": f"{number}.jpg",
        "width": 100,
        "height": 80,
        "file_id": ObjectId(f"{number + 0xF000:024x}"),
        "dataset": "toy",
        "split": "train",
        **fields,
    }


def label(image_number: int, class_name: Any = "a", bbox: Any = (1, 2, 3, 4), **fields: Any) -> dict[str, Any]:
    """A row of IMG_LAB_INFO."""
    box = list(bbox) if isinstance(bbox, tuple) else bbox
    return {"img_id": ObjectId(f"{image_number:024x}"), "class_name": class_name, "bbox": box, **fields}


def insert_task(db: Db, **fields: Any) -> Task:
    """A claimed task with these fields in its document."""
    document = {"task_id": Int64(7), "task_type": "TRAIN", "dataset": "toy", **fields}
    db.DL_TASK.delete_many({})
    key = db.DL_TASK.insert_one(dict(document)).inserted_id
    return Task(
        key=key,
        task_id=7,
        task_type=document["task_type"],
        params=ParamClass("m"),
        dataset=document["dataset"],
        split=document.get("split"),
        json_mongodb_id=None,
        owner="w",
        attempt=1,
        create_time=datetime.now(UTC),
        snapshot=None,
        batch_size_limit=None,
    )


async def build(store: Store, db: Db, folder: Path, **fields: Any) -> dict[str, Any]:
    """The parsed message of a task, checked against its schema."""
    path, refs = folder / "message.json", folder / "refs.jsonl"
    await build_message(store, insert_task(db, **fields), path, refs)
    text = await anyio.Path(path).read_bytes()
    checked = RequestMessage.model_validate_json(text)
    message: dict[str, Any] = json.loads(text)
    assert checked.model_dump(mode="json") == message
    assert sorted([path.name async for path in anyio.Path(folder).iterdir()]) == ["message.json", "refs.jsonl"]
    return message


def splits(message: dict[str, Any]) -> dict[str, list[int]]:
    """The numbers of the images in each split."""
    found: dict[str, list[int]] = {}
    for info in message["image_info"]:
        found.setdefault(info["split"], []).append(int(info["mongodb_id"], 16))
    return {split: sorted(numbers) for split, numbers in found.items()}


# ---- what is in it


async def test_members_stand_in_the_published_order_and_in_step(store: Store, db: Db, tmp_path: Path) -> None:
    """dataset_info, image_info, instance_info, class_info; instances follow the order of the images; ids from 1."""
    db.IMG_INFO.insert_many([image(3), image(1), image(2)])
    db.IMG_LAB_INFO.insert_many(
        [label(2, "b"), label(1, "a"), label(3, "c"), label(1, "b", crowd=True, difficult=True)]
    )
    message = await build(store, db, tmp_path)
    assert list(message) == ["dataset_info", "image_info", "instance_info", "class_info"]
    assert [(row["id"], int(row["mongodb_id"], 16)) for row in message["image_info"]] == [(1, 1), (2, 2), (3, 3)]
    assert [row["image_id"] for row in message["instance_info"]] == [1, 1, 2, 3]
    assert [row["id"] for row in message["instance_info"]] == [1, 2, 3, 4]
    names = {row["id"]: row["name"] for row in message["class_info"]}
    assert [names[row["class_id"]] for row in message["instance_info"]] == ["a", "b", "b", "c"]
    assert message["class_info"] == [
        {"id": 1, "name": "a", "instance_count": 1},
        {"id": 2, "name": "b", "instance_count": 2},
        {"id": 3, "name": "c", "instance_count": 1},
    ]
    second = message["instance_info"][1]
    assert (second["bbox"], second["area"], second["iscrowd"], second["difficult"]) == ([1, 2, 3, 4], 12, 1, 1)
    found = db.IMG_LAB_INFO.find_one({"crowd": True})
    assert found is not None
    assert second["mongodb_id"] == str(found["_id"])
    info = message["dataset_info"]
    assert (info["image_count"], info["instance_count"], info["class_count"]) == (3, 4, 3)
    assert (info["task_id"], info["task_type"], info["dataset"], info["split"]) == ("7", "TRAIN", "toy", "")
    refs = [json.loads(line) for line in (tmp_path / "refs.jsonl").read_text().splitlines()]
    assert refs == [
        {"id": n, "mongodb_id": str(image(n)["_id"]), "file_id": str(image(n)["file_id"])} for n in (1, 2, 3)
    ]
    assert from_coco(to_coco(message)) == message


async def test_images_by_id_keep_the_clients_order_and_come_once(store: Store, db: Db, tmp_path: Path) -> None:
    """ObjectIds and hex strings mixed, one twice; the data set they are in does not matter."""
    db.IMG_INFO.insert_many([image(1), image(2, dataset="other"), image(3)])
    text = f"{0xABCDEF:024x}"
    db.IMG_INFO.insert_one(image(4) | {"_id": text})
    db.IMG_LAB_INFO.insert_many([label(2), {"img_id": text, "class_name": "a", "bbox": [0, 0, 1, 1]}])
    ids = [str(image(3)["_id"]), image(2)["_id"], str(image(3)["_id"]).upper(), text.upper(), image(1)["_id"]]
    message = await build(store, db, tmp_path, img_mongodb_ids=ids, dataset=None)
    assert [row["mongodb_id"][-2:] for row in message["image_info"]] == ["03", "02", "ef", "01"]
    assert [row["image_id"] for row in message["instance_info"]] == [2, 3]


async def test_labels_that_name_their_image_by_hex_string(store: Store, db: Db, tmp_path: Path) -> None:
    """An image's labels are found under either form of its id."""
    db.IMG_INFO.insert_one(image(1))
    db.IMG_LAB_INFO.insert_many([label(1), label(1, "b") | {"img_id": str(image(1)["_id"])}])
    message = await build(store, db, tmp_path)
    assert sorted(row["name"] for row in message["class_info"]) == ["a", "b"]


BAD_LABELS: list[dict[str, Any]] = [
    label(1, bbox=(0, 0, 0, 5)),
    label(1, bbox=(0, 0, 5, -1)),
    label(1, bbox=(0, 0, float("nan"), 5)),
    label(1, bbox=(float("inf"), 0, 5, 5)),
    label(1, bbox=(0, 0, 1e200, 1e200)),
    label(1, bbox=(0, 0, 1e-200, 1e-200)),
    label(1, bbox=(0, 0, 5)),
    label(1, bbox="0 0 5 5"),
    label(1, bbox=("0", "0", "5", "5")),
    label(1, bbox=(0, 0, True, 5)),
    label(1, bbox=(0, 0, Decimal128("5"), 5)),
    label(1, bbox=None),
    label(1, class_name=""),
    label(1, class_name=None),
    label(1, class_name=5),
    label(1, class_name=Code("cell")),
    {"img_id": image(1)["_id"]},
]


async def test_labels_of_which_no_box_can_be_made_are_counted_and_ten_are_named(
    store: Store, db: Db, tmp_path: Path
) -> None:
    """Zero and overflowing areas, NaN, wrong types, no name: left out, with the reason; the good one stays."""
    db.IMG_INFO.insert_one(image(1))
    ids = db.IMG_LAB_INFO.insert_many([dict(bad) for bad in BAD_LABELS]).inserted_ids
    db.IMG_LAB_INFO.insert_one(label(1, bbox=(Int64(-5), 0.5, 3, 1e9)))
    message = await build(store, db, tmp_path)
    skipped = message["dataset_info"]["skipped_labels"]
    assert skipped["count"] == len(BAD_LABELS)
    assert [row["label_id"] for row in skipped["examples"]] == [str(i) for i in ids[:10]]
    assert all("bbox" in row["reason"] and row["img_id"] == str(image(1)["_id"]) for row in skipped["examples"])
    assert [row["bbox"] for row in message["instance_info"]] == [[-5, 0.5, 3, 1e9]]


async def test_odd_image_records_are_read_as_unknown(store: Store, db: Db, tmp_path: Path) -> None:
    """Sizes that are none become 0; a file id that is none is left for the reason it will get."""
    db.IMG_INFO.insert_many([image(1, width=-1, height="80"), image(2, width=100.0, height=float("nan"), file_id="x")])
    db.IMG_INFO.insert_one({"dataset": "toy"})
    message = await build(store, db, tmp_path)
    assert [(row["width"], row["height"]) for row in message["image_info"]] == [(0, 0), (100, 0), (0, 0)]
    refs = [json.loads(line) for line in (tmp_path / "refs.jsonl").read_text().splitlines()]
    assert [ref["file_id"] is None for ref in refs] == [False, True, True]


async def test_an_empty_choice_is_a_message_too(store: Store, db: Db, tmp_path: Path) -> None:
    """Images may all have gone since admission: the child says that too little is left."""
    message = await build(store, db, tmp_path, img_mongodb_ids=[ObjectId()])
    assert (message["image_info"], message["class_info"], message["dataset_info"]["image_count"]) == ([], [], 0)


# ---- which split


async def test_a_training_never_reads_the_test_split(store: Store, db: Db, tmp_path: Path) -> None:
    """A data set without a named split is all of it but `test`."""
    db.IMG_INFO.insert_many([image(1), image(2, split="test"), image(3, split=None), image(4, split="extra")])
    assert splits(await build(store, db, tmp_path)) == {"train": [1, 3, 4]}


async def test_the_validation_images_given_are_held_back(store: Store, db: Db, tmp_path: Path) -> None:
    """They come first, as `val`; one that is asked for as both is for validation only."""
    db.IMG_INFO.insert_many([image(n) for n in range(1, 31)] + [image(99, split="val")])
    ids = [image(n)["_id"] for n in range(1, 11)]
    chosen = [str(image(n)["_id"]) for n in (5, 20)]
    by_id = await build(store, db, tmp_path, img_mongodb_ids=ids, val_img_mongodb_ids=chosen)
    assert splits(by_id) == {"val": [5, 20], "train": [1, 2, 3, 4, 6, 7, 8, 9, 10]}
    by_name = await build(store, db, tmp_path, val_img_mongodb_ids=chosen, split="train")
    assert splits(by_name)["val"] == [5, 20]
    assert len(splits(by_name)["train"]) == 28


async def test_the_data_sets_own_validation_split_is_used(store: Store, db: Db, tmp_path: Path) -> None:
    """Also where only `train` is asked for; a tenth of `train` is not set apart then."""
    db.IMG_INFO.insert_many([image(n) for n in range(1, 31)] + [image(n, split="val") for n in (40, 41)])
    for split in ("train", None):
        found = splits(await build(store, db, tmp_path, split=split))
        assert found == {"val": [40, 41], "train": list(range(1, 31))}


async def test_else_a_seeded_tenth_is_set_apart_the_same_for_every_attempt(
    store: Store, db: Db, tmp_path: Path
) -> None:
    """Stratified by class: ten of each of two classes give one of each; images without boxes count too."""
    db.IMG_INFO.insert_many([image(n) for n in range(1, 31)])
    db.IMG_LAB_INFO.insert_many([label(n, "a" if n <= 10 else "b") for n in range(1, 21)])
    first = await build(store, db, tmp_path)
    found = splits(first)
    assert [(n - 1) // 10 for n in found["val"]] == [0, 1, 2]
    assert len(found["train"]) == 27
    assert splits(await build(store, db, tmp_path)) == found


async def test_fewer_than_twenty_images_are_all_for_training(store: Store, db: Db, tmp_path: Path) -> None:
    """Nineteen images: no validation images."""
    db.IMG_INFO.insert_many([image(n) for n in range(1, 20)])
    assert splits(await build(store, db, tmp_path)) == {"train": list(range(1, 20))}


async def test_every_image_of_a_test_is_in_the_test_split(store: Store, db: Db, tmp_path: Path) -> None:
    """By id or by data set and split; nothing is set apart."""
    db.IMG_INFO.insert_many([image(n, split="test") for n in range(1, 25)] + [image(40)])
    found = splits(await build(store, db, tmp_path, task_type="TEST", split="test"))
    assert found == {"test": list(range(1, 25))}
    ids = [image(40)["_id"], image(2)["_id"]]
    found = splits(await build(store, db, tmp_path, task_type="TEST", img_mongodb_ids=ids, dataset=None))
    assert found == {"test": [2, 40]}


# ---- the fingerprint


async def test_equal_data_has_an_equal_fingerprint(store: Store, db: Db, tmp_path: Path) -> None:
    """The same whatever the task's number and time; another after any change of an image, a label or a split."""
    db.IMG_INFO.insert_many([image(n) for n in range(1, 31)])
    db.IMG_LAB_INFO.insert_many([label(n) for n in range(1, 31)])

    async def fingerprint(**fields: Any) -> str:
        found: str = (await build(store, db, tmp_path, **fields))["dataset_info"]["fingerprint"]
        return found

    first = await fingerprint()
    assert first == await fingerprint()
    assert first == await fingerprint(task_id=Int64(99))
    assert first == await fingerprint(dataset=None, img_mongodb_ids=[image(n)["_id"] for n in range(1, 31)])
    seen = {first}
    for table, change in (
        ("IMG_INFO", {"file_id": ObjectId()}),
        ("IMG_LAB_INFO", {"class_name": "b"}),
        ("IMG_LAB_INFO", {"bbox": [1, 2, 3, 5]}),
        ("IMG_LAB_INFO", {"crowd": True}),
        ("IMG_LAB_INFO", {"difficult": True}),
    ):
        db[table].update_one({}, {"$set": change})
        seen.add(await fingerprint())
    db.IMG_LAB_INFO.delete_one({})
    seen.add(await fingerprint())
    seen.add(await fingerprint(val_img_mongodb_ids=[image(1)["_id"]]))
    assert len(seen) == 8


# ---- size


async def test_memory_does_not_grow_with_the_data_set(store: Store, db: Db, tmp_path: Path) -> None:
    """20,000 images with 5 labels each, a message of 18 MB: at most 16 MB of memory at any moment."""
    image_id = {"$toObjectId": "$hex"}
    size = {"width": {"$literal": 100}, "height": {"$literal": 80}}
    images = {"_id": image_id, "file_name": "$hex", **size, "file_id": image_id, "dataset": "big", "split": "train"}
    name = {"$concat": ["class ", {"$substrCP": ["$hex", 23, 1]}]}
    box = [{"$literal": side} for side in (12.25, 20.5, 30.75, 40.125)]
    labels = {"_id": 0, "img_id": image_id, "class_name": name, "bbox": box, "n": {"$range": [0, 5]}}
    number = {"$substrCP": [{"$toString": {"$add": [1_000_000, "$n"]}}, 1, 6]}
    for table, stages in (
        ("IMG_INFO", [{"$project": images}]),
        ("IMG_LAB_INFO", [{"$project": labels}, {"$unwind": "$n"}, {"$unset": "n"}]),
    ):
        db.aggregate(
            [
                {"$documents": [{"n": {"$range": [0, 20_000]}}]},
                {"$unwind": "$n"},
                {"$project": {"hex": {"$concat": ["0" * 18, number]}}},
                *stages,
                {"$out": table},
            ]
        )
    await store.indexes.create()  # $out made the tables anew
    assert db.IMG_LAB_INFO.count_documents({}) == 100_000
    task = insert_task(db, dataset="big")
    tracemalloc.start()
    try:
        await build_message(store, task, tmp_path / "message.json", tmp_path / "refs.jsonl")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    written = (await anyio.Path(tmp_path / "message.json").stat()).st_size
    assert written > 17e6
    assert peak < 16e6, f"{peak / 1e6:.1f} MB for a message of {written / 1e6:.1f} MB"


# ---- a given message


async def test_a_given_message_says_which_images_to_fetch(store: Store, db: Db, tmp_path: Path) -> None:
    """Ids as it has them; one that is not in IMG_INFO is listed without a file."""
    db.IMG_INFO.insert_many([image(1), image(0xAB)])
    path, refs = tmp_path / "given.json", tmp_path / "refs.jsonl"
    rows = [{"id": 5, "mongodb_id": f"{0xAB:024X}"}, {"id": 2, "mongodb_id": f"{1:024x}"}, {"id": 3, "mongodb_id": "x"}]
    path.write_bytes(orjson.dumps({"image_info": rows}))
    await read_given(store, path, refs)
    found = [json.loads(line) for line in refs.read_text().splitlines()]
    assert [(ref["id"], ref["file_id"]) for ref in found] == [
        (5, str(image(0xAB)["file_id"])),
        (2, str(image(1)["file_id"])),
        (3, None),
    ]


async def test_of_a_message_of_ours_no_label_is_read(store: Store, db: Db, tmp_path: Path) -> None:
    """A later attempt wants to know its images: the million labels behind them would take a gigabyte."""
    db.IMG_INFO.insert_many([image(1), image(2)])
    db.IMG_LAB_INFO.insert_many([label(1, '],\\n"instance_info": ['), label(2, "a")])
    await build(store, db, tmp_path)
    path, refs = tmp_path / "message.json", tmp_path / "refs.jsonl"
    expected = refs.read_bytes()
    images, between, _ = path.read_bytes().partition(b'"instance_info"')
    path.write_bytes(images + between + b": [ no labels at all")
    refs.unlink()
    await read_given(store, path, refs)
    assert refs.read_bytes() == expected


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"image_info": 5}',
        b'{"image_info": ["x"]}',
        b'{"image_info": [{"id": 1}]}',
        b'{"image_info": [{"id": "x", "mongodb_id": "y"}]}',
        b'{"image_info": [{"id": null, "mongodb_id": "y"}]}',
        b'{"image_info": [{"id": 1e999, "mongodb_id": "y"}]}',
        b'{"image_info": [{"id": 1, "mongodb_id": "x"}, {"id": 1, "mongodb_id": "y"}]}',
    ],
)
async def test_a_given_message_that_is_none(store: Store, tmp_path: Path, text: bytes) -> None:
    """Permanent, with the field and code 2, and a message that says what was expected."""
    (tmp_path / "given.json").write_bytes(text)
    with pytest.raises(PermanentError, match="expected JSON with dataset_info") as refused:
        await read_given(store, tmp_path / "given.json", tmp_path / "refs.jsonl")
    assert (refused.value.kind, refused.value.field) == ("data", "json_mongodb_id")
    assert refused.value.code is TaskErrorCode.JASON_MONGOID_INVALID


async def test_names_and_numbers_of_classes_are_bounded(store: Store, db: Db, tmp_path: Path) -> None:
    """What a result repeats of them must fit into the task's document: long names are skipped, too many end it."""
    db.IMG_INFO.insert_one(image(1))
    db.IMG_LAB_INFO.insert_many([label(1, "x" * 200), label(1, "x" * 201)])
    message = await build(store, db, tmp_path)
    assert [known["name"] for known in message["class_info"]] == ["x" * 200]
    assert "201 characters" in message["dataset_info"]["skipped_labels"]["examples"][0]["reason"]
    db.IMG_LAB_INFO.insert_many([label(1, f"c{number}") for number in range(5000)])
    with pytest.raises(PermanentError, match="more than 5000 classes") as raised:
        await build(store, db, tmp_path)
    assert raised.value.kind == "data"


async def test_images_under_ids_of_other_types(store: Store, db: Db, tmp_path: Path) -> None:
    """A document, a number, a binary: none of the interface's ids, so the image is listed, and not fetched."""
    keys: list[Any] = [{"a": 1}, 5, b"12", float("nan"), "x", ObjectId()]
    for number, key in enumerate(keys):
        db.IMG_INFO.insert_one({**image(number), "_id": key, "split": "val" if number % 2 else "train"})
    message = await build(store, db, tmp_path)
    assert len(message["image_info"]) == len(keys)
    refs = [json.loads(line) for line in (tmp_path / "refs.jsonl").read_text().splitlines()]
    assert [ref["mongodb_id"] for ref in refs if ref["file_id"] is not None] == [str(keys[-1])]


@pytest.mark.parametrize(
    "value", [0, -1, 1.0, 1e300, 10**300, 2**63, True, "1", None, [1], "../x"], ids=lambda v: f"{v!r:.9}"
)
async def test_the_id_of_an_image_in_a_given_message(store: Store, tmp_path: Path, value: Any) -> None:
    """It names a file and a row of results, so it is a whole number from 1 or the message is none."""
    path = tmp_path / "message.json"
    path.write_text(json.dumps({"image_info": [{"id": value, "mongodb_id": "0" * 24}]}))
    with pytest.raises(PermanentError, match="cannot be read") as raised:
        await read_given(store, path, tmp_path / "refs.jsonl")
    assert (raised.value.kind, raised.value.field) == ("data", "json_mongodb_id")
