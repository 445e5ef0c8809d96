"""The published interface: every name, type, default and code, and the shapes numbers and enumerations arrive in."""

import dataclasses
import inspect
import json
import math
from collections import Counter
from typing import Any

import pytest
from bson import Code, Decimal128, Int64, ObjectId
from hypothesis import given
from hypothesis import strategies as st

from schemas.enums import (
    DeviceClass,
    ExpansionDataClass,
    ModelScopeClass,
    TaskErrorCode,
    TaskTypeClass,
    member,
)
from schemas.message import MIN_IMAGES_FOR_VALIDATION, RequestMessage, choose_validation, from_coco, to_coco
from schemas.numbers import DOUBLE_EXACT_MAX, INT64_MAX, UINT64_MAX, bson_uint64, whole_number
from schemas.params import ParamClass, ParamError, check_params, split_model_name, stored_params
from schemas.task import TaskRequest, object_id, same

# ---- names, values, defaults


def test_task_error_codes_are_the_published_ones() -> None:
    """TaskErrorCode: the seven codes of the contract and our two, and 0 is OK."""
    assert {code.name: code.value for code in TaskErrorCode} == {
        "OK": 0,
        "TASK_TYPE_ERROR": 1,
        "JASON_MONGOID_INVALID": 2,
        "IMAG_MONGOID_INVALID": 3,
        "TASK_ID_INVALID": 4,
        "COLLECTIONS_EMPTY": 5,
        "TASK_TEST_NOT_OVER": 6,
        "PARAM_INVALID": 7,
        "MODEL_INVALID": 8,
    }
    code: int = TaskErrorCode.OK
    assert code == 0


def test_the_published_members_exist() -> None:
    """The members that the contract names."""
    assert ModelScopeClass["NORMAL"]
    assert DeviceClass["GPU"]
    assert {"HOR_FLIPE", "VER_FLIPE"} <= set(ExpansionDataClass.__members__)
    assert set(TaskTypeClass.__members__) == {"TRAIN", "TEST"}
    assert set(ModelScopeClass.__members__) == {"SMALL", "NORMAL", "LARGE"}
    assert set(DeviceClass.__members__) == {"CPU", "GPU"}


PUBLISHED_PARAMS = {
    "model_name": "",
    "dataset_expansion_lst": [],
    "net_model": "MobileNet",
    "model_scope": ModelScopeClass.NORMAL,
    "device_type": DeviceClass.GPU,
    "inital_learning_rate": 0.001,
    "device_num": 1,
    "max_num_iters": 50000,
    "batch_size": 10,
    "snap_shot_ivterval": 10000,
}


def test_param_class_has_the_published_fields_in_their_order() -> None:
    """ParamClass: names, order and defaults; every default is accepted by the checks but the empty name's meaning."""
    params = ParamClass()
    assert list(inspect.signature(ParamClass).parameters) == list(PUBLISHED_PARAMS)
    assert dataclasses.asdict(params) == PUBLISHED_PARAMS
    for name, value in PUBLISHED_PARAMS.items():
        assert type(getattr(params, name)) is type(value), name
    assert check_params(params) == params


def test_param_class_takes_positions_and_keywords_alike() -> None:
    """`ParamClass(...)` by position in the published order, by keyword, or mixed."""
    values: dict[str, Any] = {
        "model_name": "m",
        "dataset_expansion_lst": [ExpansionDataClass.HOR_FLIPE],
        "net_model": "MobileNet",
        "model_scope": ModelScopeClass.SMALL,
        "device_type": DeviceClass.CPU,
        "inital_learning_rate": 0.5,
        "device_num": 2,
        "max_num_iters": 3,
        "batch_size": 4,
        "snap_shot_ivterval": 5,
    }
    by_position = ParamClass(*values.values())
    assert by_position == ParamClass(**values)
    assert by_position == ParamClass("m", [ExpansionDataClass.HOR_FLIPE], **dict(list(values.items())[2:]))
    assert ParamClass().dataset_expansion_lst is not ParamClass().dataset_expansion_lst


def test_param_attributes_can_be_assigned_and_are_checked_when_sent() -> None:
    """A plain class: any value goes in, and `check_params` finds what is wrong, an attribute of no parameter too."""
    params = ParamClass("m")
    params.batch_size = 0
    with pytest.raises(ParamError) as refused:
        check_params(params)
    assert refused.value.field == "param_request.batch_size"
    params.batch_size = 8
    assert check_params(params).batch_size == 8
    params.bath_size = 8  # type: ignore[attr-defined]
    with pytest.raises(ParamError, match="bath_size is not a parameter"):
        check_params(params)


# ---- bounds


@pytest.mark.parametrize(
    ("name", "top"),
    [
        ("device_num", 2**16 - 1),
        ("batch_size", 2**32 - 1),
        ("max_num_iters", 2**64 - 1),
        ("snap_shot_ivterval", 2**64 - 1),
    ],
)
def test_unsigned_bounds(name: str, top: int) -> None:
    """uint16, uint32 and uint64 up to their last value; one more, zero and less are refused by name and value."""
    for value in (1, top):
        assert getattr(check_params({name: value}), name) == value
    if top > INT64_MAX:
        assert getattr(check_params({name: Decimal128(str(top))}), name) == top
    for value in (top + 1, 0, -1):
        with pytest.raises(ParamError) as refused:
            check_params({name: value})
        assert refused.value.field == f"param_request.{name}"
        assert str(value) in str(refused.value)
        assert "expected" in str(refused.value)


@pytest.mark.parametrize("name", ["device_num", "batch_size", "max_num_iters", "snap_shot_ivterval"])
def test_a_double_that_is_a_whole_number_is_one(name: str) -> None:
    """`10.0` is 10, of the type int; other doubles, booleans and texts are refused."""
    value = getattr(check_params({name: 10.0}), name)
    assert (value, type(value)) == (10, int)
    for bad in (10.5, math.nan, math.inf, True, "10", None, [10], Decimal128("1.5")):
        with pytest.raises(ParamError):
            check_params({name: bad})


@pytest.mark.parametrize("rate", [0.001, 1, Int64(1), 5e-324, 1e308])
def test_learning_rates(rate: float) -> None:
    """A double above 0; a whole number from a driver is a double too."""
    value = check_params({"inital_learning_rate": rate}).inital_learning_rate
    assert (value, type(value)) == (rate, float)


@pytest.mark.parametrize("rate", [0, -0.1, math.nan, math.inf, "0.1", True, None])
def test_learning_rates_that_are_none(rate: Any) -> None:
    """Zero, negative, infinite, NaN, texts and booleans are refused."""
    with pytest.raises(ParamError) as refused:
        check_params({"inital_learning_rate": rate})
    assert refused.value.field == "param_request.inital_learning_rate"


# ---- enumerations and spellings


@pytest.mark.parametrize("enum", [TaskErrorCode, TaskTypeClass, ModelScopeClass, DeviceClass, ExpansionDataClass])
def test_members_arrive_as_names_values_and_doubles(enum: Any) -> None:
    """Every member by itself, its name, its value, and its value as a driver of another language sends it."""
    for one in enum:
        for form in (one, one.name, one.value, float(one.value), Int64(one.value), Decimal128(str(one.value))):
            assert member(enum, form) is one
    for bad in ("", "NO_SUCH", one.name.lower(), 999, -1, 0.5, None, True, [], {}, math.nan):
        with pytest.raises(ValueError, match=f"expected one of .*{one.name}"):
            member(enum, bad)


def test_values_are_unique() -> None:
    """No enumeration has an alias among its members: each value is one name."""
    for enum in (TaskErrorCode, TaskTypeClass, ModelScopeClass, DeviceClass, ExpansionDataClass):
        assert len(enum.__members__) == len(list(enum))


def test_correct_spellings_are_read_as_the_published_ones() -> None:
    """Aliases on input; what is stored has the published spelling."""
    params = check_params(
        {
            "initial_learning_rate": 0.5,
            "snap_shot_interval": 7,
            "dataset_expansion_list": ["HOR_FLIP", "VER_FLIP", "HOR_FLIPE"],
        }
    )
    assert (params.inital_learning_rate, params.snap_shot_ivterval) == (0.5, 7)
    stored = stored_params(params)
    assert list(stored) == list(PUBLISHED_PARAMS)
    assert stored["dataset_expansion_lst"] == ["HOR_FLIPE", "VER_FLIPE", "HOR_FLIPE"]
    with pytest.raises(ParamError, match="both of its spellings"):
        check_params({"snap_shot_interval": 7, "snap_shot_ivterval": 7})


def test_an_unknown_parameter_is_named_with_those_there_are() -> None:
    """The message names the field and lists what was expected."""
    with pytest.raises(ParamError) as refused:
        check_params({"model_name": "m", "learning_rate": 0.1})
    assert refused.value.field == "param_request.learning_rate"
    assert all(name in str(refused.value) for name in PUBLISHED_PARAMS)


@pytest.mark.parametrize("raw", [[], "x", 5, 1.5, True, ObjectId()])
def test_param_request_must_be_a_document(raw: Any) -> None:
    """None is all defaults; anything else but a document is refused."""
    assert check_params(None) == ParamClass()
    with pytest.raises(ParamError, match="expected a document"):
        check_params(raw)


@pytest.mark.parametrize(
    "raw",
    [
        {"dataset_expansion_lst": "HOR_FLIPE"},
        {"dataset_expansion_lst": [["HOR_FLIPE"]]},
        {"dataset_expansion_lst": ["NO_SUCH"]},
        {"dataset_expansion_lst": None},
        {"model_scope": "HUGE"},
        {"device_type": "TPU"},
        {"model_name": 5},
        {"model_name": "m" * 161},
        {"net_model": None},
        {"$where": 1},
        {"a.b": 1},
        {"": 1},
        {"x" * 5000: 1},
        {"batch_size": {"$gt": "x" * 5000}},
    ],
)
def test_every_other_fault_names_its_field_in_a_bounded_message(raw: dict[str, Any]) -> None:
    """Field and message stay small, whatever the client sent."""
    with pytest.raises(ParamError) as refused:
        check_params(raw)
    assert refused.value.field.startswith(f"param_request.{next(iter(raw))[:100]}")
    assert len(refused.value.field) <= 200
    assert len(str(refused.value)) <= 500


def test_stored_params_come_back_the_same() -> None:
    """What admission writes is read again as the same parameters, 64-bit numbers above 2^63 included."""
    params = ParamClass("m", [ExpansionDataClass.HUE], max_num_iters=UINT64_MAX, snap_shot_ivterval=INT64_MAX)
    stored = stored_params(params)
    assert stored["max_num_iters"] == Decimal128(str(UINT64_MAX))
    assert type(stored["snap_shot_ivterval"]) is Int64
    assert check_params(stored) == params


def test_a_text_of_another_kind_becomes_a_plain_one() -> None:
    """BSON code is a text with a flag; what is kept is the text."""
    assert type(check_params({"model_name": Code("m")}).model_name) is str


# ---- numbers


@given(st.integers(min_value=-(2**63), max_value=2**64 - 1))
def test_whole_numbers_are_read_from_every_form_that_names_them(number: int) -> None:
    """int, Int64, Decimal128, and a double where it is exact, are the same number."""
    assert whole_number(number) == number
    assert whole_number(Decimal128(str(number))) == number
    if number <= INT64_MAX:
        plain = whole_number(Int64(number))
        assert plain == number
        assert type(plain) is int
    if abs(number) <= DOUBLE_EXACT_MAX:
        assert whole_number(float(number)) == number


@given(st.floats())
def test_doubles_are_whole_numbers_or_refused(number: float) -> None:
    """A double is taken if and only if it is whole and at most 2^53."""
    if math.isfinite(number) and number.is_integer() and abs(number) <= 2**53:
        assert whole_number(number) == number
    else:
        with pytest.raises(ValueError, match="expected a whole number"):
            whole_number(number)


@given(st.decimals(places=2, min_value=-(10**20), max_value=10**20))
def test_decimals_are_whole_numbers_or_refused(number: Any) -> None:
    """The same for Decimal128."""
    if number == number.to_integral_value():
        assert whole_number(Decimal128(number)) == int(number)
    else:
        with pytest.raises(ValueError, match="expected a whole number"):
            whole_number(Decimal128(number))


@pytest.mark.parametrize(
    "text", ["NaN", "-NaN", "sNaN", "Infinity", "-Infinity", "1E+6000", "1E-6000", "0.1", "9.999E+6144"]
)
def test_decimals_at_the_edge(text: str) -> None:
    """No Decimal128 makes a huge int or an exception of another kind."""
    with pytest.raises(ValueError, match="expected a whole number"):
        whole_number(Decimal128(text))


@pytest.mark.parametrize("value", [None, True, False, "5", b"5", [5], {"n": 5}, object()])
def test_no_other_type_is_a_number(value: Any) -> None:
    """Booleans and texts are none either."""
    with pytest.raises(ValueError, match="expected a whole number"):
        whole_number(value)


@given(st.integers(min_value=0, max_value=UINT64_MAX))
def test_uint64_is_stored_and_read_back(number: int) -> None:
    """Int64 up to 2^63-1, Decimal128 above."""
    stored = bson_uint64(number)
    assert isinstance(stored, Int64 if number <= INT64_MAX else Decimal128)
    assert whole_number(stored) == number


# ---- ids and names


def test_object_ids_and_their_hex_digits_only() -> None:
    """24 hex digits in either case; twelve bytes would be a guess."""
    oid = ObjectId()
    assert object_id(oid) == object_id(str(oid)) == object_id(str(oid).upper()) == oid
    for bad in (None, "", "x" * 24, str(oid)[:-1], b"123456789012", oid.binary, "123456789012", 5, {"$oid": str(oid)}):
        assert object_id(bad) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cells", ("cells", None)),
        ("cells:7", ("cells", 7)),
        ("Zellen ü (2)", ("Zellen ü (2)", None)),
        ("a.b_c+d@e-f", ("a.b_c+d@e-f", None)),
    ],
)
def test_model_names(text: str, expected: tuple[str, int | None]) -> None:
    """`name` or `name:version`."""
    assert split_model_name(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":1",
        "a:",
        "a:0",
        "a:-1",
        "a:1.0",
        "a:1:2",
        "a:²",
        "a:1234567890",
        "a/b",
        "../a",
        "a\n",
        " a",
        "a ",
        "x" * 129,
        "a\u202eb",
    ],
)
def test_model_names_that_are_none(text: str) -> None:
    """No path, no control character, no version that is no number."""
    with pytest.raises(ValueError, match="expected"):
        split_model_name(text)


# ---- JSON Schema


def test_the_models_generate_their_json_schema() -> None:
    """TaskRequest and RequestMessage document themselves; the message's members stand in the published order."""
    request = TaskRequest.model_json_schema()
    assert request["required"] == ["task_id", "task_type"]
    assert request["properties"]["task_id"] | {"minimum": 0, "maximum": UINT64_MAX} == request["properties"]["task_id"]
    message = RequestMessage.model_json_schema()
    assert list(message["properties"]) == ["dataset_info", "image_info", "instance_info", "class_info"]
    assert {"task_id", "task_type", "dataset", "created", "image_count", "instance_count", "class_count", "split",
            "fingerprint", "schema_version"} <= set(message["$defs"]["DatasetInfo"]["properties"])  # fmt: skip
    assert {"id", "file_name", "width", "height", "split", "mongodb_id"} == set(
        message["$defs"]["ImageInfo"]["properties"]
    )
    assert {"id", "image_id", "class_id", "bbox", "area", "iscrowd", "mongodb_id"} <= set(
        message["$defs"]["InstanceInfo"]["properties"]
    )
    assert {"id", "name", "instance_count"} == set(message["$defs"]["ClassInfo"]["properties"])
    for schema in (request, message):
        assert json.loads(json.dumps(schema)) == schema


# ---- the COCO form

_FINITE = st.floats(min_value=-1e9, max_value=1e9)
_POSITIVE = st.floats(min_value=0.01, max_value=1e6)


@st.composite
def messages(draw: st.DrawFn) -> dict[str, Any]:
    """Any valid message, as parsed JSON."""
    classes = draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=4))
    image_count = draw(st.integers(0, 5))
    images = [
        {
            "id": number,
            "file_name": draw(st.text(max_size=8)),
            "width": draw(st.integers(0, 10**6)),
            "height": draw(st.integers(0, 10**6)),
            "split": draw(st.sampled_from(["train", "val", "test"])),
            "mongodb_id": f"{number:024x}",
        }
        for number in range(1, image_count + 1)
    ]
    instances = []
    for number in range(1, draw(st.integers(0, 6)) + 1 if classes and images else 1):
        w, h = draw(_POSITIVE), draw(_POSITIVE)
        instances.append(
            {
                "id": number,
                "image_id": draw(st.integers(1, image_count)),
                "class_id": draw(st.integers(1, len(classes))),
                "bbox": [draw(_FINITE), draw(_FINITE), w, h],
                "area": w * h,
                "iscrowd": draw(st.sampled_from([0, 1])),
                "difficult": draw(st.sampled_from([0, 1])),
                "mongodb_id": f"{number:024x}",
            }
        )
    counts = Counter(instance["class_id"] for instance in instances)
    return {
        "dataset_info": {
            "task_id": str(draw(st.integers(0, UINT64_MAX))),
            "task_type": draw(st.sampled_from(["TRAIN", "TEST"])),
            "dataset": draw(st.text(max_size=8)),
            "created": "2026-01-01T00:00:00.000+00:00",
            "image_count": image_count,
            "instance_count": len(instances),
            "class_count": len(classes),
            "split": "",
            "fingerprint": "0" * 64,
            "schema_version": 1,
            "skipped_labels": {"count": 0, "examples": []},
        },
        "image_info": images,
        "instance_info": instances,
        "class_info": [
            {"id": number, "name": name, "instance_count": counts[number]} for number, name in enumerate(classes, 1)
        ],
    }


@given(messages())
def test_a_message_becomes_coco_and_comes_back_without_loss(message: dict[str, Any]) -> None:
    """`from_coco(to_coco(m)) == m`, through JSON, and both are what they say."""
    assert RequestMessage.model_validate(message).model_dump(mode="json") == message
    coco = json.loads(json.dumps(to_coco(message)))
    assert from_coco(coco) == message
    assert {annotation["category_id"] for annotation in coco["annotations"]} <= {c["id"] for c in coco["categories"]}
    assert {annotation["image_id"] for annotation in coco["annotations"]} <= {i["id"] for i in coco["images"]}


# ---- validation images


@given(st.lists(st.integers(0, 4), max_size=200), st.integers(0, 3), st.randoms(use_true_random=False))
def test_the_validation_choice_is_a_seeded_stratified_tenth(strata: list[int], seed: int, random: Any) -> None:
    """A tenth of each stratum, at least one of five; the same whatever the order; none of fewer than 20 images."""
    images = list(enumerate(strata, 1))
    chosen = choose_validation(images, seed)
    shuffled = list(images)
    random.shuffle(shuffled)
    assert choose_validation(shuffled, seed) == chosen
    assert chosen <= {image for image, _ in images}
    if len(images) < MIN_IMAGES_FOR_VALIDATION:
        assert not chosen
        return
    sizes = Counter(strata)
    taken = Counter(stratum for image, stratum in images if image in chosen)
    for stratum, size in sizes.items():
        assert taken[stratum] == max(round(size / 10), int(size >= 5))
        assert taken[stratum] < size or not size


def test_twenty_images_are_enough_for_validation_and_nineteen_are_not() -> None:
    """The border, and that another seed chooses otherwise."""
    images = [(number, 1) for number in range(1, 21)]
    assert len(choose_validation(images)) == 2
    assert not choose_validation(images[:19])
    many = [(number, 1) for number in range(1, 201)]
    assert choose_validation(many, 0) != choose_validation(many, 1)


def test_what_no_bson_can_be_made_of_is_the_same_as_nothing_else() -> None:
    """An `_id` that a driver cannot write again as it stands there."""
    key = object()
    assert same(key, key)
    assert not same(key, ObjectId())
    assert not same(1, key)
    assert same(float("nan"), float("nan"))
