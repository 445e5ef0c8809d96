"""Task documents as the service leaves them, written at once."""

from datetime import UTC, datetime, timedelta
from typing import Any

from bson import ObjectId

CLASSES = ("Platelets", "RBC", "WBC")


def ended(number: Any, status: str = "SUCCEEDED", *, kind: str = "TRAIN", **fields: Any) -> dict[str, Any]:
    """An admitted document in this state."""
    key, now = ObjectId(), datetime.now(UTC)
    return {
        "_id": key,
        "admitted_id": key,
        "task_id": number,
        "task_type": kind,
        "dataset": "toy",
        "status": status,
        "error_code": 0,
        "attempt": 1,
        "priority": 0,
        "create_time": now - timedelta(minutes=5),
        "start_time": now - timedelta(minutes=4),
        "end_time": now - timedelta(minutes=1),
        "param_request": {"model_name": "ok", "device_type": "CPU", "device_num": 1, "max_num_iters": 300},
        "history": [{"status": status, "at": now, "attempt": 1}],
        **fields,
    }


def result(**fields: Any) -> dict[str, Any]:
    """A result with everything that a worker writes into one."""
    per_class = [
        {
            "class_id": place,
            "class_name": name,
            "map": 0.3 + place / 10,
            "map_50": 0.6 + place / 10,
            "instances": 100 * place,
            "detections": 900,
            "precision": 0.9,
            "recall": 0.8,
            "f1": 0.85,
            "threshold": 0.4,
            "precision_at_recall": [1 - step / 25 for step in range(21)],
        }
        for place, name in enumerate(CLASSES, 1)
    ]
    counts = [[90, 3, 0, 7], [2, 80, 1, 17], [0, 0, 40, 1], [5, 11, 0, 0]]
    metrics = {
        "map": 0.51,
        "map_50": 0.9,
        "map_75": 0.5,
        "per_class": per_class,
        "on": "val",
        "size": {"small": None, "medium": 0.4, "large": 0.6},
        "confusion": {"iou": 0.5, "threshold": 0.4, "labels": [*CLASSES, "background"], "counts": counts},
        "worst": [{"img_id": str(ObjectId()), "missed": 3, "false": 1}],
    }
    return {
        "model_name": "ok",
        "version": 1,
        "device": "cpu",
        "metrics": metrics,
        "images": {"used": 20, "skipped": 1, "skipped_examples": [{"img_id": str(ObjectId()), "reason": "damaged"}]},
        "seconds": 12.5,
        "reports": {},
        "notes": ["a smaller batch"],
        "iterations": 300,
        "best_iteration": 280,
        "resumed_from_iteration": None,
        "initial_weights": "imagenet",
        "class_names": list(CLASSES),
        "data_fingerprint": "f" * 64,
        **fields,
    }
