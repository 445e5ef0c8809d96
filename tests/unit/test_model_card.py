"""A model's card: bounded as it is stored, and Markdown that no name in it can break."""

from datetime import UTC, datetime
from typing import Any

import bson
import pytest
from pydantic import ValidationError

from schemas.card import MAX_CARD_BYTES, Card
from schemas.enums import ExpansionDataClass
from schemas.message import MAX_CLASSES
from schemas.numbers import INT64_MAX, UINT64_MAX
from schemas.params import check_params, stored_params
from service.model_card import markdown


def card(**changes: Any) -> dict[str, Any]:
    params = check_params({"model_name": "cells:2", "dataset_expansion_lst": ["HOR_FLIPE"], "max_num_iters": 300})
    fields = {
        "dataset": "cells",
        "split": "train",
        "train_images": 205,
        "val_images": 87,
        "images_skipped": 1,
        "boxes": (2000, 180),
        "batch_size": 10,
        "seed": 3,
        "recipe": "SGD, one cycle.",
        "versions": {"python": "3.11.2", "torch": "2.11.0"},
        "parameters": stored_params(params),
        "initial_weights": "cells:2 (1 of 2 classes carried over)",
        "iterations": 300,
        "best_iteration": 250,
        "device": "cuda:0",
        "seconds": 41.5,
    }
    # As it comes back from the database.
    document: dict[str, Any] = bson.decode(bson.encode(Card.model_validate(fields | changes).model_dump()))
    return document


def model(**changes: Any) -> dict[str, Any]:
    row = {"class_id": 1, "class_name": "RBC", "map": 0.6, "map_50": 0.91, "precision": 0.8, "recall": 0.9}
    document = {
        "model_name": "cells",
        "version": 3,
        "task_id": 3,
        "net_model": "MobileNet",
        "model_scope": "NORMAL",
        "class_names": ["RBC", "WBC"],
        "input_size": 320,
        "sha256": "0" * 64,
        "metrics": {"map": 0.56, "map_50": 0.912, "map_75": 0.5, "on": "val", "per_class": [row]},
        "data_fingerprint": "f" * 64,
        "parent_version": 2,
        "create_time": datetime(2026, 11, 25, tzinfo=UTC),
        "card": card(),
    }
    return document | changes


def test_the_card_says_what_the_version_was_made_of() -> None:
    """Data, classes with their boxes and scores, recipe, parameters, versions, parent."""
    text = markdown(model())
    for line in (
        "# cells:3",
        "| made | 2026-11-25T00:00:00.000Z by task 3 |",
        "| network | MobileNet NORMAL, 320 x 320 pixels |",
        "| began with | cells:2 (1 of 2 classes carried over) |",
        "| parent | cells:2 |",
        "| best iteration | 250 |",
        "| data set | cells |",
        "| validation images | 87 |",
        f"| fingerprint | {'f' * 64} |",
        "mAP 0.560, mAP@.5 0.912, mAP@.75 0.500, on the images of `val` (COCO definitions, 0 … 1).",
        "| 1 | RBC | 2000 | 0.600 | 0.910 | 0.800 | 0.900 | – |",
        "| 2 | WBC | 180 | – | – | – | – | – |",
        "SGD, one cycle.",
        "| images in a step | 10 |",
        "| `dataset_expansion_lst` | HOR_FLIPE |",
        "| `max_num_iters` | 300 |",
        "| torch | 2.11.0 |",
    ):
        assert line in text.splitlines()


def test_a_version_without_a_card_says_less() -> None:
    """As release 0.1.0 made them; also where somebody wrote something else into the fields."""
    old = model(parent_version=None)
    del old["card"]
    text = markdown(old)
    assert "# cells:3" in text
    assert "| 1 | RBC | – | 0.600 |" in text
    assert "## Recipe" not in text
    assert "parent" not in text
    for value in (None, "x", 5, [], {"a": 1}, [[]], float("nan")):
        assert markdown(model(card=value, metrics=value, class_names=value, create_time=value, task_id=value))
        assert markdown({"card": dict.fromkeys(card(), value), "metrics": {"per_class": value, "map": value}})


def test_no_name_breaks_the_markdown() -> None:
    """A class that carries a column, a link or a control character is text in its cell."""
    hostile = "a|b\n# c [d](e) <img> `f` \x1b[31m"
    lines = markdown(model(class_names=[hostile], model_name=hostile)).splitlines()
    assert r"| 1 | a\|b # c \[d\](e) \<img\> \`f\` ?\[31m | 2000 | – | – | – | – | – |" in lines
    assert lines[0] == r"# a\|b # c \[d\](e) \<img\> \`f\` ?\[31m:3"


def test_the_largest_card_is_bounded() -> None:
    """With every field as long as it may be."""
    operations = [ExpansionDataClass.HOR_FLIPE.name] * 100
    params = {"model_name": "m" * 128, "dataset_expansion_lst": operations, "max_num_iters": UINT64_MAX}
    largest = card(
        dataset="€" * 200,
        split="€" * 200,
        boxes=[INT64_MAX] * MAX_CLASSES,
        recipe="€" * 1000,
        versions={f"l{number}": "€" * 200 for number in range(20)},
        parameters=stored_params(check_params(params)),
        initial_weights="€" * 3000,
        device="€" * 3000,
    )
    assert len(bson.encode(largest)) < MAX_CARD_BYTES
    for field in ({"boxes": [1] * (MAX_CLASSES + 1)}, {"recipe": "x" * 1001}, {"versions": {"A": "1"}}):
        with pytest.raises(ValidationError):
            card(**field)
