"""Average precision and matching as COCO defines them (Lin et al. 2014, https://cocodataset.org/#detection-eval).

Both are computed by faster-coco-eval; here its input is made and its output read.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval.core import mask
from faster_coco_eval.core.coco import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster
from numpy.typing import NDArray

from handlers.detection.boxes import Boxes, Detections, Floats, Ints

#: Detections of one class in one image that count, best first.
MAX_DETECTIONS = 100
#: Ranges of areas, square pixels.
ALL_SIZES = (0.0, 1e10)
SMALL, MEDIUM, LARGE = (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10)
#: A detection is right from this IoU on, where one has to be chosen.
MATCH_IOU = 0.5

#: Pairs of an image and a class that are evaluated at once: each costs about a kilobyte, also where the image has
#: nothing of the class.
_MAX_PAIRS = 100_000


@dataclass(frozen=True)
class Measured:
    """The labelled and detected boxes of all measured images, one after the other."""

    image_ids: tuple[int, ...]
    #: Class ids are 1 … `classes`.
    classes: int
    truths: Boxes
    #: The image of each box, int64 [len(truths)], and of each detection.
    truth_images: Ints
    found: Detections
    found_images: Ints


def collect(
    image_ids: Sequence[int], truths: Mapping[int, Boxes], detections: Mapping[int, Detections], classes: int
) -> Measured:
    """What counts of the images `image_ids`: boxes of the classes 1 … `classes`, of detections the best of a class."""
    labelled = [(image_id, truths[image_id]) for image_id in image_ids if image_id in truths]
    detected = [(image_id, detections[image_id]) for image_id in image_ids if image_id in detections]
    kept_truths = [(image_id, boxes.select(boxes.class_ids <= classes)) for image_id, boxes in labelled]
    kept = [(image_id, _best(one, classes)) for image_id, one in detected]
    return Measured(
        tuple(image_ids),
        classes,
        Boxes(
            _joined([boxes.xyxy for _, boxes in kept_truths], np.zeros((0, 4), np.float32)),
            _joined([boxes.class_ids for _, boxes in kept_truths], np.zeros(0, np.int64)),
            _joined([boxes.crowd for _, boxes in kept_truths], np.zeros(0, np.bool_)),
            _joined([boxes.difficult for _, boxes in kept_truths], np.zeros(0, np.bool_)),
        ),
        np.repeat([image_id for image_id, _ in kept_truths], [len(boxes) for _, boxes in kept_truths]).astype(np.int64),
        Detections(
            _joined([one.xyxy for _, one in kept], np.zeros((0, 4), np.float32)),
            _joined([one.class_ids for _, one in kept], np.zeros(0, np.int64)),
            _joined([one.scores for _, one in kept], np.zeros(0, np.float32)),
        ),
        np.repeat([image_id for image_id, _ in kept], [len(one) for _, one in kept]).astype(np.int64),
    )


def _joined(arrays: list[Any], otherwise: Any) -> Any:
    return np.concatenate(arrays) if arrays else otherwise


def _best(detections: Detections, classes: int) -> Detections:
    """The best `MAX_DETECTIONS` of each class; they are sorted already."""
    ids = detections.class_ids
    if len(ids) <= MAX_DETECTIONS and ids.max(initial=0) <= classes:
        return detections
    order = np.argsort(ids, kind="stable")
    _, first = np.unique(ids[order], return_index=True)
    rank = np.empty(len(ids), np.int64)
    rank[order] = np.arange(len(ids)) - np.repeat(first, np.diff([*first, len(ids)]))
    rows = (rank < MAX_DETECTIONS) & (ids <= classes)
    return Detections(detections.xyxy[rows], ids[rows], detections.scores[rows])


class _Evaluation(COCOeval_faster):  # type: ignore[misc]  # the library has no types
    """With difficult objects as in PASCAL VOC: ignored as crowds are, but overlapped as any other object is.

    The library takes a crowd for ignored and an ignored object for a crowd, of which a part is enough.
    """

    def computeIoU(self, imgId: int, catId: int) -> Any:
        """IoU [detections, objects], the best detection first, as its own is."""
        classes, by_class = ([catId] if self.params.useCats else self.params.catIds), bool(self.params.useCats)
        truths = self.gt_dataset.get_instances([imgId], classes, by_class)[0][0]
        found = self.dt_dataset.get_instances([imgId], classes, by_class)[0][0]
        if not truths or not found:
            return []
        order = np.argsort([-one["score"] for one in found], kind="stable")[: self.params.maxDets[-1]]
        boxes = [[one["bbox"] for one in rows] for rows in ([found[index] for index in order], truths)]
        return mask.iou(*boxes, [int(one["covers_many"]) for one in truths])


class CocoEvaluation:
    """faster-coco-eval over one set of boxes."""

    def __init__(self, measured: Measured) -> None:
        self._measured = measured
        images = [{"id": image_id} for image_id in measured.image_ids]
        categories = [{"id": class_id, "name": str(class_id)} for class_id in range(1, measured.classes + 1)]
        truths, found = measured.truths, measured.found
        # The library ignores what is a crowd to it.
        flags = zip((~truths.counted).astype(int).tolist(), truths.crowd.tolist(), strict=True)
        ignored = ({"iscrowd": ignored, "covers_many": crowd} for ignored, crowd in flags)
        scores = ({"score": score} for score in found.scores.tolist())
        true_rows = _annotations(measured.truth_images, truths.class_ids, truths.xyxy, ignored)
        found_rows = _annotations(measured.found_images, found.class_ids, found.xyxy, scores)
        self._true = COCO({"images": images, "categories": categories, "annotations": list(true_rows)})
        self._found = COCO({"images": images, "categories": categories, "annotations": list(found_rows)})

    def precision(self, areas: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
        """Interpolated precision [IoU 0.50, 0.55, … 0.95; recall 0, 0.01, … 1; class; range of areas].

        -1 where a class has no labelled object in the range.
        """
        parts = []
        for classes, images in self._chunks():
            evaluation = self._evaluation()
            evaluation.params.catIds, evaluation.params.imgIds = classes, images
            evaluation.params.areaRng = [list(area) for area in areas]
            evaluation.params.areaRngLbl = [str(area) for area in areas]
            evaluation.evaluate()
            evaluation.accumulate()
            parts.append(evaluation.eval["precision"][..., 0])
        return np.concatenate(parts, axis=2)

    def match(self, *, same_class: bool) -> Ints:
        """The row in `truths` that each detection found at `MATCH_IOU`; -1 for none.

        In each image the detections choose in the order of their scores: each takes the object (of its class, if
        `same_class`, else of any) that it overlaps most of those not taken; if none is left, one that does not count
        (a crowd, or what is difficult), which many may take. So what detections of a score and better find does not
        hang on the others.
        """
        found = np.full(len(self._measured.found), -1)
        _, counts = np.unique(self._measured.found_images, return_counts=True)
        chunks = self._chunks() if same_class else [(list(range(1, self._measured.classes + 1)), None)]
        for classes, images in chunks:
            evaluation = self._evaluation()
            evaluation.params.catIds = classes
            if images is not None:
                evaluation.params.imgIds = images
            evaluation.params.useCats = int(same_class)
            # In one image; those that are too many of a class are left out already. No more than there are: the
            # library sets memory aside for so many in each image, and a test of 50,000 images would ask for 200 GB.
            evaluation.params.maxDets = [int(counts.max(initial=1))]
            evaluation.params.iouThrs = [MATCH_IOU]
            evaluation.params.areaRng, evaluation.params.areaRngLbl = [list(ALL_SIZES)], ["all"]
            evaluation.evaluate()
            evaluation.accumulate()
            pairs = [pair.split("_") for pair in evaluation.eval["matched"]]
            for detection, truth in pairs:
                found[int(detection) - 1] = int(truth) - 1
        return found

    def _evaluation(self) -> Any:
        # Its own log of progress says nothing that the caller does not know.
        evaluation = _Evaluation(self._true, self._found, iouType="bbox", print_function=lambda *_: None)
        evaluation.params.maxDets = [MAX_DETECTIONS]
        return evaluation

    def _chunks(self) -> Iterator[tuple[list[int], list[int]]]:
        """Classes, and the images that have any of them: classes are measured each by itself."""
        measured = self._measured
        step = max(_MAX_PAIRS // max(len(measured.image_ids), 1), 1)
        for first in range(1, measured.classes + 1, step):
            classes = range(first, min(first + step, measured.classes + 1))
            images = [
                of[(classes[0] <= ids) & (ids <= classes[-1])]
                for of, ids in (
                    (measured.truth_images, measured.truths.class_ids),
                    (measured.found_images, measured.found.class_ids),
                )
            ]
            # Of no image at all the library makes no array.
            yield list(classes), np.unique(np.concatenate(images)).tolist() or [measured.image_ids[0]]


def xywh(xyxy: Floats) -> list[list[float]]:
    """Corners [N, 4] as `[x, y, width, height]` each, in double precision."""
    wide = xyxy.astype(np.float64)
    wide[:, 2:] -= wide[:, :2]
    rows: list[list[float]] = wide.tolist()
    return rows


def _annotations(
    images: Ints, class_ids: Ints, xyxy: Floats, extras: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    rows = zip(images.tolist(), class_ids.tolist(), xywh(xyxy), extras, strict=True)
    for number, (image_id, class_id, box, extra) in enumerate(rows, 1):
        yield {
            "id": number,
            "image_id": image_id,
            "category_id": class_id,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        } | extra
