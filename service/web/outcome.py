"""What a result says, as templates show it: classes, curves, confusion, pictures. Every value may be anything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from handlers.store.database import Document
from schemas.task import object_id
from service.show import number, part
from service.web.charts import MOST_LINES, Chart, Line, line_chart, thinned
from service.web.view import rows_of

#: Classes listed; a result names at most 1,000, and `dltask status --json` gives them all.
MOST_CLASSES = 300
_MOST_CONFUSED = 51
_MOST_PICTURES = 20

#: What the pictures show, by their name without its ending; first those that nothing else on the page shows.
_CAPTIONS = {
    "samples": "Some images with what is labelled and what was found",
    "worst": "The images with the most mistakes",
    "suspicious": "Labels that may be wrong",
    "training": "Loss, average precision and learning rate over the training",
    "precision_recall": "Precision over recall",
    "calibration": "How often detections of a score are right",
    "confusion": "Confusion matrix",
}
_REPORT = "report.html"
#: Columns of the classes that older workers do not write.
_OPTIONAL = ("precision", "recall", "f1", "threshold")


@dataclass(frozen=True)
class ClassRow:
    """One class of a result; None is unknown."""

    name: Any
    instances: Any
    map: float | None
    map_50: float | None
    #: By the names in `Outcome.columns`.
    more: Mapping[str, float | None]


@dataclass(frozen=True)
class Confusion:
    """Rows are what is labelled, columns what was found; each cell (count, share of its row in tenths)."""

    labels: Sequence[Any]
    rows: Sequence[tuple[Any, Sequence[tuple[int, int]]]]
    iou: float | None
    threshold: float | None


@dataclass(frozen=True)
class Picture:
    """A report file."""

    name: str
    url: str
    caption: str


@dataclass(frozen=True)
class Outcome:
    """A result."""

    #: Name and value of each score over all classes.
    scores: Sequence[tuple[str, float | None]]
    on: Any
    classes: Sequence[ClassRow]
    classes_left_out: int
    columns: Sequence[str]
    confusion: Confusion | None
    precision_recall: Chart | None
    #: Whether the chart shows only some of the classes.
    some_classes: bool
    worst: Sequence[Mapping[str, Any]]
    pictures: Sequence[Picture]
    #: Where all of it is in one file.
    report: str | None


def outcome_of(result: Mapping[str, Any]) -> Outcome:
    """The outcome in a task's `result`."""
    metrics = part(result, "metrics")
    listed = metrics.get("per_class")
    entries = rows_of(listed, MOST_CLASSES)
    columns = [name for name in _OPTIONAL if any(_score(entry.get(name)) is not None for entry in entries)]
    chart, some = _precision_recall(entries)
    return Outcome(
        scores=_scores(metrics),
        on=metrics.get("on"),
        classes=[_class(entry, columns) for entry in entries],
        classes_left_out=max(0, len(listed) - MOST_CLASSES) if isinstance(listed, list) else 0,
        columns=columns,
        confusion=_confusion(part(metrics, "confusion")),
        precision_recall=chart,
        some_classes=some,
        worst=rows_of(metrics.get("worst"), 8),
        pictures=_pictures(part(result, "reports")),
        report=_report(part(result, "reports")),
    )


def score_of(value: Any) -> float | None:
    """A number as a score; None for what is none."""
    return _score(value)


def training_charts(rows: Sequence[Document], iterations: float) -> list[tuple[str, Chart]]:
    """The loss and the average precision of a training over its iterations, as far as it is."""
    series = {name: _series(rows, name) for name in ("loss", "map", "map_50")}
    furthest = max([at for points in series.values() for at, _ in points], default=0.0)
    # The whole way, so that one sees how far it is; what somebody wrote there may be any number.
    right = iterations if furthest <= iterations <= max(100 * furthest, 1000) else furthest
    charts = [
        ("Loss", line_chart([Line("loss", thinned(series["loss"]))], x="iteration", y="loss", right=right)),
        (
            "mAP on the validation images",
            line_chart(
                [Line("mAP@.5", thinned(series["map_50"])), Line("mAP", thinned(series["map"]))],
                x="iteration",
                y="mAP",
                top=1.0,
                right=right,
            ),
        ),
    ]
    return [(title, chart) for title, chart in charts if chart is not None]


def _series(rows: Sequence[Document], name: str) -> list[tuple[float, float]]:
    found = [(number(row.get("iteration")), number(row[name])) for row in rows if name in row]
    return [(iteration, value) for iteration, value in found if iteration > 0]


def _scores(metrics: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    names = {"mAP": "map", "mAP@.5": "map_50", "mAP@.75": "map_75"}
    scores = [(name, _score(metrics.get(field))) for name, field in names.items() if field in metrics]
    size = part(metrics, "size")
    return scores + [(f"mAP, {name} boxes", _score(size.get(name))) for name in ("small", "medium", "large") if size]


def _score(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value == value else None


def _class(entry: Mapping[str, Any], columns: Sequence[str]) -> ClassRow:
    return ClassRow(
        name=entry.get("class_name"),
        instances=entry.get("instances"),
        map=_score(entry.get("map")),
        map_50=_score(entry.get("map_50")),
        more={name: _score(entry.get(name)) for name in columns},
    )


def _precision_recall(entries: Sequence[Mapping[str, Any]]) -> tuple[Chart | None, bool]:
    lines = []
    for entry in entries:
        values = entry.get("precision_at_recall")
        if isinstance(values, list) and 2 <= len(values) <= 101:
            known = [(place / (len(values) - 1), _score(value)) for place, value in enumerate(values)]
            points = [(recall, value) for recall, value in known if value is not None]
            lines.append((number(entry.get("instances")), Line(str(entry.get("class_name")), points)))
    # A screen of a hundred lines says nothing: those of which there is most to measure.
    lines.sort(key=lambda pair: -pair[0])
    chart = line_chart([line for _, line in lines], x="recall", y="precision (IoU 0.5)", top=1.0, right=1.0)
    return chart, len(lines) > MOST_LINES


def _confusion(confusion: Mapping[str, Any]) -> Confusion | None:
    labels, counts = confusion.get("labels"), confusion.get("counts")
    if not isinstance(labels, list) or not isinstance(counts, list) or not 1 < len(labels) <= _MOST_CONFUSED:
        return None
    if len(counts) != len(labels) or not all(isinstance(row, list) and len(row) == len(labels) for row in counts):
        return None
    rows = []
    for label, row in zip(labels, counts, strict=True):
        whole = [max(0, int(number(value))) for value in row]
        total = sum(whole)
        rows.append((label, [(value, round(10 * value / total) if total else 0) for value in whole]))
    return Confusion(labels, rows, _score(confusion.get("iou")), _score(confusion.get("threshold")))


def _report(reports: Mapping[str, Any]) -> str | None:
    known = object_id(reports.get(_REPORT))
    return None if known is None else f"/reports/{known}"


def _pictures(reports: Mapping[str, Any]) -> list[Picture]:
    found = []
    for name, file_id in list(reports.items())[:_MOST_PICTURES]:
        known = object_id(file_id)
        if known is not None and name != _REPORT:
            stem = str(name).removesuffix(".png")
            found.append(Picture(stem, f"/reports/{known}", _CAPTIONS.get(stem, stem)))
    order = list(_CAPTIONS)
    return sorted(found, key=lambda picture: order.index(picture.name) if picture.name in _CAPTIONS else len(order))
