"""What the child puts on a model's card: the data that it used, the recipe, the versions of what it ran on."""

import importlib.metadata
import platform

import cv2
import numpy as np
import onnx
import onnxruntime
import torch
import torchvision

from handlers.detection.job import Job
from handlers.detection.training_data import TrainingData
from schemas.card import TrainingFacts


def training_facts(job: Job, data: TrainingData, batch_size: int, recipe: str) -> TrainingFacts:
    """The facts of a training of `data`; `batch_size` is what was used, `recipe` says the rest in words."""
    info = data.message.dataset_info
    counts = np.zeros(len(data.class_names) + 1, np.int64)
    for sample in data.train:
        counts += np.bincount(sample.boxes.class_ids[~sample.boxes.crowd], minlength=len(counts))
    return TrainingFacts(
        dataset=info.dataset[:200],
        split=info.split[:200],
        train_images=len(data.train),
        val_images=len(data.val),
        boxes=tuple(counts[1:].tolist()),
        batch_size=batch_size,
        seed=job.seed,
        recipe=recipe,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    modules = (torch, torchvision, onnx, onnxruntime, cv2, np)
    found = {module.__name__: str(module.__version__) for module in modules}
    found["opencv"] = found.pop("cv2")
    try:
        found["dltask"] = importlib.metadata.version("dltask")
    except importlib.metadata.PackageNotFoundError:
        pass  # run from its source
    return {"python": platform.python_version(), **found}
