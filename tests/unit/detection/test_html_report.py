"""One page tells all of a task; it needs nothing else, and whatever things are called, nothing in it runs."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from handlers.detection import html_report as module
from handlers.detection.html_report import Notes, html_report
from handlers.detection.job import Job, Note, Progress

# Under names that pytest does not take for test classes.
from handlers.detection.job import Tested as Outcome
from handlers.detection.job import TestedModel as RegisteredModel
from schemas.message import MAX_CLASS_NAME, RequestMessage
from schemas.result import (
    AtThreshold,
    Calibration,
    ClassMetrics,
    ImagesUsed,
    Leaks,
    Metrics,
    NearIdentical,
    Rates,
    SkippedImage,
    Suspicious,
    SuspiciousLabel,
    WorstImage,
)

EVIL = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=alert(3)></style>"
    "{{ 7 * 7 }}\u202e\x00\x1b[31m"
)
KINDS = ("unlabelled", "wrong_class", "poor_box", "no_object", "duplicate")


def outcome(folder: Path, name: str, classes: int = 2, **changes: Any) -> Outcome:
    """A test with everything in it, and `name` wherever there is a name."""
    rows = tuple(
        ClassMetrics(
            class_id=number,
            class_name=name,
            map=0.5,
            map_50=0.875,
            instances=7,
            detections=9,
            threshold=0.25,
            precision=0.5,
            recall=0.5,
            f1=0.5,
            at_model_threshold=AtThreshold(threshold=0.375, precision=0.125, recall=0.25, f1=0.3),
        )
        for number in range(1, classes + 1)
    )
    suspect = SuspiciousLabel(
        img_id=name, kind="wrong_class", class_name=name, detected_as=name, score=0.9, iou=0.8, bbox=(1, 2, 3, 4)
    )
    metrics = Metrics(
        map=0.5,
        map_50=0.875,
        map_75=0.25,
        per_class=rows,
        on=name,
        classes_not_in_model=(name,),
        classes_not_in_data=(name,),
        threshold=0.4,
        f1=0.5,
        worst=(WorstImage(img_id=name, missed=3, false=1),),
        at_model_thresholds=Rates(precision=0.125, recall=0.25, f1=0.3),
        suspicious=Suspicious(counts=dict.fromkeys(KINDS, 3), examples=(suspect,)),  # type: ignore[arg-type]
        calibration=Calibration(ece=0.0625, from_score=0.3, bins=()),
    )
    skipped = SkippedImage(img_id=name, reason=name)
    near = NearIdentical(img_id=name, other_img_id=name, distance=5)
    fields: dict[str, Any] = {
        "detections": folder / "x",
        "detection_count": 18,
        "images_per_second": 3.0,
        "device": name,
        "metrics": metrics,
        "leaks": Leaks(count=1, compared=12, training_images=34, examples=(near,)),
        "images": ImagesUsed(used=12, skipped=1, skipped_examples=(skipped,)),
        "reports": {},
    }
    return Outcome(**(fields | changes))


def page(folder: Path, made: Outcome, name: str = "cells", notes: tuple[str, ...] = ()) -> str:
    info = {"task_id": "7", "task_type": "TEST", "dataset": name, "created": "2026-01-01T00:00:00Z", "split": name}
    counts = {"image_count": 13, "instance_count": 14, "class_count": 1, "fingerprint": "f" * 64}
    # As far as a message takes it.
    row = {"id": 1, "name": name.encode(errors="replace").decode()[:MAX_CLASS_NAME], "instance_count": 14}
    message = RequestMessage.model_validate(
        {"dataset_info": info | counts, "image_info": [], "instance_info": [], "class_info": [row]}
    )
    job = Job(
        task_id="7",
        attempt=1,
        kind="TEST",
        params={"model_name": name, "batch_size": 10},
        devices=("cpu",),
        message=folder,
        images=folder,
        out=folder,
        model=RegisteredModel(onnx=folder, class_names=(name,), input_size=32, reference=f"{name}:3"),
    )
    path = html_report(job, message, made, notes)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


class _Parsed(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_it_tells_all(tmp_path: Path) -> None:
    """Numbers, ids, reasons, counts, parameters and notes."""
    seen = _Parsed(page(tmp_path, outcome(tmp_path, "platelets"), notes=("a smaller batch",))).text
    for told in ("0.875", "0.375", "0.125", "a smaller batch", "1 of 12 measured images", "34 training images"):
        assert told in seen
    for told in ("cells:3", "platelets, detected as platelets", "batch_size", "f" * 64, "1, 2, 3, 4", "0.062"):
        assert told in seen


@pytest.mark.parametrize("name", [EVIL, "Z" + "\u0310" * 2000, "W" * 10_000, "\ud800", "\u05d0\u05d1 1", "$x$", " "])
def test_hostile_names_are_text(tmp_path: Path, name: str) -> None:
    """Escaped, without control and direction marks, and cut: the page has the elements that it has for good names."""
    good = _Parsed(page(tmp_path, outcome(tmp_path, "good"), "good", ("good",)))
    evil = _Parsed(page(tmp_path, outcome(tmp_path, name), name, (name,)))
    assert [tag for tag, _ in evil.elements] == [tag for tag, _ in good.elements]
    assert not any(attribute.startswith("on") for _, attributes in evil.elements for attribute in attributes)
    assert not {"script", "svg", "iframe", "object", "link", "form"} & {tag for tag, _ in evil.elements}
    assert not any(mark in evil.text for mark in "\u202e\x00\x1b")
    assert len(evil.text) < 60_000
    if name == EVIL:
        assert "<script>alert(1)</script>" in evil.text
        assert "{{ 7 * 7 }}" in evil.text


def test_it_needs_nothing_else(tmp_path: Path) -> None:
    """No address leads out of it, and its policy would let none be followed; it adapts to dark and to a phone."""
    cv2.imwrite(str(tmp_path / "worst.png"), np.full((20, 30, 3), 9, np.uint8))
    html = page(tmp_path, outcome(tmp_path, "x", reports={"worst.png": tmp_path / "worst.png"}))
    addresses = [
        value or ""
        for _, attributes in _Parsed(html).elements
        for key, value in attributes.items()
        if key in ("src", "href")
    ]
    assert [address[:22] for address in addresses] == ["data:image/png;base64,"]
    assert "url(" not in html
    assert "@import" not in html
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert "script-src" not in policy
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport" content="width=device-width' in html


def test_pictures_are_in_it_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones as JPEG, no wider than a screen; those for which there is no room, and broken ones, are left out."""
    noise = np.random.default_rng(0).integers(0, 255, (600, 3000, 3)).astype(np.uint8)
    for name in ("worst", "samples", "confusion"):
        cv2.imwrite(str(tmp_path / f"{name}.png"), noise if name != "confusion" else noise[:50, :50])
    (tmp_path / "suspicious.png").write_bytes(b"x" * 1_000_000)
    names = ("worst", "suspicious", "confusion", "samples")
    made = outcome(tmp_path, "x", reports={f"{name}.png": tmp_path / f"{name}.png" for name in names})

    def embedded() -> list[np.ndarray]:
        html = page(tmp_path, made)
        assert len(html) < module.MAX_PICTURE_BYTES + 100_000
        data = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', html)
        return [cv2.imdecode(np.frombuffer(base64.b64decode(one), np.uint8), cv2.IMREAD_COLOR) for one in data]

    assert [image.shape for image in embedded()] == [(50, 50, 3), (320, 1600, 3), (320, 1600, 3)]
    monkeypatch.setattr(module, "MAX_PICTURE_BYTES", 500_000)
    assert [image.shape for image in embedded()] == [(50, 50, 3), (320, 1600, 3)]


def test_without_labels_and_with_many_classes(tmp_path: Path) -> None:
    """What is not known is said to be, or not there; of very many classes some are named."""
    html = page(tmp_path, outcome(tmp_path, "x", metrics=None, leaks=None))
    assert "nothing to measure against" in html
    assert "does not tell on which images" in html
    assert "800 more classes" in page(tmp_path, outcome(tmp_path, "x", classes=1000))


def test_notes_are_passed_on_and_kept() -> None:
    events: list[Any] = []
    notes = Notes(events.append)
    progress = Progress(iteration=1, max_num_iters=2, images_per_second=1, eta_seconds=1)
    for event in (Note(message="a"), progress, Note(message="b")):
        notes(event)
    assert notes.texts == ["a", "b"]
    assert events == [Note(message="a"), progress, Note(message="b")]
