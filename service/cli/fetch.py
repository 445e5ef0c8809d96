"""Files out of MongoDB: the report of a task, and a model with its class list and card."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import orjson

from handlers.errors import StartupError
from handlers.store import Store
from handlers.store.files import FileMissing
from schemas.task import object_id
from service.model_card import markdown


async def fetch_reports(store: Store, task: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write each picture that `task`'s result names to `folder`/NAME.png, and `report.html`; returns the paths.

    Raises StartupError if one is gone.
    """
    reports = (task.get("result") or {}).get("reports") or {}
    await anyio.Path(folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for name, file_id in reports.items():
        path = folder / (name if name == "report.html" else f"{_safe(name)}.png")
        await _fetch(store.files.reports.fetch(object_id(file_id), path), f"picture {name!r}")
        paths.append(path)
    return paths


async def registered(store: Store, reference: str) -> dict[str, Any]:
    """The document of the version that `name` or `name:version` refers to.

    Raises ValueError for a reference that is none, and StartupError if there is no such model.
    """
    model = await store.models.find(reference)
    if model is None:
        raise StartupError(f"there is no model {reference!r}; see `dltask models`")
    return model


async def export_model(store: Store, reference: str, folder: Path) -> list[Path]:
    """Write the model that `name` or `name:version` refers to as `model.onnx`, with its class list in `classes.json`
    and its card in `model_card.md`.

    The class list: `{model_name, version, input_size, classes: [{id, name}]}`, ids as the network gives them, from 1.
    Raises ValueError for a reference that is none, and StartupError if there is no such model, or its file is damaged.
    """
    model = await registered(store, reference)
    await anyio.Path(folder).mkdir(parents=True, exist_ok=True)
    onnx, classes, card = folder / "model.onnx", folder / "classes.json", folder / "model_card.md"
    digest = await _fetch(store.files.models.fetch(model["file_id"], onnx), f"model {reference!r}")
    if digest != model["sha256"]:
        onnx.unlink()
        raise StartupError(f"model {reference!r} is damaged: sha256 {digest}; expected {model['sha256']}")
    listing = {
        "model_name": model["model_name"],
        "version": model["version"],
        "input_size": model["input_size"],
        "classes": [{"id": number, "name": name} for number, name in enumerate(model["class_names"], 1)],
    }
    classes.write_bytes(orjson.dumps(listing, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    card.write_text(markdown(model), encoding="utf-8")
    return [onnx, classes, card]


async def _fetch(transfer: Any, what: str) -> str:
    try:
        digest: str = await transfer
        return digest
    except FileMissing as error:
        raise StartupError(f"{what} is gone: {error}") from None


def _safe(name: str) -> str:
    """`name` as a file name: it comes from a document, and may be anything."""
    return re.sub(r"[^\w.-]", "_", name.removesuffix(".png")).lstrip(".")[:100] or "_"
