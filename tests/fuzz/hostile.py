"""Task documents as no client should write them, drawn by hypothesis, and a few as clients do."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import hypothesis
from bson import Binary, Code, DatetimeMS, DBRef, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from schemas.task import SERVICE_FIELDS
from tests.fuzz.raw_bson import UNDEFINED, Pairs, Raw, db_pointer, old_binary, symbol, text

#: How far documents may be nested inside a field: what the server takes.
MAX_DEPTH = 179

CLIENT_FIELDS = (
    "task_id",
    "task_type",
    "param_request",
    "img_mongodb_ids",
    "val_img_mongodb_ids",
    "dataset",
    "split",
    "json_mongodb_id",
    "priority",
    "max_attempts",
    "patience",
    "mirror",
    "cancel_requested",
    "unknown",
)

PARAMS = (
    "model_name",
    "dataset_expansion_lst",
    "net_model",
    "model_scope",
    "device_type",
    "inital_learning_rate",
    "device_num",
    "max_num_iters",
    "batch_size",
    "snap_shot_ivterval",
    "initial_learning_rate",
    "unknown",
    "$set",
    "a.b",
    "",
    "self",
)

#: The codes that a fault in this field alone may have.
CODES = {
    "task_id": {4},
    "task_type": {1},
    "param_request": {7, 8},
    "img_mongodb_ids": {3},
    "val_img_mongodb_ids": {3},
    "dataset": {3, 7},
    "split": {3, 7},
    "json_mongodb_id": {2},
    "priority": {7},
    "max_attempts": {7},
    "patience": {7},
    "mirror": {7},
    "cancel_requested": set(),
    "unknown": set(),
}

ALL_CODES = {1, 2, 3, 4, 5, 7, 8}


class Filled:
    """A place in a drawn document for what only the database knows. `fill` puts it in."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


#: A number that no other task has; an image that exists, and its hex digits; a request message that exists; the `_id`
#: of the document itself.
NUMBER, IMAGE, HEX_IMAGE, MESSAGE, OWN_ID = map(Filled, ("NUMBER", "IMAGE", "HEX_IMAGE", "MESSAGE", "OWN_ID"))


def fill(value: Any, known: dict[Filled, Any]) -> Any:
    """`value` with the places in it filled, at any depth a driver would write."""
    if isinstance(value, Filled):
        return known[value]
    if type(value) is dict:
        return {key: fill(item, known) for key, item in value.items()}
    if type(value) is list:
        return [fill(item, known) for item in value]
    if isinstance(value, Pairs):
        return Pairs(tuple((key, fill(item, known)) for key, item in value.items))
    return value


@dataclass
class Case:
    """One document, and what may become of it."""

    kind: str
    document: Any
    #: The end states that the content demands.
    states: set[str]
    #: The codes that a rejection may have.
    codes: set[int] = field(default_factory=lambda: ALL_CODES)
    #: `error.kind` where it ends FAILED; None for any.
    failed_as: str | None = None


def nested(depth: int, leaf: Any = "x", as_list: bool = False) -> Any:
    """A value `depth` documents or lists deep."""
    for _ in range(depth):
        leaf = [leaf] if as_list else {"d": leaf}
    return leaf


NUMBERS: list[Any] = [
    *(0, -1, 1, 2**31 - 1, -(2**31), 2**31, 2**53, 2**53 + 1, 2**63 - 1, -(2**63), Int64(0), Int64(5)),
    *(0.0, -0.0, 0.5, 1.0, 1e300, -1e300, 5e-324, 2.0**53, 2.0**53 + 2, 2.0**63, 2.0**64),
    *(float("nan"), float("inf"), float("-inf")),
    *map(
        Decimal128,
        [
            "0",
            "-0",
            "1.0",
            "1.5",
            "18446744073709551615",
            "18446744073709551616",
            "-1",
            "NaN",
            "-NaN",
            "sNaN",
            "Infinity",
            "-Infinity",
            "1E+6111",
            "1E-6176",
            "9.999999999999999999999999999999999E+6144",
            "0E+6000",
        ],
    ),
]

TEXTS: list[Any] = [
    *("", " ", "\x00", "a\x00b", "\u202eevil", "\u200b", "\ufeff", "\x1b[2J", "\r\n", "\u2028", "\U0010ffff", "ｏｋ"),
    *("$status", "$$NOW", "$$oops", "$", ".", "..", "a.b", "../../etc/passwd", "/etc/passwd", "C:\\x", "ok/../ok"),
    *("ok:1", "ok:0", "ok:-1", "ok:99999999999", "ok:", ":", "ok:1:1", "__proto__", "null", "NaN", "TRAIN", "train"),
    *("(a+)+$", "{{7*7}}", "%s%n", "<script>", "'; drop", "x" * 161, "x" * 5000, "١٢٣", "0" * 24, "f" * 24, "Z" * 24),
    *(text(b"\xff\xfe"), text(b"\xed\xa0\x80"), text(b"ok\xc0\x80"), text(b"\xf8\x88\x80\x80\x80"), symbol(b"ok")),
]

OTHERS: list[Any] = [
    *(None, True, False, b"", b"x" * 12, Binary(b"abc", 4), Binary(bytes(16), 3), Binary(b"v", 9), Binary(b"u", 128)),
    *(ObjectId(), MinKey(), MaxKey(), Timestamp(0, 0), Timestamp(2**32 - 1, 2**32 - 1), UNDEFINED, db_pointer(b"x")),
    *(Regex("^(a+)+$"), Regex("(", "i"), Code("while (true) {}"), Code("f", {"x": 1})),
    *(DatetimeMS(2**62), DatetimeMS(-(2**62)), DatetimeMS(0), DatetimeMS(253402300800000)),
    *(DBRef("DL_TASK", 1), DBRef("x", None, "y"), {"$ref": 1, "$id": 2}, {"$ref": "x"}, {"$id": 1, "$ref": "x"}),
    *({"$gt": ""}, {"$literal": 1}, {"$where": "sleep(9999)"}, {"a.b": 1, "$c": {"": [{"$d": 2}]}}, {"": ""}, {}),
    *([], [[]], [None], [{}], [""], Pairs((("a", 1), ("a", 2))), Pairs((("\udcff", 1),))),
    *(
        nested(20),
        nested(100),
        nested(MAX_DEPTH),
        nested(MAX_DEPTH - 1),
        nested(MAX_DEPTH - 2, as_list=True),
        nested(220),
    ),
    *(old_binary(3, b"abc"), old_binary(99, b"abc"), old_binary(-1, b"")),
]


def _values() -> st.SearchStrategy[Any]:
    numbers = st.sampled_from(NUMBERS) | st.integers(-(2**63), 2**63 - 1) | st.floats()
    texts = st.sampled_from(TEXTS) | st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
    others = st.sampled_from(OTHERS) | st.binary(max_size=20)
    leaves = numbers | texts | others
    keys = st.sampled_from(["a", "", "$x", "a.b", "$", "_id", "\u202e", "model_name", "\udcff"]) | st.text(
        "ab$.", max_size=5
    )
    return leaves | st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=8
    )


VALUES = _values()

#: Numbers of valid tasks, in every form that a driver makes of them.
_NUMBER_FORMS: list[Callable[[int], Any]] = [
    int,
    Int64,
    float,
    lambda n: Decimal128(str(n)),
    lambda n: Decimal128(f"{n}.0"),
]

#: What the stand-in child does, with the state that the task must end in.
_BEHAVIOURS = [("ok", "SUCCEEDED", None)] * 4 + [(kind, "FAILED", kind) for kind in ("data", "loss", "bug")]


@st.composite
def valid_tasks(draw: st.DrawFn, cancelled: int = 1) -> Case:
    """A task that is one, in one of the forms that clients write; `cancelled` of ten before it can run."""
    behaviour, state, kind = draw(st.sampled_from(_BEHAVIOURS))
    params: dict[str, Any] = {
        "model_name": behaviour,
        "device_type": draw(st.sampled_from(["CPU", 0, 0.0, Int64(1), "GPU"])),
        "max_num_iters": draw(st.sampled_from([1, 2.0, Int64(1), Decimal128("2")])),
        "batch_size": draw(st.sampled_from([1, 10, 10.0, 2**32 - 1])),
    }
    if draw(st.booleans()):
        params["dataset_expansion_lst"] = draw(st.lists(st.sampled_from(["HOR_FLIPE", "VER_FLIP", 2, 3.0]), max_size=3))
    document: dict[str, Any] = {
        "task_id": NUMBER,
        "task_type": draw(st.sampled_from(["TRAIN", 0, 0.0, Decimal128("0")])),
        "param_request": params,
    }
    if behaviour == "ok" and draw(st.integers(0, 3)) == 0:
        document["task_type"] = draw(st.sampled_from(["TEST", 1, 1.0]))
    match draw(st.integers(0, 3)):
        case 0:
            document["dataset"] = "toy"
        case 1:
            document |= {"img_mongodb_ids": [IMAGE, HEX_IMAGE, IMAGE], "dataset": None}
        case 2:
            document |= {"img_mongodb_ids": [HEX_IMAGE], "val_img_mongodb_ids": [IMAGE]}
        case _:
            document |= {"img_mongodb_ids": [], "json_mongodb_id": MESSAGE}
    if draw(st.sampled_from([False] * (10 - cancelled) + [True] * cancelled)):
        document["cancel_requested"] = True
        state, kind = "CANCELLED", None
    return Case("valid", document, {state}, set(), kind)


#: Where it is about what is read of a document, most need not run.
_MOSTLY = 8


def _changed(case: Case, kind: str, fields: set[str], **changes: Any) -> Case:
    states = {"REJECTED", "SUCCEEDED", "FAILED", "CANCELLED"}
    codes = set().union(*(CODES.get(name, set()) for name in fields))
    return Case(kind, {**case.document, **changes}, states if codes else states - {"REJECTED"}, codes)


@st.composite
def one_hostile_field(draw: st.DrawFn) -> Case:
    """A valid task but for one field."""
    case, name = draw(valid_tasks(_MOSTLY)), draw(st.sampled_from(CLIENT_FIELDS))
    if draw(st.integers(0, 9)) == 0:
        case.document.pop(name, None)
        return _changed(
            case, "missing", {name, "img_mongodb_ids"} if name in ("dataset", "json_mongodb_id") else {name}
        )
    # Data given twice can hide what is wrong in one of them.
    others = {"img_mongodb_ids"} if name in ("dataset", "split", "json_mongodb_id") else set()
    changed = _changed(case, name, {name, *others}, **{name: draw(VALUES)})
    # 1 is the value of TEST, and what the task would train is no model yet.
    return replace(changed, codes=changed.codes | {8}) if name == "task_type" else changed


@st.composite
def one_hostile_parameter(draw: st.DrawFn) -> Case:
    """A valid task but for one parameter."""
    case, name = draw(valid_tasks(_MOSTLY)), draw(st.sampled_from(PARAMS))
    params = {**case.document["param_request"], name: draw(VALUES)}
    return _changed(case, "parameter", {"param_request"}, param_request=params)


@st.composite
def hostile_ids(draw: st.DrawFn) -> Case:
    """A valid task but for its images."""
    case = draw(valid_tasks(_MOSTLY))
    ids = st.just(IMAGE) | st.just(HEX_IMAGE) | VALUES
    name = draw(st.sampled_from(["img_mongodb_ids", "val_img_mongodb_ids"]))
    return _changed(case, "image ids", {"img_mongodb_ids"}, **{name: draw(st.lists(ids, max_size=6))})


_LATER, _LONG_AGO = datetime.now(UTC) + timedelta(days=9999), datetime(2000, 1, 1, tzinfo=UTC)

#: What a client might believe to be able to write.
_FORGERIES: dict[str, list[Any]] = {
    "admitted_id": [ObjectId(), None, "x"],
    "status": ["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "CANCELLED", "REJECTED", "x", ["RUNNING"]],
    "error_code": [0, 3, 99],
    "error": [{"kind": "x", "message": "y"}],
    "attempt": [0, 1, -1, 2**31, 2**63 - 1, [1], "x"],
    "failures": [0, 5, -5, 2**63 - 1, [1], "x"],
    "failed_at": [0, 2**62, "x"],
    "runs_alone": [True, "x"],
    "owner": ["me", None],
    "lease_renewed_at": [_LATER, _LONG_AGO, None],
    "not_before": [_LATER, _LONG_AGO],
    "create_time": [_LATER, _LONG_AGO],
    "start_time": [_LATER],
    "end_time": [_LATER, _LONG_AGO],
    "progress": [{"iteration": 5, "max_num_iters": 10}, "x", []],
    "snapshot": [{"file_id": ObjectId(), "iteration": 5, "sha256": "0" * 64}, "x"],
    "result": [{"model_name": "ok", "version": 1}, "x", {"reports": []}],
    "history": [[{"status": "RUNNING"}], [], "x", [5]],
    "batch_size_limit": [1, 0, -1, 2**62, "x"],
    "schema_version": [1, 0, -1, 2, "x", [1]],
}
assert set(_FORGERIES) <= set(SERVICE_FIELDS)


def _forged(draw: st.DrawFn, *, least: int) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(_FORGERIES)), min_size=least, max_size=6, unique=True))
    return {
        name: draw(VALUES) if draw(st.integers(0, 2)) == 0 else draw(st.sampled_from(_FORGERIES[name]))
        for name in names
    }


@st.composite
def forged_states(draw: st.DrawFn) -> Case:
    """A valid task that says it has been seen already. It is a new one."""
    case = draw(valid_tasks(_MOSTLY))
    return Case("forged state", {**case.document, **_forged(draw, least=1)}, case.states, set(), case.failed_as)


_ENDS = {"SUCCEEDED", "FAILED", "CANCELLED"}


@st.composite
def forged_admissions(draw: st.DrawFn) -> Case:
    """A task that says it has been admitted, by the one mark that tells. It may do harm to itself alone."""
    case = draw(valid_tasks())
    document = {
        **case.document,
        "admitted_id": OWN_ID,
        "status": draw(st.sampled_from(["PENDING", "PENDING", "RUNNING", "SUCCEEDED", "x"])),
        "error_code": 0,
        "attempt": draw(st.sampled_from([0, 1, 1, *_FORGERIES["attempt"]])),
        "failures": 0,
        "max_attempts": 3,
        "priority": draw(st.sampled_from([0, 2**31 - 1, float("inf"), MaxKey(), "x"])),
        "create_time": datetime.now(UTC),
        "history": [],
        **_forged(draw, least=0),
    }
    document |= {"admitted_id": OWN_ID}
    if draw(st.booleans()):
        document[draw(st.sampled_from([*CLIENT_FIELDS, "history"]))] = draw(VALUES)
    if draw(st.booleans()):
        document.pop(draw(st.sampled_from(sorted(set(document) - {"admitted_id"}))))
    as_it_was = document.get("status")
    # A text that is no UTF-8 comes back as a reader makes something of it.
    as_it_was = as_it_was.payload[4:-1].decode(errors="replace") if isinstance(as_it_was, Raw) else str(as_it_was)
    return Case("forged admission", document, {*_ENDS, "REJECTED", "PENDING", "unreadable", as_it_was})


#: The server's limit is 180.
_DEEP = 170


@st.composite
def strange_keys(draw: st.DrawFn) -> Case:
    """A valid task under an `_id` that is no ObjectId. One that no driver can name may be rejected."""
    case, key = draw(valid_tasks()), draw(VALUES)
    # Most are unique by it, and the server refuses many as an `_id`.
    if draw(st.booleans()):
        key = {"n": NUMBER, "of": key}
    states, failed_as = case.states | {"REJECTED"}, case.failed_as
    if _depth(key) > _DEEP:
        # What is admitted has the `_id` once more, one level down; the server may refuse what a claim adds to that.
        states, failed_as = states | {"FAILED"}, None
    return Case("_id", {"_id": key, **case.document}, states, {7}, failed_as)


def _depth(value: Any) -> int:
    """Documents and lists within each other."""
    within = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, within), default=0) if isinstance(value, dict | list) else 0


@st.composite
def twice_written(draw: st.DrawFn) -> Case:
    """A task in which a field comes twice."""
    case = draw(valid_tasks())
    name = draw(st.sampled_from([*CLIENT_FIELDS, *SERVICE_FIELDS]))
    pairs = [*case.document.items(), (name, draw(VALUES)), (name, draw(VALUES))]
    order = draw(st.permutations(pairs))
    return Case("twice", Pairs(tuple(order)), {"REJECTED", *case.states})


@st.composite
def anything(draw: st.DrawFn) -> Case:
    """A document of any fields."""
    names = st.sampled_from([*CLIENT_FIELDS, *SERVICE_FIELDS, "$x", "a.b", "", "$set"]) | st.text(max_size=10)
    document = draw(st.dictionaries(names.filter(lambda name: "\x00" not in name), VALUES, max_size=8))
    document.pop("admitted_id", None)
    return Case("anything", document, {"REJECTED", "SUCCEEDED", "FAILED", "CANCELLED"})


#: What a storm is made of, in parts of a hundred.
SHARES: dict[str, tuple[int, Callable[[], st.SearchStrategy[Case]]]] = {
    "valid": (6, valid_tasks),
    "one hostile field": (28, one_hostile_field),
    "one hostile parameter": (26, one_hostile_parameter),
    "hostile ids": (10, hostile_ids),
    "forged state": (6, forged_states),
    "forged admission": (5, forged_admissions),
    "strange key": (6, strange_keys),
    "twice written": (4, twice_written),
    "anything": (9, anything),
}


def storm(count: int, seed: int) -> list[Case]:
    """`count` documents of all kinds in their shares, in any order; the same for the same seed."""
    cases = []
    for place, (share, strategy) in enumerate(SHARES.values()):
        cases += drawn(strategy(), max(1, count * share // 100), seed + place)
    random.Random(seed).shuffle(cases)
    return cases


def drawn(strategy: st.SearchStrategy[Any], count: int, seed: int) -> list[Any]:
    """`count` examples of `strategy`, the same for the same seed."""
    found: list[Any] = []

    # Only drawn from: nothing is checked while hypothesis runs, so there is nothing to shrink, to time or to remember,
    # and how many bytes an example takes, or how long, is no matter of health here.
    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    assert len(found) >= count
    return found[:count]
