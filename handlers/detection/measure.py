"""How well a network, or the file exported from it, finds what is labelled, on images of the training's own data."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from handlers.detection.batches import ImageStore
from handlers.detection.boxes import Boxes, Detections, Image
from handlers.detection.data import ImageError, Sample, fit
from handlers.detection.networks.base import Detector, Network
from handlers.detection.suppression import best_boxes

#: Images in one forward pass.
_BATCH = 16

Detect = Callable[[Sequence[Image]], list[Detections]]


@dataclass(frozen=True)
class Found:
    """What is labelled and what was found, by image id, in pixels of the image as it is labelled."""

    truths: dict[int, Boxes]
    detections: dict[int, Detections]


def find(samples: Sequence[Sample], store: ImageStore, pool: ThreadPoolExecutor, detect: Detect) -> Found:
    """Run `detect` on every image of `samples` that can be read."""

    def load(sample: Sample) -> tuple[Sample, Image] | None:
        try:
            return sample, store.get(sample)[0]
        except ImageError:  # It could be read when the training began, and is counted there.
            return None

    found = Found({}, {})
    for start in range(0, len(samples), _BATCH):
        loaded = [one for one in pool.map(load, samples[start : start + _BATCH]) if one]
        detections = detect([image for _, image in loaded])
        for (sample, image), detected in zip(loaded, detections, strict=True):
            # The store may have shrunk the image; how large an object is counts as it is labelled.
            width, height = store.size(sample)
            larger = np.array([width / image.shape[1], height / image.shape[0]] * 2, np.float32)
            found.truths[sample.id] = sample.boxes.clipped(width, height)
            found.detections[sample.id] = Detections(detected.xyxy * larger, detected.class_ids, detected.scores)
    return found


def torch_detect(network: Network) -> Detect:
    """`network` as a detector of images, where its weights are; it must be in eval mode."""
    detector = Detector(network).eval()
    device = network.device

    @torch.inference_mode()
    def detect(images: Sequence[Image]) -> list[Detections]:
        if not images:
            return []
        stretched = torch.from_numpy(np.stack([fit(image, network.input_size) for image in images]))
        all_boxes, all_scores = detector(stretched.to(device))
        found = []
        for image, boxes, scores in zip(images, all_boxes, all_scores, strict=True):
            best, class_ids, best_scores = (tensor.cpu().numpy() for tensor in best_boxes(boxes, scores))
            pixels = best * np.array([image.shape[1], image.shape[0]] * 2, np.float32)
            found.append(Detections(pixels, class_ids, best_scores))
        return found

    return detect
