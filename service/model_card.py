"""A model's card, as Markdown and as facts: what a version was made of, how, and how good it is."""

from collections.abc import Mapping
from datetime import datetime
from itertools import islice
from typing import Any

from service.show import iso, number, part, printable, task_number

Document = Mapping[str, Any]

#: Entries of a list or a table that are shown: anybody may have written there.
_MOST = 100


def markdown(model: Document) -> str:
    """The card of a version's document. One that release 0.1.0 made has no `card`, and says less."""
    card, said = part(model, "card"), facts(model)
    sections = [
        f"# {_text(model.get('model_name'))}:{_text(model.get('version'))}",
        _facts(said["Made"]),
        "## Data",
        _facts(said.get("Data", {})),
        "## How good it is",
        _metrics(model),
        _classes(model, card),
    ]
    if card:
        recipe = said.get("Recipe", {})
        sections += ["## Recipe", _text(recipe.pop("in words", "")), _facts(recipe)]
        if "Parameters" in said:
            sections += ["## Parameters", _facts(said["Parameters"], code=True)]
        sections += ["## Made with", _facts(said.get("Made with", {}))]
    return "\n\n".join(section for section in sections if section) + "\n"


def facts(model: Document) -> dict[str, dict[str, str]]:
    """What is known of a version, as title and text, under the heading where it stands; how good it is apart."""
    card = part(model, "card")
    made = model.get("create_time")
    time = iso(made) if isinstance(made, datetime) else ""
    side = model.get("input_size")
    parent = model.get("parent_version")
    said = {
        "Made": {
            "made": f"{time} by task {task_number(model.get('task_id'))}",
            "network": f"{model.get('net_model')} {model.get('model_scope')}, {side} x {side} pixels",
            "began with": card.get("initial_weights"),
            "parent": None if parent is None else f"{model.get('model_name')}:{parent}",
            "iterations": card.get("iterations"),
            "best iteration": card.get("best_iteration"),
            "device": card.get("device"),
            "seconds": card.get("seconds"),
            "sha256 of the ONNX file": model.get("sha256"),
        },
        "Data": {
            "data set": card.get("dataset") or ("images by their ids" if card else None),
            "split": card.get("split") or None,
            "training images": card.get("train_images"),
            "validation images": card.get("val_images"),
            "images that could not be used": card.get("images_skipped"),
            "fingerprint": model.get("data_fingerprint"),
        },
        "Recipe": {
            "in words": card.get("recipe"),
            "images in a step": card.get("batch_size"),
            "seed": card.get("seed"),
        },
        "Parameters": dict(part(card, "parameters")),
        "Made with": dict(part(card, "versions")),
    }
    return {heading: lines for heading, one in said.items() if (lines := _said(one))}


def _said(values: Mapping[str, Any]) -> dict[str, str]:
    known = ((title, value) for title, value in values.items() if value is not None)
    return {printable(title): _value(value) for title, value in islice(known, _MOST)}


def _metrics(model: Document) -> str:
    metrics = part(model, "metrics")
    if not metrics:
        return "Not measured."
    scores = ", ".join(
        f"{title} {_score(metrics.get(name))}"
        for title, name in (("mAP", "map"), ("mAP@.5", "map_50"), ("mAP@.75", "map_75"))
    )
    return f"{scores}, on the images of `{_text(metrics.get('on'))}` (COCO definitions, 0 … 1)."


def _classes(model: Document, card: Document) -> str:
    names, boxes = model.get("class_names"), card.get("boxes")
    rows = part(model, "metrics").get("per_class")
    listed = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    measured = {str(row.get("class_name")): row for row in listed}
    columns = ("map", "map_50", "precision", "recall", "threshold")
    lines = []
    for index, name in enumerate(names if isinstance(names, list) else ()):
        count = boxes[index] if isinstance(boxes, list) and index < len(boxes) else "–"
        scores = [_score(measured.get(str(name), {}).get(column)) for column in columns]
        lines.append([str(index + 1), _text(name), _text(count), *scores])
    titles = ["id", "class", "boxes trained on", "mAP", "mAP@.5", "precision", "recall", "at a score of"]
    return _table(titles, lines)


def _facts(said: Mapping[str, str], *, code: bool = False) -> str:
    mark = "`" if code else ""
    return _table(["", ""], [[f"{mark}{_text(title)}{mark}", _text(text)] for title, text in said.items()])


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(printable, value[:_MOST])) or "none"
    return f"{value:.4g}" if isinstance(value, float) else printable(value)


def _score(value: Any) -> str:
    return "–" if value is None else f"{number(value):.3f}"


def _text(value: Any) -> str:
    """`value` as text within a line of Markdown: names come from documents, and may be anything."""
    return "".join(f"\\{c}" if c in "\\`*[]<>|" else c for c in printable(value))
