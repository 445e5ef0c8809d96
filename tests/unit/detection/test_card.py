"""What the child puts on a model's card is what it trained on."""

import platform
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from drawn import CLASSES, draw, make_job

from handlers.detection.batches import ImageStore
from handlers.detection.card import training_facts
from handlers.detection.data import read_message
from handlers.detection.ranks import Ranks
from handlers.detection.training_data import load_data


def test_the_facts_are_those_of_the_images_that_could_be_used(tmp_path: Path) -> None:
    """Boxes of each class in the readable training images alone; the batch as it was; every library's version."""
    job = make_job(tmp_path, 12, seed=5)
    (tmp_path / "images" / "1.png").write_bytes(b"")
    with ThreadPoolExecutor(2) as pool:
        data = load_data(job, read_message(job.message), ImageStore(224, 1 << 26), pool, Ranks())
    facts = training_facts(job, data, 3, "in words")
    used = [number for number in range(2, 13) if number % 4]
    boxes = Counter(class_id for number in used for class_id, _ in draw(number)[1])
    assert (facts.train_images, facts.val_images) == (len(used), 3)
    assert facts.boxes == tuple(boxes[class_id] for class_id in range(1, len(CLASSES) + 1))
    assert (facts.batch_size, facts.seed, facts.recipe) == (3, 5, "in words")
    assert (facts.versions["python"], facts.versions["torch"]) == (platform.python_version(), torch.__version__)
    named = {"python", "torch", "torchvision", "onnx", "onnxruntime", "opencv", "numpy"}
    assert named <= set(facts.versions) <= named | {"dltask"}
