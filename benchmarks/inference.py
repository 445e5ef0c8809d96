"""How many images a second a test on the CPU takes, end to end: from files in the cache to the numbers.

    python benchmarks/inference.py [--folder ../shared/datasets/bccd] [--images 600] [--train 10] [--rounds 3]

Ours reads the files, runs the exported model (MobileNet at 320 pixels, 10 images at once), writes the detections and
evaluates them; a further line is the whole job, with its pictures and report, which take as long however many images
there are. The floor is a bare onnxruntime session as it is by default, with a thread for each core, on the same
batches, ready in memory. The peer is eager torch: files, network, suppression and the same evaluation, one batch after
the other. Further figures: torchvision's evaluation loop (PIL, a `DataLoader` with a process for each core, one image
at once as in its script, its own smaller SSDLite, pycocotools) and OpenCV's DNN on ready batches. Both networks were
trained for `--train` iterations, each by its own loop, since one that knows nothing finds everything everywhere.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

# As the child has it, before torch loads OpenMP; the floor and the peer have the good of it too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np
import onnxruntime
import torch
from accuracy import DATASETS
from accuracy_peers import torchvision_ssdlite
from evaluation import by_pycocotools
from figures import figure, in_turn
from image_path import BATCH, SIZE, Loader, as_in_a_child, pairs, reference_data, reference_loader
from numpy.typing import NDArray
from PIL import Image as PilImage
from steps import Ours as Training
from steps import new_network, samples_of, sgd
from steps import peer as train_as_torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import functional

from handlers.detection import predict
from handlers.detection.boxes import Detections
from handlers.detection.data import Sample, fit, read_sample
from handlers.detection.devices import reader_threads
from handlers.detection.evaluate import evaluate
from handlers.detection.export import export
from handlers.detection.job import Job, TestedModel
from handlers.detection.measure import torch_detect
from handlers.detection.onnx_detector import OnnxDetector
from schemas.message import RequestMessage

Batches = list[NDArray[np.uint8]]


class Test:
    """A test of a model on the images of a folder, as a worker hands it to its child."""

    def __init__(self, folder: Path, message: RequestMessage, samples: list[Sample], model: TestedModel) -> None:
        """`samples`: the images; one may be there several times, under ids of its own."""
        self.samples, self.message, self.model = samples, message, model
        self.detector = OnnxDetector(model.onnx, model.class_names, SIZE, "cpu")
        self._folder = folder

    def run(self) -> float:
        """Images a second, with the evaluation of what was found."""
        began = time.monotonic()
        lines = self._folder / "detections.jsonl"
        run = predict._run(self.detector, self.samples, BATCH, lines, lambda event: None, lambda: False)
        truths = predict._match_classes(self.message, self.model, run)
        self.evaluated(truths, run.detections)
        return len(self.samples) / (time.monotonic() - began)

    def evaluated(self, truths: dict[int, Any], detections: dict[int, Detections]) -> None:
        """Compute the numbers."""
        names = {sample.id: sample.mongodb_id for sample in self.samples}
        evaluate(list(detections), truths, detections, self.model.class_names, "test", names)

    def eager(self, detect: Callable[[Sequence[Any]], list[Detections]]) -> float:
        """Images a second with a detector in torch."""
        began = time.monotonic()
        truths, detections = {}, {}
        for start in range(0, len(self.samples), BATCH):
            samples = self.samples[start : start + BATCH]
            images, boxes = zip(*map(read_sample, samples), strict=True)
            for sample, labels, found in zip(samples, boxes, detect(images), strict=True):
                truths[sample.id], detections[sample.id] = labels, found
        self.evaluated(truths, detections)
        return len(self.samples) / (time.monotonic() - began)


class Files(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's reference script reads them for evaluation, with their position."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._paths = [sample.path for sample in samples]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        image = PilImage.open(self._paths[position]).convert("RGB")
        return functional.to_dtype(functional.pil_to_tensor(image), torch.float32, scale=True), position


@torch.inference_mode()
def reference(model: nn.Module, loader: Loader, samples: Sequence[Sample], classes: int) -> float:
    """Images a second of `evaluate` in torchvision's references/detection/engine.py."""
    model.eval()
    began = time.monotonic()
    detections = {}
    for images, positions in loader:
        for position, found in zip(positions, model(list(images)), strict=True):
            arrays = (found[name].numpy() for name in ("boxes", "labels", "scores"))
            detections[samples[position].id] = Detections(*arrays)
    by_pycocotools({sample.id: sample.boxes for sample in samples}, detections, classes)
    return len(samples) / (time.monotonic() - began)


def ready(samples: Sequence[Sample]) -> Batches:
    """The batches that the model gets."""
    images = [fit(read_sample(sample)[0], SIZE) for sample in samples]
    return [np.stack(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]


def per_second(run: Callable[[NDArray[np.uint8]], object], batches: Batches) -> float:
    """Images a second of what takes a batch."""
    began = time.monotonic()
    for batch in batches:
        run(batch)
    return sum(map(len, batches)) / (time.monotonic() - began)


def opencv(onnx: Path, batches: Batches) -> float | None:
    """Images a second of OpenCV's DNN; None, after a line that says why, where it cannot run the model."""
    try:
        network = cv2.dnn.readNetFromONNX(str(onnx))

        def run(batch: NDArray[np.uint8]) -> object:
            network.setInput(batch)
            return network.forward(network.getUnconnectedOutLayersNames())

        run(batches[0])
        return per_second(run, batches)
    except cv2.error as error:
        print(f"  OpenCV {cv2.__version__} cannot run the model: {' '.join(str(error).split())[:200]}")
        return None


def whole_job(test: Test, folder: Path, work: Path) -> tuple[float, float]:
    """Seconds of the whole job on the images of the folder, and how many there are."""
    names = {image.id: folder / "images" / image.file_name for image in test.message.image_info}
    lines = [f'{{"id": {number}, "path": "{path}"}}\n' for number, path in names.items()]
    (work / "images.jsonl").write_text("".join(lines))
    (work / "message.json").write_text(test.message.model_dump_json())
    files = {"message": work / "message.json", "images": work / "images.jsonl", "out": work}
    params: dict[str, object] = {"batch_size": BATCH}
    job = Job(task_id="1", attempt=1, kind="TEST", params=params, devices=("cpu",), model=test.model, **files)
    began = time.monotonic()
    predict.run_test(job, lambda event: None, lambda: False)
    return time.monotonic() - began, len(names)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DATASETS / "bccd", help="a COCO folder")
    parser.add_argument("--images", type=int, default=600, help="tested; those of the folder, again and again")
    parser.add_argument("--train", type=int, default=10, help="iterations before the export")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    message, own = samples_of(folder, "test")
    samples = [replace(own[number % len(own)], id=number + 1) for number in range(arguments.images)]
    # The processes of the loader first, while this one is small.
    workers = reader_threads(1)
    loader: Loader = DataLoader(Files(samples), 1, num_workers=workers, collate_fn=pairs, persistent_workers=True)
    next(iter(loader))
    learning = reference_loader(Subset(reference_data(folder, 1), range(arguments.train * BATCH)), workers)
    next(iter(learning))
    as_in_a_child()
    class_names = tuple(known.name for known in message.class_info)
    training = Training(samples_of(folder, "train")[1], new_network(len(class_names)))
    training.run(arguments.train)
    network, other = training.network.eval(), torchvision_ssdlite(len(message.class_info))
    train_as_torchvision(other, sgd(other), learning)
    with tempfile.TemporaryDirectory(prefix="dltask-inference-") as name:
        work = Path(name)
        export(network, class_names, work / "model.onnx")
        model = TestedModel(onnx=work / "model.onnx", class_names=class_names, input_size=SIZE)
        test, batches = Test(work, message, samples, model), ready(samples)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        session = onnxruntime.InferenceSession(model.onnx, options, providers=["CPUExecutionProvider"])
        runs = {
            "ours": test.run,
            "floor": partial(per_second, lambda batch: session.run(None, {"images": batch}), batches),
            "eager": partial(test.eager, torch_detect(network)),
            "reference": partial(reference, other, loader, samples, len(class_names)),
        }
        found = in_turn(runs, arguments.rounds)
        seconds, count = whole_job(test, folder, work)
        by_opencv = opencv(model.onnx, batches)
    common = {"floor": found["floor"], "floor_is": "bare onnxruntime session, batches in memory"}
    figure(
        "testing on a CPU",
        "images/s",
        found["ours"],
        **common,
        peer=found["eager"],
        peer_is="eager torch",
        reach=">= 0.85 x floor; >= 3 x eager torch",
    )
    figure(
        "testing on a CPU, beside torchvision",
        "images/s",
        found["ours"],
        **common,
        peer=found["reference"],
        peer_is="torchvision's evaluation loop, its SSDLite on MobileNetV2",
    )
    print(f"  the whole job with pictures and report: {seconds:.1f} s for {count} images")
    if by_opencv is not None:
        print(f"  OpenCV's DNN, batches in memory: {by_opencv:.1f} images/s")


if __name__ == "__main__":
    main()
