"""Building the request message: which images, which boxes, which split, written down once for all attempts.

The outer loop goes over the records of IMG_INFO and builds `image_info`; the inner loop goes over that image's records
in IMG_LAB_INFO and builds `instance_info`, in step. `dataset_info` stands in front with counts that are known only
after the loop, so both lists are spooled to disk and joined at the end: no more than one batch is ever in memory.
"""

import hashlib
import math
import mmap
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import anyio
import anyio.to_thread
import orjson
from anyio.streams.memory import MemoryObjectSendStream

from handlers.errors import PermanentError
from handlers.store import Store
from handlers.store.database import Document
from handlers.store.records import Records
from schemas.enums import TaskErrorCode
from schemas.message import MAX_CLASS_NAME, MAX_CLASSES, MAX_SIDE, SCHEMA_VERSION, choose_validation, strata
from schemas.numbers import INT64_MAX
from schemas.task import Task, object_id

_SKIPS_NAMED = 10

#: Bytes copied at once.
_BLOCK = 1 << 20

#: What stands between the images and the labels.
_BETWEEN = b'],\n"instance_info": ['


@dataclass
class _Message:
    """A message in the making: two spools on disk, and what is counted on the way."""

    images: IO[bytes]
    instances: IO[bytes]
    image_count: int = 0
    instance_count: int = 0
    #: Name of each class, in the order in which they were met; a class id is its position from 1.
    classes: dict[str, int] = field(default_factory=dict)
    #: Boxes of each class, by its id.
    per_class: dict[int, int] = field(default_factory=dict)
    #: (image id, classes of its boxes) of the images whose split is still open.
    undecided: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    validation_images: int = 0
    skipped: int = 0
    skipped_examples: list[dict[str, str]] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, image: Document, labels: list[Document], split: str | None) -> None:
        """One turn of the outer loop, with the inner loop inside. Split None: to be decided at the end."""
        self.image_count += 1
        image_id, mongodb_id = self.image_count, str(image["_id"])
        seen: dict[int, int] = {}
        boxes, rows = [], []
        # By locals: it is done a million times, and reading the next batch waits for it.
        number, classes = self.instance_count, self.classes
        begin = b",\n" if number else b"\n"
        for label in labels:
            box = _box(label)
            if isinstance(box, str):
                self._skip(label, mongodb_id, box)
                continue
            number += 1
            name = label["class_name"]
            class_id = classes.get(name)
            if class_id is None:
                class_id = classes[name] = len(classes) + 1
                if class_id > MAX_CLASSES:
                    raise PermanentError("data", f"the labels have more than {MAX_CLASSES} classes")
            seen[class_id] = seen.get(class_id, 0) + 1
            x, y, w, h = box
            crowd = 1 if label.get("crowd") is True else 0
            difficult = 1 if label.get("difficult") is True else 0
            boxes.append((name, x, y, w, h, crowd, difficult))
            rows.append(
                {
                    "id": number,
                    "image_id": image_id,
                    "class_id": class_id,
                    "bbox": box,
                    "area": w * h,
                    "iscrowd": crowd,
                    "difficult": difficult,
                    "mongodb_id": str(label["_id"]),
                }
            )
        self.instance_count = number
        if rows:
            # All instances of an image at once: a call for each would take as long as the rest.
            self.instances.write(begin + orjson.dumps(rows)[1:-1])
        for class_id, count in seen.items():
            self.per_class[class_id] = self.per_class.get(class_id, 0) + count
        if split is None:
            self.undecided.append((image_id, tuple(seen)))
        elif split == "val":
            self.validation_images += 1
        self.digest.update(orjson.dumps([mongodb_id, str(image.get("file_id")), split, boxes]))
        _write(
            self.images,
            {
                "id": image_id,
                "file_name": str(image.get("file_name", "")),
                "width": _pixels(image.get("width")),
                "height": _pixels(image.get("height")),
                "split": split,
                "mongodb_id": mongodb_id,
            },
        )

    def _skip(self, label: Document, mongodb_id: str, reason: str) -> None:
        self.skipped += 1
        if len(self.skipped_examples) < _SKIPS_NAMED:
            self.skipped_examples.append({"label_id": str(label["_id"]), "img_id": mongodb_id, "reason": reason})

    def parts(self, task: Task, created: datetime) -> Iterator[bytes]:
        """The finished message, in pieces."""
        # Images set apart by hand or by the data set leave nothing to choose.
        chosen = choose_validation(strata(self.undecided)) if not self.validation_images else frozenset()
        self.digest.update(orjson.dumps(sorted(chosen)))
        info = {
            "task_id": str(task.task_id),
            "task_type": task.task_type,
            "dataset": task.dataset or "",
            "created": created.isoformat(timespec="milliseconds"),
            "image_count": self.image_count,
            "instance_count": self.instance_count,
            "class_count": len(self.classes),
            "split": task.split or "",
            "fingerprint": self.digest.hexdigest(),
            "schema_version": SCHEMA_VERSION,
            "skipped_labels": {"count": self.skipped, "examples": self.skipped_examples},
        }
        yield b'{"dataset_info": ' + orjson.dumps(info) + b',\n"image_info": ['
        self.images.seek(0)
        for image_id, line in enumerate(self.images, 1):
            # In no name: JSON escapes the quotes there.
            split = b'"split":"val"' if image_id in chosen else b'"split":"train"'
            yield (b"\n" if image_id == 1 else b",\n") + line.rstrip(b"\n").replace(b'"split":null', split)
        yield _BETWEEN
        self.instances.seek(0)
        yield from iter(lambda: self.instances.read(_BLOCK), b"")
        classes = [
            {"id": class_id, "name": name, "instance_count": self.per_class[class_id]}
            for name, class_id in self.classes.items()
        ]
        yield b'],\n"class_info": ' + orjson.dumps(classes) + b"}\n"


async def build_message(store: Store, task: Task, path: Path, refs: Path) -> None:
    """Write the request message of `task` to `path` as JSON (`schemas.message.RequestMessage` is its form).

    `refs` gets a JSON line an image, `{"id", "mongodb_id", "file_id"}`: where its bytes are in GridFS.
    """
    spools = path.with_suffix(".images"), path.with_suffix(".instances")
    with (
        spools[0].open("w+b") as images,
        spools[1].open("w+b") as instances,
        refs.open("wb") as references,
        path.open("wb") as out,
    ):
        message = _Message(images, instances)

        def add(batch: _Batch) -> None:
            for image in batch.images:
                message.add(image, batch.labels.get(str(image["_id"]), []), batch.split)
                _write(references, image_ref(message.image_count, str(image["_id"]), image.get("file_id")))

        # The server looks for the next batch while this one is written; in a thread, since a tenth of a second of it
        # would keep other tasks waiting for their admission.
        send, receive = anyio.create_memory_object_stream[_Batch](0)
        try:
            async with anyio.create_task_group() as group, receive:
                group.start_soon(_read, store, task, send)
                async for batch in receive:
                    await anyio.to_thread.run_sync(add, batch)
        except ExceptionGroup as errors:
            # Of the two only the first to fail: it ends the other. Callers know it by its own type.
            raise errors.exceptions[0] from None
        created = await store.database.now()
        await anyio.to_thread.run_sync(lambda: out.writelines(message.parts(task, created)))
    for spool in spools:
        spool.unlink()


@dataclass(frozen=True)
class _Batch:
    """Image records with their labels, by hex image id."""

    images: list[Document]
    labels: dict[str, list[Document]]
    #: None is to be decided at the end.
    split: str | None


async def _read(store: Store, task: Task, send: MemoryObjectSendStream[_Batch]) -> None:
    async with send, aclosing(_images(store, task)) as batches:
        async for images, split in batches:
            await send.send(_Batch(images, await store.records.labels_of(images), split))


async def read_given(store: Store, path: Path, refs: Path) -> None:
    """Write `refs` (see `build_message`) for a message that lies at `path`. Raises PermanentError if it is none.

    Only what is needed to fetch the images is looked at; the child checks the rest when it reads the message.
    """
    try:
        listed = await anyio.to_thread.run_sync(_image_info, path)
        images = [(_image_id(image["id"]), str(image["mongodb_id"]).lower()) for image in listed]
        if len({image_id for image_id, _ in images}) < len(images):
            raise ValueError("two images have one id")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise PermanentError(
            "data",
            f"the request message cannot be read: {error!r}; expected JSON with dataset_info, image_info, "
            "instance_info and class_info",
            field="json_mongodb_id",
            code=TaskErrorCode.JASON_MONGOID_INVALID,
        ) from None
    files = await store.records.file_ids([mongodb_id for _, mongodb_id in images])
    with refs.open("wb") as out:
        for image_id, mongodb_id in images:
            _write(out, image_ref(image_id, mongodb_id, files.get(mongodb_id)))


def _image_info(path: Path) -> Any:
    """The images of a message; of one that we wrote without the labels behind them, ten times as many mostly."""
    with path.open("rb") as file:
        if path.stat().st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                # A line's end like that is in no text: JSON escapes it there.
                end = data.find(_BETWEEN)
                if end >= 0:
                    return orjson.loads(data[:end] + b"]}")["image_info"]
        return orjson.loads(file.read())["image_info"]


def _image_id(value: Any) -> int:
    # It names a file, and is told in results.
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= INT64_MAX:
        raise ValueError(f"the id of an image is {value!r:.80}; expected a whole number from 1")
    return value


def image_ref(image_id: int, mongodb_id: str, file_id: Any) -> dict[str, Any]:
    """One line of a `refs` file. An image or a file under an `_id` that is no ObjectId is none of the interface's, and
    is not fetched: the child skips it and says so.
    """
    known = object_id(mongodb_id) is not None and object_id(file_id) is not None
    return {"id": image_id, "mongodb_id": mongodb_id, "file_id": str(file_id) if known else None}


async def _images(store: Store, task: Task) -> AsyncGenerator[tuple[list[Document], str | None], None]:
    """The records of IMG_INFO that the task asks for, in batches, each with the split that its images are in.

    Validation images are those given, else the data set's `val` split, else (None here) to be chosen. An image that is
    asked for as both is for validation: what is measured must not have been trained on.
    """
    tasks, records = store.tasks, store.records
    ids = await tasks.image_ids(task.key, "img_mongodb_ids")
    if task.task_type == "TEST":
        async with aclosing(records.images_by_id(ids) if ids else _dataset(records, task)) as batches:
            async for batch in batches:
                yield batch, "test"
        return

    val_ids = await tasks.image_ids(task.key, "val_img_mongodb_ids")
    if val_ids:
        validation: AsyncGenerator[list[Document], None] | None = records.images_by_id(val_ids)
    elif task.dataset and task.split != "val" and await records.has_images(task.dataset, "val"):
        validation = records.images_of(task.dataset, "val")
    else:
        validation = None
    # As text: the `_id` of a platform's record can be a document, which no set takes.
    held_back: set[str] = set()
    if validation is not None:
        async with aclosing(validation) as batches:
            async for batch in batches:
                held_back.update(str(image["_id"]) for image in batch)
                yield batch, "val"
    async with aclosing(records.images_by_id(ids) if ids else _dataset(records, task)) as batches:
        async for batch in batches:
            yield [image for image in batch if str(image["_id"]) not in held_back], "train" if held_back else None


def _dataset(records: Records, task: Task) -> AsyncGenerator[list[Document], None]:
    return records.images_of(task.dataset or "", task.split)


def _box(label: Document) -> Sequence[float] | str:
    """Left, top, width and height of a label in pixels, or why no box can be made of it."""
    name, bbox = label.get("class_name"), label.get("bbox")
    if type(name) is str and 0 < len(name) <= MAX_CLASS_NAME and type(bbox) is list and len(bbox) == 4:
        # What nearly all are, in a third of the time that it takes to say what is wrong with the others.
        x, y, w, h = bbox
        if type(x) is type(y) is type(w) is type(h) is float and w > 0 < w * h < math.inf and math.isfinite(x + y):
            return bbox
    # Not what merely derives from it: BSON has code as a text of its own, which no dictionary takes.
    if type(name) is not str or not name:
        return f"class_name is {name!r}"[:100]
    if len(name) > MAX_CLASS_NAME:
        return f"class_name has {len(name)} characters; expected at most {MAX_CLASS_NAME}"
    if not isinstance(bbox, list) or len(bbox) != 4:
        return f"bbox is {bbox!r}"[:100]
    if not all(isinstance(side, int | float) and not isinstance(side, bool) and math.isfinite(side) for side in bbox):
        return f"bbox is {bbox!r}"[:100]
    # The product too: that of two tiny sides is 0, and that of two huge ones no number in JSON.
    if bbox[2] <= 0 or bbox[3] <= 0 or not 0 < float(bbox[2]) * bbox[3] < math.inf:
        return f"bbox {bbox!r} has no area"[:100]
    return [float(side) for side in bbox]


def _pixels(value: Any) -> int:
    """A recorded width or height, 0 if it is none."""
    whole = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_SIDE
    return int(value) if whole else 0


def _write(spool: IO[bytes], row: dict[str, Any]) -> None:
    spool.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
