"""Sample images for trying things out: surfaces with drawn defects, and their labels, as a COCO folder."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

#: float32, [height, width] or [height, width, 3] (BGR, 0 … 255).
Field = NDArray[np.float32]
#: Left, top, right, bottom, in pixels.
Box = tuple[int, int, int, int]

#: Images in each split.
COUNTS = {"train": 120, "val": 20, "test": 40}

#: Images have this many pixels a side, give or take a sixth.
_WIDTH, _HEIGHT = 480, 360
#: Every so many images one has no defect.
_CLEAN_EVERY = 8
_MOST_DEFECTS = 5
#: A defect counts as there where it covers this much of a pixel.
_VISIBLE = 0.3
#: Pixels between two defects, and between a defect and the border.
_APART = 6
_TRIES = 20


def make_samples(folder: Path, counts: Mapping[str, int] = COUNTS, seed: int = 0) -> None:
    """Write `images/*.jpg`, `annotations.json` and `split.json` into the existing `folder`.

    `counts` is the number of images in each split. The classes are `scratch`, `pit` and `stain`; one image in eight is
    without any. The same counts and seed give the same files.
    """
    (folder / "images").mkdir()
    classes = list(_DEFECTS)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    names: dict[str, list[str]] = {split: [] for split in counts}
    number = 0
    for split, count in counts.items():
        for _ in range(count):
            number += 1
            # Each image has a state of its own, so that it does not depend on how many there are.
            picture, defects = _image(np.random.default_rng((seed, number)), clean=number % _CLEAN_EVERY == 0)
            name = f"surface_{number:04}.jpg"
            ok, data = cv2.imencode(".jpg", picture, (cv2.IMWRITE_JPEG_QUALITY, 90))
            assert ok
            (folder / "images" / name).write_bytes(data.tobytes())
            names[split].append(name)
            images.append({"id": number, "file_name": name, "width": picture.shape[1], "height": picture.shape[0]})
            for class_name, (left, top, right, bottom) in defects:
                width, height = right - left, bottom - top
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": classes.index(class_name) + 1,
                        "bbox": [left, top, width, height],
                        "area": width * height,
                        "iscrowd": 0,
                    }
                )
    coco = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(classes)],
    }
    (folder / "annotations.json").write_text(json.dumps(coco))
    (folder / "split.json").write_text(json.dumps(names))


def _image(rng: Generator, *, clean: bool) -> tuple[NDArray[np.uint8], list[tuple[str, Box]]]:
    """One picture, uint8 [height, width, 3] BGR, and what is drawn on it."""
    height, width = (int(side * rng.uniform(5 / 6, 7 / 6)) for side in (_HEIGHT, _WIDTH))
    #: Where the light comes from; it tells which side of a dent is bright.
    light = rng.uniform(0, 2 * math.pi)
    surface = _surface(rng, height, width)
    found: list[tuple[str, Box]] = []
    for _ in range(0 if clean else int(rng.integers(1, _MOST_DEFECTS + 1))):
        name = list(_DEFECTS)[rng.integers(len(_DEFECTS))]
        for _ in range(_TRIES):
            mask = _DEFECTS[name][0](rng, height, width)
            box = _bounds(mask)
            if box and not any(_near(box, other) for _, other in found):
                surface = _DEFECTS[name][1](rng, surface, mask, light)
                found.append((name, box))
                break
    lit = surface * _lighting(rng, height, width, light)[..., None]
    lit += rng.normal(0, 2.5, (height, width, 1)).astype(np.float32)
    return np.clip(lit, 0, 255).astype(np.uint8), found


def _bounds(mask: Field) -> Box | None:
    """What the visible part of `mask` fills, or None where that is nothing or too near the border."""
    height, width = mask.shape
    left, top, box_width, box_height = cv2.boundingRect((mask > _VISIBLE).astype(np.uint8))
    box = (left, top, left + box_width, top + box_height)
    inside = box[0] >= _APART and box[1] >= _APART and box[2] <= width - _APART and box[3] <= height - _APART
    return box if box_width and inside else None


def _near(a: Box, b: Box) -> bool:
    return min(a[2], b[2]) - max(a[0], b[0]) > -_APART and min(a[3], b[3]) - max(a[1], b[1]) > -_APART


# --- the surface -----------------------------------------------------------------------------------------------------


def _noise(rng: Generator, height: int, width: int) -> Field:
    return rng.standard_normal((height, width), np.float32)


def _unit(field: NDArray[Any]) -> Field:
    return np.asarray(field / max(float(field.std()), 1e-6), np.float32)


def _surface(rng: Generator, height: int, width: int) -> Field:
    """Brushed metal, a rough casting, or a painted panel, evenly lit."""
    noise = _noise(rng, height, width)
    kind = rng.integers(3)
    if kind == 0:
        brushed = _unit(cv2.blur(noise, (int(rng.integers(41, 91)), 1)))
        texture: Field = 7 * brushed + 3 * _unit(cv2.blur(noise, (9, 1)))
        colour = np.array((150, 148, 145)) + rng.normal(0, 3, 3)
    elif kind == 1:
        coarse = _unit(cv2.resize(_noise(rng, height // 8, width // 8), (width, height), interpolation=cv2.INTER_CUBIC))
        texture = 5 * _unit(cv2.GaussianBlur(noise, (0, 0), 1.2)) + 4 * coarse
        colour = np.array((118, 124, 128)) + rng.normal(0, 4, 3)
    else:
        texture = 3 * _unit(cv2.GaussianBlur(noise, (0, 0), 2.5)) + 1.5 * noise
        paints = ((150, 135, 110), (130, 150, 135), (165, 172, 178), (115, 120, 150))
        colour = np.array(paints[rng.integers(len(paints))]) + rng.normal(0, 5, 3)
    brightness = rng.uniform(0.85, 1.15)
    return np.asarray(colour.astype(np.float32) * brightness + texture[..., None], np.float32)


def _lighting(rng: Generator, height: int, width: int, light: float) -> Field:
    """Brighter towards the light, with a soft spot somewhere."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    slope = rng.uniform(0.05, 0.22) * (x * math.cos(light) + y * math.sin(light))
    spot_x, spot_y = rng.uniform(-0.8, 0.8, 2)
    spot = np.exp(-((x - spot_x) ** 2 + (y - spot_y) ** 2) / 0.8)
    return np.asarray(0.95 + slope + rng.uniform(0, 0.18) * spot, np.float32)


# --- the defects: where each is (a mask, 0 … 1), and how it looks ----------------------------------------------------


def _scratch_mask(rng: Generator, height: int, width: int) -> Field:
    """One to three slightly bent strokes side by side, neither level nor upright."""
    length = rng.uniform(70, 190)
    angle = math.radians(rng.uniform(22, 68)) * rng.choice((-1, 1))
    along = np.array((math.cos(angle), math.sin(angle)))
    across = np.array((-along[1], along[0]))
    start = rng.uniform((0, 0), (width, height)) - along * length / 2
    bend = rng.normal(0, 0.06) * length
    t = np.linspace(0, 1, 24)[:, None]
    mask = np.zeros((height, width), np.uint8)
    for stroke in range(int(rng.integers(1, 4))):
        begin, end = rng.uniform(0, 0.12), rng.uniform(0.88, 1)
        points = start + (begin + t * (end - begin)) * length * along + across * (4 * t * (1 - t) * bend + 5 * stroke)
        # In 1/16 pixel, so that the line is smooth.
        line = np.round(points * 16).astype(np.int32)
        cv2.polylines(mask, [line], False, 255, int(rng.integers(1, 3)), cv2.LINE_AA, 4)
    return np.asarray(mask / np.float32(255), np.float32)


def _draw_scratch(rng: Generator, surface: Field, mask: Field, light: float) -> Field:
    """A bright groove with a dark edge on the side away from the light."""
    shadow = _shifted(mask, -1.5 * math.cos(light), -1.5 * math.sin(light))
    strength = rng.uniform(32, 80)
    edge = 0.6 * np.clip(shadow - mask, 0, 1)
    return np.asarray(surface + strength * (mask - edge)[..., None], np.float32)


def _pit_mask(rng: Generator, height: int, width: int) -> Field:
    """A small uneven disc."""
    radius = rng.uniform(8, 20)
    centre = rng.uniform((radius, radius), (width - radius, height - radius))
    turns = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    radii = radius * (1 + 0.1 * np.sin(2 * turns + rng.uniform(0, 6)) + 0.07 * np.sin(3 * turns + rng.uniform(0, 6)))
    outline = centre + radii[:, None] * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [np.round(outline * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    return np.asarray(cv2.GaussianBlur(mask / np.float32(255), (0, 0), 1), np.float32)


def _draw_pit(rng: Generator, surface: Field, mask: Field, light: float) -> Field:
    """Dark, with the wall towards the light in shadow and the wall opposite lit."""
    x, y = 3 * math.cos(light), 3 * math.sin(light)
    relief = _shifted(mask, x, y) - _shifted(mask, -x, -y)
    depth = rng.uniform(28, 70) * mask + rng.uniform(25, 40) * relief * mask
    return np.asarray(surface - depth[..., None], np.float32)


def _stain_mask(rng: Generator, height: int, width: int) -> Field:
    """A blot with an uneven outline."""
    reach_x, reach_y = rng.uniform(28, 62, 2)
    centre_x, centre_y = rng.uniform((reach_x, reach_y), (width - reach_x, height - reach_y))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    distance = np.sqrt(((x - centre_x) / reach_x) ** 2 + ((y - centre_y) / reach_y) ** 2)
    small = _noise(rng, height // 24 + 2, width // 24 + 2)
    uneven = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    edge = 14 * (1 - distance + 0.12 * uneven)
    return np.asarray(1 / (1 + np.exp(-np.clip(edge, -30, 30))), np.float32)


def _draw_stain(rng: Generator, surface: Field, mask: Field, light: float) -> Field:
    """Rust, oil or water: the surface shines through, and the rim is darker, as where something dried."""
    tints = ((0.62, 0.76, 0.92), (0.72, 0.7, 0.68), (0.84, 0.8, 0.74))
    tint = np.array(tints[rng.integers(len(tints))], np.float32)
    rim = 4 * mask * (1 - mask)
    depth = (rng.uniform(0.55, 1) * mask + 0.35 * rim)[..., None]
    return np.asarray(surface * (1 - depth * (1 - tint)), np.float32)


def _shifted(mask: Field, x: float, y: float) -> Field:
    move = np.array([[1, 0, x], [0, 1, y]], np.float32)
    return np.asarray(cv2.warpAffine(mask, move, (mask.shape[1], mask.shape[0])), np.float32)


_DEFECTS: dict[
    str, tuple[Callable[[Generator, int, int], Field], Callable[[Generator, Field, Field, float], Field]]
] = {
    "scratch": (_scratch_mask, _draw_scratch),
    "pit": (_pit_mask, _draw_pit),
    "stain": (_stain_mask, _draw_stain),
}
