"""Raw documents of any content are inserted while the service runs: each gets its answer, and none does harm."""

import contextlib
import itertools
import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bson
import pytest
from bson import ObjectId
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument
from pymongo.database import Database
from pymongo.errors import PyMongoError

from handlers.store.database import CODEC
from tests.fuzz.conftest import Fuzz, Platform
from tests.fuzz.hostile import ALL_CODES, HEX_IMAGE, IMAGE, MESSAGE, NUMBER, OWN_ID, Case, fill, nested, storm
from tests.fuzz.raw_bson import Pairs, encoded
from tests.fuzz.watching import assert_calm, decoded, first_element, memory, raw
from tests.helpers import END_STATES, Service, ended, train_request

Db = Database[dict[str, Any]]

DEVICES = 4

#: A number that no hostile document has; of enough of them, one has 1.
UNUSED = 987_654_321_987

#: A task that trains longer is cancelled.
LONG = 20

#: What the service may take above what it has at its start. At most: four documents are admitted at once, of up to 12
#: MB each, and a document of small values takes about twelve times its size once it is decoded, beside its bytes, which
#: come twice (from the socket, and cut out of the answer). Left at the end: freed memory that the C library keeps.
MEMORY_MOST_MB, MEMORY_LEFT_MB = 4 * (12 * 12 + 2 * 16), 300

#: Seconds in which the service must have answered or ended at least one more document, or is taken to be stuck.
PATIENCE = 180

MB = 1 << 20

#: Bytes of each document that are remembered.
CUT = 10_000


def big_cases(images: list[Any], *, everything: bool) -> list[Case]:
    """Documents of 5 to 16 MB, in shapes that cost their reader much."""

    def case(kind: str, state: str, codes: set[int], **fields: Any) -> Case:
        return Case(kind, {**train_request(0), "task_id": NUMBER, **fields}, {state}, codes)

    few = [
        case("500,000 unknown ids", "REJECTED", {3}, img_mongodb_ids=[ObjectId(b"x" * 12)] * 500_000),
        case("documents for ids", "REJECTED", {3}, img_mongodb_ids=[{"": {}}] * 550_000),
        case("parameters", "REJECTED", {7}, param_request={f"p{n}": n for n in range(700_000)}),
        case("junk text", "REJECTED", {7}, junk="x" * (15 * MB)),
        case("status", "SUCCEEDED", set(), status=["RUNNING"] * 400_000),
        # The largest that the server takes: beside its copy in `admitted_id` there is no room for an answer.
        Case("_id of 8 MB", {"_id": "x" * (8 * MB - 50), **train_request(0), "task_id": NUMBER}, {"NEW"}, set()),
    ]
    if not everything:
        return few
    return [
        *few,
        case("500,000 known ids", "SUCCEEDED", set(), img_mongodb_ids=[images[0]] * 500_000, dataset=None),
        case("hex ids", "REJECTED", {3}, img_mongodb_ids=["0" * 24] * 400_000),
        case("numbers for ids", "REJECTED", {3}, img_mongodb_ids=[1] * 850_000),
        case("junk that is small enough", "SUCCEEDED", set(), junk="x" * (11 * MB)),
        case("nested junk", "REJECTED", {7}, junk=[nested(50)] * 35_000),
        case("task_id", "REJECTED", {7}, task_id="1" * (13 * MB)),
        case("task_id of many", "REJECTED", {4}, task_id=[0.5] * 600_000),
        case("model_name", "REJECTED", {7}, param_request={"model_name": "x" * (11 * MB)}),
        Case("_id of 5 MB", {"_id": "x" * (5 * MB), **train_request(0), "task_id": NUMBER}, {"SUCCEEDED"}, set()),
        Case("_id of 7 MB", {"_id": "x" * (7 * MB), **train_request(0), "task_id": NUMBER}, {"SUCCEEDED"}, set()),
    ]


class Rain:
    """The documents, as they are inserted, and what the server made of them."""

    def __init__(self, db: Db, platform: Platform) -> None:
        self._tasks = raw(db)
        self._platform = platform
        self._numbers = itertools.count(1000)
        self.tried = 0
        #: The first of each `_id`, by its bytes; the server has refused some.
        self.sent: dict[bytes, tuple[Case, bytes]] = {}

    def document(self, case: Case) -> RawBSONDocument:
        items = case.document.items if isinstance(case.document, Pairs) else tuple(case.document.items())
        key: Any = ObjectId()
        known = {NUMBER: next(self._numbers), MESSAGE: self._platform.message, OWN_ID: key}
        known |= {IMAGE: self._platform.images[0], HEX_IMAGE: str(self._platform.images[1])}
        if not any(name == "_id" for name, _ in items):
            items = (("_id", key), *items)
        return RawBSONDocument(encoded(fill(Pairs(items), known)))

    def insert(self, cases: list[Case], size: int = 100) -> None:
        """Insert them, `size` at once; what the server refuses is not there, and there is no more to it."""
        for start in range(0, len(cases), size):
            batch = [(case, self.document(case)) for case in cases[start : start + size]]
            for case, document in batch:
                self.tried += 1
                self.sent.setdefault(first_element(document.raw), (case, bytes(document.raw)[:CUT]))
            documents = [document for _, document in batch]
            try:
                self._tasks.insert_many(documents, ordered=False)
            except (PyMongoError, BSONError):
                # One that the server cannot even parse costs all that are sent with it.
                for document in documents:
                    with contextlib.suppress(PyMongoError, BSONError):
                        self._tasks.insert_one(document)


@dataclass(frozen=True)
class Found:
    """What stands in a document at the end, as far as it is the service's to write."""

    state: str
    error_code: Any
    error: Any
    end_time: Any

    @property
    def open(self) -> bool:
        """Whether it waits for the service."""
        return self.state in ("NEW", "PENDING") or (self.state == "RUNNING" and self.error_code == 0)


def look(db: Db) -> dict[bytes, Found]:
    """Every document, by the bytes of its `_id`; NEW until this very document has been answered."""
    fields = dict.fromkeys(("status", "error_code", "error.kind", "error.message", "end_time"), True)
    # By queries alone: what an aggregation gives back of an `_id` in which a key comes twice is another one.
    not_its_own = {"$expr": {"$ne": ["$admitted_id", "$_id"]}}
    new = {first_element(document.raw) for document in raw(db).find(not_its_own, {"_id": True})}
    seen = {}
    for document in raw(db).find({}, fields):
        key = first_element(document.raw)
        if key in new:
            seen[key] = Found("NEW", None, None, None)
            continue
        try:
            found = decoded(document)
        except BSONError:
            seen[key] = Found("unreadable", None, None, None)
            continue
        seen[key] = Found(str(found.get("status")), found.get("error_code"), found.get("error"), found.get("end_time"))
    return seen


def settle(db: Db, service: Service, rain: Rain) -> dict[bytes, Found]:
    """Wait until everything that can end has ended; what trains for long, or needs more than there is, is cancelled."""
    long = {"param_request.max_num_iters": {"$gt": LONG}}
    large = {"param_request.device_num": {"$gt": DEVICES}}
    unfinished = {"status": {"$in": ["PENDING", "RUNNING"]}, "cancel_requested": {"$ne": True}}
    before, moved = Counter[str](), time.monotonic()
    while True:
        db.DL_TASK.update_many({**unfinished, "$or": [long, large]}, {"$set": {"cancel_requested": True}})
        found = look(db)
        open_cases = [
            rain.sent[key] for key, one in found.items() if one.open and one.state not in rain.sent[key][0].states
        ]
        if not open_cases:
            return found
        now = Counter(one.state for one in found.values())
        if now != before:
            before, moved = now, time.monotonic()
        assert service.process.poll() is None, service.log.read_text()[-5000:]
        assert time.monotonic() < moved + PATIENCE, (now, open_cases[:5])
        time.sleep(1)


def as_drivers_write(document: bytes) -> bool:
    """Whether a driver would write what it reads there: no field twice, no binary that lies, no text but UTF-8."""
    try:
        return len(bson.encode(bson.decode(document, CODEC))) == len(document)
    except BSONError:
        return False


def problems(case: Case, document: bytes, found: Found) -> list[str]:
    """What is wrong with how this document ended."""
    states, codes = case.states, case.codes or ALL_CODES
    if len(document) < CUT and not as_drivers_write(document):
        # One that no two drivers read alike is no document, whatever it wants.
        states, codes = states | {"REJECTED"}, codes | {7}
    if found.state not in states:
        return [f"{found.state} instead of {states}"]
    if found.state in END_STATES and case.kind != "forged admission":
        if found.end_time is None:
            return ["no end_time"]
        if found.state == "REJECTED":
            if found.error_code not in codes:
                return [f"code {found.error_code} instead of {codes}"]
            if not found.error["message"]:
                return ["no message"]
        if found.state == "FAILED" and case.failed_as not in (None, found.error["kind"]):
            return [f"failed as {found.error['kind']} instead of {case.failed_as}"]
    return []


def copies(db: Db, count: int) -> list[Case]:
    """Copies of finished documents: half of them with a number of their own, the others are refused by the server."""
    made = []
    ended_ones = {
        "status": {"$in": ["SUCCEEDED", "FAILED", "CANCELLED"]},
        "$expr": {"$lt": [{"$bsonSize": "$$ROOT"}, 10_000]},
    }
    for place, document in enumerate(raw(db).find(ended_ones).limit(count)):
        copy = decoded(document)
        if place % 2:
            copy["task_id"] = NUMBER
        made.append(Case("copy", copy, set(END_STATES)))
    return made


@pytest.mark.usefixtures("roomy")
def test_documents_of_any_content(
    fuzz: Fuzz,
    db: Db,
    platform: Platform,
    serve: Callable[..., Service],
    dltask: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Each document that the server takes is answered or runs, as its content demands. The service lives, remembers
    nothing of them, has no exception in its log, answers a good document afterwards, and ends in peace."""
    began = time.monotonic()
    cases = storm(fuzz.documents, fuzz.seed)
    rain = Rain(db, platform)
    # A first start makes the indexes, one of which lets no number come twice.
    assert serve().stop() == 0
    # Some before anybody looks: what a service finds when it starts, and `dltask` without one.
    early, late = cases[: len(cases) // 20], cases[len(cases) // 20 :]
    rain.insert(early)
    dltask("status")
    json.loads(dltask("status", "--json").stdout)

    service = serve(cpu_devices=DEVICES, gpu_fallback="cpu", lease_seconds=3)
    at_start = memory(service, "VmRSS")
    rain.insert(late[: len(late) // 2])
    rain.insert(big_cases(platform.images, everything=fuzz.documents >= 10_000), size=1)
    rain.insert(late[len(late) // 2 :])
    settle(db, service, rain)
    rain.insert(copies(db, 50))
    found = settle(db, service, rain)

    wrong = [
        (problem, case.kind, found[key].error, document[:1500])
        for key, (case, document) in rain.sent.items()
        if key in found
        for problem in problems(case, document, found[key])
    ]
    assert not wrong, "\n".join(str(one)[:2000] for one in wrong[:10])
    at_most, at_end = memory(service, "VmHWM") - at_start, memory(service, "VmRSS") - at_start

    # Behind everything that may still wait, forged priorities included.
    db.DL_TASK.insert_one(train_request(UNUSED, priority=-(2**31)))
    assert ended(db, UNUSED)["status"] == "SUCCEEDED"
    ask_about(db, dltask)
    assert service.stop() == 0
    assert_calm(service)

    codes = Counter(str(one.error_code) for one in found.values() if one.state == "REJECTED")
    fuzz.say(
        fuzz="documents",
        seed=fuzz.seed,
        inserted=len(found),
        refused_by_server=rain.tried - len(found),
        # What else a client wrote there, beside a forged admission, is nothing of ours.
        states=dict(
            Counter(one.state if one.state in (*END_STATES, "NEW", "PENDING") else "other" for one in found.values())
        ),
        rejected_by_code=dict(sorted(codes.items())),
        seconds=round(time.monotonic() - began),
        memory_mb={"start": at_start, "most_above": at_most, "end_above": at_end},
    )
    assert at_most < MEMORY_MOST_MB
    assert at_end < MEMORY_LEFT_MB


def ask_about(db: Db, dltask: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Every command that reads tasks, about some of each state, and some with a strange `_id`."""
    json.loads(dltask("status", "--json", "--limit", "1000").stdout)
    assert dltask("status", "--limit", "1000").stdout
    # A list is compared by each of its members.
    one_number = {"$gte": 0, "$lt": 2**63 - 1, "$not": {"$type": "array"}}
    numbers = {"task_id": one_number, "$expr": {"$eq": ["$admitted_id", "$_id"]}}
    chosen = [
        db.DL_TASK.find_one({**numbers, **which}, {"_id": False, "task_id": True})
        for which in (
            *({"status": state} for state in ("SUCCEEDED", "REJECTED", "FAILED")),
            {"status": {"$in": END_STATES}, "_id": {"$type": "object"}},
        )
    ]
    for task in filter(None, chosen):
        number = str(int(str(task["task_id"]).partition(".")[0]))
        for command in ("status", "wait", "logs"):
            dltask(command, number)
            json.loads(dltask(command, number, "--json").stdout)
