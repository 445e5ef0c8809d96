"""How good detections are: COCO average precision."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core.coco import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster

from handlers.detection.boxes import Boxes, Detections, Floats
from handlers.detection.errors import DataError
from schemas.result import MAX_CLASSES_LISTED, ClassMetrics, Metrics

#: Detections of one class in one image that count, best first, as COCO has it.
MAX_DETECTIONS = 100


def measurable(truths: Iterable[Boxes]) -> bool:
    """Whether there is any labelled object to find; a crowd is none."""
    return any(not boxes.crowd.all() for boxes in truths)


def xywh(xyxy: Floats) -> list[list[float]]:
    """Corners [N, 4] as `[x, y, width, height]` each, in double precision."""
    wide = xyxy.astype(np.float64)
    wide[:, 2:] -= wide[:, :2]
    rows: list[list[float]] = wide.tolist()
    return rows


def evaluate(
    image_ids: Sequence[int],
    truths: Mapping[int, Boxes],
    detections: Mapping[int, Detections],
    class_names: Sequence[str],
    on: str,
) -> Metrics:
    """Average precision of `detections` on the images `image_ids`, whose labels are `truths` (by image id).

    As COCO defines it (Lin et al. 2014, https://cocodataset.org/#detection-eval; computed by faster-coco-eval): `map`
    is over IoU thresholds 0.50, 0.55, … 0.95 and all classes that have a labelled object. `class_names[i]` is class
    i + 1; boxes of other classes do not count, and neither do images that are not in `image_ids`. `on` names the split.
    Of more classes than a result can list, those with most labelled objects are listed.

    Raises DataError where no image has a labelled object: then there is nothing to measure (see `measurable`).
    """
    if not measurable(truths[image_id] for image_id in image_ids if image_id in truths):
        raise DataError("no image has a labelled object to measure against")
    images = [{"id": image_id} for image_id in image_ids]
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(class_names)]
    true = _coco(images, categories, _annotations(image_ids, truths))
    found = _coco(images, categories, _annotations(image_ids, detections))
    # Its own log of progress says nothing that the caller does not know.
    evaluation = COCOeval_faster(true, found, iouType="bbox", print_function=lambda *_: None)
    evaluation.params.maxDets = [MAX_DETECTIONS]
    # Only over all sizes: the other ranges would cost as much each.
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    #: [IoU threshold, recall, class]; -1 where a class has no labelled object.
    precision = evaluation.eval["precision"][:, :, :, 0, 0]
    instances = _count(len(class_names), (truths[i].class_ids[~truths[i].crowd] for i in image_ids if i in truths))
    detected = _count(len(class_names), (detections[i].class_ids for i in image_ids if i in detections))
    per_class = [
        ClassMetrics(
            class_id=index + 1,
            class_name=name,
            map=_average(precision[:, :, index]),
            map_50=_average(precision[0, :, index]),
            instances=int(instances[index]),
            detections=int(detected[index]),
        )
        for index, name in enumerate(class_names)
    ]
    if len(per_class) > MAX_CLASSES_LISTED:
        listed = sorted(
            sorted(per_class, key=lambda row: -row.instances)[:MAX_CLASSES_LISTED], key=lambda r: r.class_id
        )
        per_class = listed
    return Metrics(
        map=_average(precision) or 0.0,
        map_50=_average(precision[0]) or 0.0,
        map_75=_average(precision[5]) or 0.0,
        per_class=tuple(per_class),
        on=on,
    )


def _annotations(
    image_ids: Iterable[int], by_image: Mapping[int, Boxes] | Mapping[int, Detections]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for image_id in image_ids:
        boxes = by_image.get(image_id)
        if boxes is None or not len(boxes):
            continue
        if isinstance(boxes, Detections):
            extras = [{"score": score} for score in boxes.scores.tolist()]
        else:
            extras = [{"iscrowd": crowd} for crowd in boxes.crowd.astype(int).tolist()]
        for box, class_id, extra in zip(xywh(boxes.xyxy), boxes.class_ids.tolist(), extras, strict=True):
            row = {
                "id": len(rows) + 1,
                "image_id": image_id,
                "category_id": class_id,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            rows.append(row | extra)
    return rows


def _coco(images: list[dict[str, Any]], categories: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> COCO:
    return COCO({"images": images, "categories": categories, "annotations": annotations})


def _count(classes: int, class_ids: Iterable[Any]) -> Any:
    counts = np.zeros(classes + 1, np.int64)
    for ids in class_ids:
        counts += np.bincount(ids[ids <= classes], minlength=classes + 1)
    return counts[1:]


def _average(precision: Any) -> float | None:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None
