"""A client that inserts tasks all the time, good and bad ones, and remembers what each must come to."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bson import ObjectId
from gridfs import GridFSBucket
from pymongo.database import Database
from pymongo.errors import DuplicateKeyError, PyMongoError

Document = dict[str, Any]

#: Of a task that is meant to succeed: so many that only a fault of ours uses them up.
_PATIENT = 50


@dataclass(frozen=True)
class Script:
    """A kind of task: what the stand-in child does, how often it is inserted, and how it may end."""

    behaviour: str
    weight: float
    #: The end states that are right for it, and the `error.kind`s if it is FAILED.
    ends: tuple[str, ...] = ("SUCCEEDED",)
    kinds: tuple[str, ...] = ()
    iterations: tuple[int, int] = (1, 10)
    max_attempts: int = _PATIENT
    #: Whether the client asks for its end while it waits or runs.
    cancelled: bool = False


#: Whatever a task is, the last of its faults can be that its worker died, or had no space left.
_ANY_FAULT = ("child_died", "hung", "lost_worker", "machine", "disk_full")

SCRIPTS = {
    "ok": Script("ok", 40),
    "test": Script("ok", 10),
    "slow": Script("ok", 6, iterations=(200, 800)),
    "garbage": Script("garbage", 2),
    "long line of 100 MB": Script("once-long_line", 1),
    "child crashes once": Script("once-crash", 3),
    "child hangs once": Script("once-silent", 1.5),
    "child talks without progress once": Script("once-chatter", 1.5),
    "child exits 0 without a result once": Script("once-nothing", 3),
    "child out of memory once": Script("once-out_of_memory", 2),
    "out of device memory": Script("memory", 2),
    # Its last fault can be one of another kind: its worker died, or the disk was full.
    "child crashes always": Script(
        "crash",
        1,
        ends=("FAILED",),
        kinds=("child_died", "lost_worker", "machine", "disk_full", "hung"),
        max_attempts=2,
    ),
    "data that cannot be used": Script("data", 2, ends=("FAILED",), kinds=("data",)),
    # It cannot kill a worker that is the first process of a container, and hangs there.
    "poison": Script(
        "poison",
        0.6,
        ends=("FAILED",),
        kinds=("lost_worker", "hung", "child_died", "machine", "disk_full"),
        max_attempts=2,
    ),
    "cancelled": Script("ok", 3, ends=("CANCELLED", "SUCCEEDED"), iterations=(20, 400), cancelled=True),
    "cancelled, ignores SIGTERM": Script(
        "deaf", 2, ends=("CANCELLED", "SUCCEEDED"), iterations=(100, 400), cancelled=True
    ),
    "rejected": Script("ok", 6, ends=("REJECTED",)),
    "copy of an ended task": Script("ok", 4, ends=("SUCCEEDED",)),
}


@dataclass
class Request:
    """One document that the client inserted, or tried to."""

    script: str
    key: ObjectId
    task_id: int
    #: Whether the server has said that it is there.
    acknowledged: bool = False


class Client:
    """Inserts into DL_TASK. Its requests are kept by `_id`."""

    def __init__(self, db: Database[Document], seed: int) -> None:
        self._db = db
        self._rng = random.Random(f"client {seed}")
        #: Taken by several threads at once: the client, and a storm.
        self._numbers = itertools.count(1)
        self.requests: dict[ObjectId, Request] = {}
        self._to_cancel: list[ObjectId] = []

    def prepare(self) -> None:
        """Put three images of the data set `toy` into the database."""
        for number in range(3):
            file_id = GridFSBucket(self._db, "images").upload_from_stream(f"{number}.jpg", b"not really a picture")
            image = {"file_name": f"{number}.jpg", "width": 32, "height": 32, "file_id": file_id, "dataset": "toy"}
            image_id = self._db.IMG_INFO.insert_one({**image, "split": "train"}).inserted_id
            self._db.IMG_LAB_INFO.insert_one({"img_id": image_id, "class_name": "a", "bbox": [1, 1, 8, 8]})

    def train_first(self) -> None:
        """Insert the training whose model the tests run."""
        document = self._document("ok")
        document["param_request"]["model_name"] = "ok.first"
        self.requests[document["_id"]] = Request("ok", document["_id"], document["task_id"], acknowledged=True)
        self._db.DL_TASK.insert_one(document)

    def insert_some(self, only: str | None = None) -> None:
        """Insert one task of a kind drawn by weight; now and then ask for a cancel."""
        name = only or self._rng.choices(list(SCRIPTS), [script.weight for script in SCRIPTS.values()])[0]
        self._insert(name)
        while self._to_cancel and self._rng.random() < 0.3:
            key = self._to_cancel.pop(self._rng.randrange(len(self._to_cancel)))
            self._tried(lambda key=key: self._db.DL_TASK.update_one({"_id": key}, {"$set": {"cancel_requested": True}}))

    def ask_for_cancels(self) -> None:
        """Ask for every cancel that is still to come."""
        for key in self._to_cancel:
            self._tried(lambda key=key: self._db.DL_TASK.update_one({"_id": key}, {"$set": {"cancel_requested": True}}))
        self._to_cancel.clear()

    def _insert(self, name: str) -> None:
        document = self._document(name)
        request = Request(name, document["_id"], document["task_id"])
        self.requests[request.key] = request
        try:
            self._db.DL_TASK.insert_one(document)
            request.acknowledged = True
        except DuplicateKeyError as error:
            # By the driver's own second try: the first had arrived.
            request.acknowledged = "_id" in (error.details or {}).get("keyPattern", {})
        except PyMongoError:
            pass
        if SCRIPTS[name].cancelled:
            self._to_cancel.append(request.key)

    def _document(self, name: str) -> Document:
        script = SCRIPTS[name]
        number = next(self._numbers)
        if name == "copy of an ended task" and (ended := self._ended()):
            return {**ended, "_id": ObjectId(), "task_id": number}
        document: Document = {
            "_id": ObjectId(),
            "task_id": number,
            "task_type": "TRAIN",
            "dataset": "toy",
            "max_attempts": script.max_attempts,
            "param_request": {
                # Many trainings of one name at once meet on its next version.
                "model_name": f"{script.behaviour}.{self._rng.randrange(5)}",
                "device_type": "CPU",
                "max_num_iters": self._rng.randint(*script.iterations),
                "snap_shot_ivterval": 100,
            },
        }
        if name == "test":
            document |= {"task_type": "TEST"}
            document["param_request"] = {"model_name": "ok.first:1", "device_type": "CPU"}
        if name == "rejected":
            self._rng.choice(_SPOILERS)(document)
        return document

    def _ended(self) -> Document | None:
        return self._tried(
            lambda: self._db.DL_TASK.find_one({"status": "SUCCEEDED", "param_request.model_name": {"$regex": "^ok"}})
        )

    @staticmethod
    def _tried(operation: Callable[[], Any]) -> Any:
        try:
            return operation()
        except PyMongoError:
            return None


def _spoil(field: str, value: object) -> Callable[[Document], None]:
    def spoil(document: Document) -> None:
        document[field] = value

    return spoil


_SPOILERS = (
    _spoil("task_type", "GUESS"),
    _spoil("param_request", {"model_name": "x", "batch_sise": 3}),
    _spoil("param_request", {"model_name": "../../etc/passwd"}),
    _spoil("param_request", 7),
    _spoil("img_mongodb_ids", ["f" * 24]),
    _spoil("json_mongodb_id", "f" * 24),
    _spoil("dataset", "nobody's"),
)
