"""`dltask models` and `dltask dataset`: what trainings leave, and what they learn from."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from service.cli.common import AsJson, fail, out, print_json, with_store

datasets = typer.Typer(help="Bring data sets into MongoDB, list and export them.", no_args_is_help=True)
models = typer.Typer(help="List, describe and export the registered models.", invoke_without_command=True)


@models.callback()
def list_models(context: typer.Context, as_json: AsJson = False) -> None:
    """Every version of every registered model."""
    from datetime import UTC, datetime

    from service.cli.show import table
    from service.show import age

    if context.invoked_subcommand is not None:
        return
    found = with_store(lambda store: store.models.all())
    if as_json:
        print_json(found)
        return
    now = datetime.now(UTC)
    rows = [
        [
            model["model_name"],
            model["version"],
            "" if model.get("parent_version") is None else model["parent_version"],
            model.get("net_model", ""),
            ", ".join(model.get("class_names", ())),
            f"{metrics['map']:.3f}" if (metrics := model.get("metrics")) else "",
            f"{metrics['map_50']:.3f} ({metrics['on']})" if metrics else "",
            str(model.get("task_id", "")),
            age(model.get("create_time"), now),
        ]
        for model in found
    ]
    columns = ("MODEL", "VERSION", "FROM", "NET", "CLASSES", "mAP", "mAP@.5", "TASK", "AGE")
    out().print(table(columns, rows) if rows else "no models; a training registers one")


@models.command("export")
def models_export(
    reference: Annotated[str, typer.Argument(metavar="NAME[:VERSION]")],
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    as_json: AsJson = False,
) -> None:
    """Write a model's ONNX file, its class list and its card into DIR; print their paths."""
    from service.cli.fetch import export_model

    try:
        paths = with_store(lambda store: export_model(store, reference, folder))
    except ValueError as error:
        fail(f"model {reference!r}; {error}")
    if as_json:
        print_json(paths)
    else:
        print("\n".join(map(str, paths)))


@models.command("card")
def models_card(
    reference: Annotated[str, typer.Argument(metavar="NAME[:VERSION]")],
    as_json: AsJson = False,
) -> None:
    """What a version was made of, how, and how good it is: Markdown, or its document."""
    from service.cli.fetch import registered
    from service.model_card import markdown

    try:
        model = with_store(lambda store: registered(store, reference))
    except ValueError as error:
        fail(f"model {reference!r}; {error}")
    if as_json:
        print_json(model)
    else:
        print(markdown(model), end="")


@datasets.command("import")
def dataset_import(
    path: Annotated[Path, typer.Argument(metavar="PATH")],
    name: Annotated[str, typer.Option(help="The data set's name in MongoDB.")],
    form: Annotated[str, typer.Option("--format", metavar="coco|voc", help="How the folder is laid out.")],
    split_file: Annotated[Path | None, typer.Option(help="JSON: {split: [file names]}.")] = None,
    split: Annotated[str | None, typer.Option(help="Put every image in this split.")] = None,
    as_json: AsJson = False,
) -> None:
    """Bring images and labels into MongoDB; an import that was cut off goes on where it stopped."""
    from service.cli.follow import count_reporter
    from service.datasets import Summary, import_dataset, open_source

    if form not in ("coco", "voc"):
        fail(f"--format is {form!r}; expected coco or voc")
    if split is not None and split_file is not None:
        fail("--split and --split-file were both given; expected one of them")
    source = open_source(form, path, split_file, split)
    with count_reporter(Console(stderr=True), "images") as progress:
        summary: Summary = with_store(lambda store: import_dataset(store, source, name, progress))
    _tell(summary, "imported", as_json)
    raise typer.Exit(0 if summary.images or summary.already_there else 2)


@datasets.command("list")
def dataset_list(as_json: AsJson = False) -> None:
    """The data sets and how many images are in each split."""
    from service.cli.show import table
    from service.datasets import list_datasets

    found = with_store(list_datasets)
    if as_json:
        print_json(found)
        return
    rows = [
        [
            entry["dataset"],
            entry["images"],
            ", ".join(f"{split or '(no split)'} {images}" for split, images in entry["splits"].items()),
        ]
        for entry in found
    ]
    out().print(table(("DATASET", "IMAGES", "SPLITS"), rows) if rows else "no data sets; `dltask dataset import`")


@datasets.command("export")
def dataset_export(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    form: Annotated[str, typer.Option("--format", metavar="coco")] = "coco",
    as_json: AsJson = False,
) -> None:
    """Write a data set into DIR: annotations.json, images/ and split.json."""
    from service.cli.follow import count_reporter
    from service.datasets import export_dataset

    if form != "coco":
        fail(f"--format is {form!r}; expected coco")
    with count_reporter(Console(stderr=True), "images") as progress:
        summary = with_store(lambda store: export_dataset(store, name, folder, progress))
    _tell(summary, "exported", as_json)


def _tell(summary: Any, done: str, as_json: bool) -> None:
    from service.show import printable

    if as_json:
        print_json(summary.document())
        return
    for problem in summary.problems:
        print(printable(problem), file=sys.stderr)
    extra = f", {summary.already_there} already there" if summary.already_there else ""
    if summary.failed_images or summary.failed_labels:
        extra += f"; left out: {summary.failed_images} images, {summary.failed_labels} labels"
    splits = ", ".join(f"{split or '(no split)'} {images}" for split, images in sorted(summary.splits.items()))
    text = f"{summary.dataset}: {done} {summary.images} images, {summary.labels} labels{extra}"
    print(printable(text + (f" ({splits})" if splits else "")))
