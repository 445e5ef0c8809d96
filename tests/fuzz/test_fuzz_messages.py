"""Request messages of any content: the task ends with a reason, whichever reader meets it first."""

import copy
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gridfs import GridFSBucket
from hypothesis import strategies as st
from pymongo.database import Database

from handlers.detection.data import image_paths, load_samples, read_message
from handlers.detection.errors import DataError
from handlers.errors import PermanentError
from handlers.message import read_given
from handlers.store import connect_store
from tests.fuzz.conftest import Fuzz, Platform
from tests.fuzz.hostile import drawn
from tests.fuzz.watching import assert_calm
from tests.helpers import END_STATES, Service, train_request, wait_for

Db = Database[dict[str, Any]]

#: Tasks that are run on the messages drawn first; all are read.
TASKS = 60


class Literal(str):
    """What stands in JSON as it is, valid or not."""

    __slots__ = ()


#: Values of JSON that parsers disagree about, and some that only mean the wrong thing.
ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        1.0,
        0.5,
        -0.0,
        1e300,
        2**31,
        2**53 + 1,
        2**63 - 1,
        2**63,
        2**64,
        -(2**63),
        10**400,
    ),
    *map(Literal, ("1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1E400", "0x10", "01", "'x'", "undefined", "")),
    *map(Literal, ('"\\ud800"', '"\\u0000"', '"\\x"', '"\t"', "[" * 5000, "[" * 500 + "]" * 500, '{"a":' * 2000)),
    *("", "x", "0" * 24, "f" * 24, "Z" * 24, "\u202e", "../../etc/passwd", "/etc/passwd", "x" * 100_000, "5", "٣"),
    *([], [[]], {}, {"": {}}, [None], {"id": 1}, [1, 2, 3], [1, 2, 3, 4, 5], ["1", "2", "3", "4"], [0, 0, 0, 0]),
    *([-5, -5, 10, 10], [1, 1, 1e308, 1e308], [1e300, 1, 1e300, 1], [0.1] * 4, [1, 1, 5e-324, 5e-324]),
]


def written(value: Any) -> str:
    """`value` as JSON, literals as they are."""
    if isinstance(value, Literal):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


def good(image: str) -> dict[str, Any]:
    """A message about one image."""
    box = {"id": 1, "image_id": 1, "class_id": 1, "bbox": [1, 1, 8, 8], "area": 64, "iscrowd": 0, "difficult": 0}
    return {
        "dataset_info": {
            **{"task_id": "1", "task_type": "TRAIN", "dataset": "toy", "created": "2026-01-01T00:00:00.000+00:00"},
            **{"image_count": 1, "instance_count": 1, "class_count": 1, "split": "", "fingerprint": "0" * 64},
        },
        "image_info": [
            {"id": 1, "file_name": "a.jpg", "width": 32, "height": 32, "split": "train", "mongodb_id": image}
        ],
        "instance_info": [{**box, "mongodb_id": "0" * 24}],
        "class_info": [{"id": 1, "name": "a", "instance_count": 1}],
    }


def places(value: Any) -> list[tuple[Any, ...]]:
    """The way to each member, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way for key, item in items for way in ((key,), *((key, *rest) for rest in places(item)))]


@st.composite
def messages(draw: st.DrawFn, image: str) -> bytes:
    """A message in which something is wrong, or nothing of which is right."""
    message: Any = good(image)
    for _ in range(draw(st.integers(0, 2))):
        *path, last = draw(st.sampled_from(places(message)))
        holder = message
        for key in path:
            holder = holder[key]
        match draw(st.integers(0, 3)):
            case 0 if isinstance(holder, dict):
                del holder[last]
            case 1 if isinstance(holder, list):
                holder.extend(holder * draw(st.integers(1, 3)))
            case 2 if isinstance(holder, dict):
                holder[draw(st.text(max_size=5))] = copy.deepcopy(draw(st.sampled_from(ODD)))
            case _:
                holder[last] = copy.deepcopy(draw(st.sampled_from(ODD)))
    data = written(message).encode(errors="surrogatepass")
    match draw(st.integers(0, 9)):
        case 0:
            return data[: draw(st.integers(0, len(data)))]
        case 1:
            at = draw(st.integers(0, len(data)))
            return data[:at] + draw(st.binary(max_size=5)) + data[at:]
        case 2:
            return draw(st.binary(max_size=50))
        case 3:
            return written(draw(st.sampled_from(ODD))).encode()
        case 4:
            return data.decode(errors="replace").encode("utf-16")
        case _:
            return data


async def test_messages_of_any_content_are_read_or_refused(
    fuzz: Fuzz, db: Db, platform: Platform, mongo_uri: str, database_name: str, tmp_path: Path
) -> None:
    """By the worker, before it fetches the images, and by the child, which reads all of it: no other exception."""
    path, refs, listing = tmp_path / "message.json", tmp_path / "refs.jsonl", tmp_path / "images.jsonl"
    taken: Counter[str] = Counter()
    said: Counter[Any] = Counter()
    async with connect_store(mongo_uri, database_name) as store:
        for data in drawn(messages(str(platform.images[0])), fuzz.documents, fuzz.seed):
            path.write_bytes(data)
            try:
                await read_given(store, path, refs)
                taken["worker"] += 1
            except PermanentError as error:
                said[error.kind, error.field] += 1
            try:
                message = read_message(path)
                listing.write_text("".join(f'{{"id": {image.id}, "path": "/x"}}\n' for image in message.image_info))
                load_samples(message, image_paths(listing))
                taken["child"] += 1
            except DataError as error:
                said[str(error) != ""] += 1
    assert set(said) == {("data", "json_mongodb_id"), True}
    assert 0 < taken["child"] < taken["worker"] < fuzz.documents


def test_tasks_on_messages_of_any_content(
    fuzz: Fuzz, db: Db, platform: Platform, serve: Callable[..., Service], tmp_path: Path
) -> None:
    """Each task ends, SUCCEEDED or FAILED as `data`, and the worker goes on."""
    began = time.monotonic()
    service = serve(cpu_devices=4)
    numbers = itertools.count(1)
    for data in drawn(messages(str(platform.images[0])), max(TASKS, fuzz.documents // 20), fuzz.seed):
        given = GridFSBucket(db, "messages").upload_from_stream("m.json", data)
        kinds = {"task_type": "TEST"} if len(data) % 2 else {}
        db.DL_TASK.insert_one(train_request(next(numbers), iterations=1, **kinds, json_mongodb_id=given))
    wait_for(lambda: db.DL_TASK.count_documents({"status": {"$nin": END_STATES}}) == 0, 600)
    ends = Counter((task["status"], (task.get("error") or {}).get("kind")) for task in db.DL_TASK.find())
    assert set(ends) == {("SUCCEEDED", None), ("FAILED", "data")}
    assert service.stop() == 0
    assert_calm(service)
    fuzz.say(
        fuzz="messages",
        seed=fuzz.seed,
        read=fuzz.documents,
        tasks={f"{status} {kind or ''}".strip(): count for (status, kind), count in ends.items()},
        seconds=round(time.monotonic() - began),
    )
