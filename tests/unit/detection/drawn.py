"""Small data sets drawn for tests: squares and discs on noise, as the files of a job."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from handlers.detection.job import EVENT, Event, Job

CLASSES = ("square", "disc")
SIDE = 96


def draw(seed: int) -> tuple[np.ndarray, list[tuple[int, list[float]]]]:
    """An RGB image, with (class id, [x, y, w, h]) of two or three objects; of none for every fifth seed."""
    random = np.random.default_rng(seed)
    image = random.integers(90, 130, (SIDE, SIDE, 3)).astype(np.uint8)
    labels = []
    for _ in range(0 if seed % 5 == 4 else int(random.integers(2, 4))):
        class_id, side = int(random.integers(1, 3)), int(random.integers(14, 30))
        x, y = (int(value) for value in random.integers(0, SIDE - side, 2))
        if class_id == 1:
            cv2.rectangle(image, (x, y), (x + side - 1, y + side - 1), (230, 60, 40), -1)
        else:
            cv2.circle(image, (x + side // 2, y + side // 2), side // 2, (40, 80, 220), -1)
        labels.append((class_id, [float(x), float(y), float(side), float(side)]))
    return image, labels


def message(splits: Sequence[str], labels: Sequence[list[tuple[int, list[float]]]]) -> dict[str, Any]:
    """The request message for images with these splits and labels."""
    instances = [(image, label) for image, all_labels in enumerate(labels, 1) for label in all_labels]
    return {
        "dataset_info": {
            "task_id": "7",
            "task_type": "TRAIN",
            "created": "2026-01-01T00:00:00Z",
            "image_count": len(splits),
            "instance_count": len(instances),
            "class_count": len(CLASSES),
            "fingerprint": "f" * 64,
        },
        "image_info": [
            {"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE, "split": split, "mongodb_id": f"{i:024x}"}
            for i, split in enumerate(splits, 1)
        ],
        "instance_info": [
            {
                "id": i,
                "image_id": image,
                "class_id": class_id,
                "bbox": box,
                "area": box[2] * box[3],
                "mongodb_id": f"{i:024x}",
            }
            for i, (image, (class_id, box)) in enumerate(instances, 1)
        ],
        "class_info": [{"id": i, "name": name, "instance_count": 1} for i, name in enumerate(CLASSES, 1)],
    }


def make_job(folder: Path, images: int = 12, *, splits: Sequence[str] = (), **changes: Any) -> Job:
    """A training job in `folder`, small enough for a test; `changes` go into `params` or over the job's fields."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    labels = []
    for number in range(1, images + 1):
        image, found = draw(number)
        labels.append(found)
        cv2.imwrite(str(folder / "images" / f"{number}.png"), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    splits = list(splits) or ["val" if number % 4 == 0 else "train" for number in range(1, images + 1)]
    (folder / "message.json").write_text(json.dumps(message(splits, labels)))
    lines = [{"id": number, "path": str(folder / "images" / f"{number}.png")} for number in range(1, images + 1)]
    (folder / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields = {name: changes.pop(name) for name in list(changes) if name in Job.model_fields}
    params = {"model_scope": "SMALL", "max_num_iters": 4, "batch_size": 4, "snap_shot_ivterval": 2} | changes
    return Job.model_validate(
        {
            "task_id": "7",
            "attempt": 1,
            "kind": "TRAIN",
            "params": params,
            "devices": ["cpu"],
            "message": folder / "message.json",
            "images": folder / "images.jsonl",
            "out": folder / "out",
        }
        | fields
    )


def write_job(folder: Path, job: Job) -> Path:
    """The job's file."""
    path = folder / "job.json"
    path.write_text(job.model_dump_json())
    return path


def parse_events(lines: str) -> list[Event]:
    """The events of a child's stdout."""
    return [EVENT.validate_json(line) for line in lines.splitlines()]
