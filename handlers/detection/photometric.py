"""The data-expansion operations that leave boxes as they are: light, lens, sensor and file.

Each takes an image and a random state, and returns another image of the same size, uint8. Lengths are in pixels of the
network's input.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from handlers.detection.boxes import Image
from schemas.enums import ExpansionDataClass

Photometric = Callable[[Image, Generator], Image]

#: Mean of an image, 0 … 255, beyond which it is never lit.
_BRIGHTEST = 245


def _looked_up(image: Image, values: NDArray[np.floating]) -> Image:
    """`image` with each value v replaced by values[v], rounded and clipped."""
    return np.asarray(cv2.LUT(image, np.clip(np.rint(values), 0, 255).astype(np.uint8)), np.uint8)


def _mean(image: Image) -> float:
    """Over all pixels and colours, 0 … 255."""
    return sum(cv2.mean(image)[:3]) / 3


def _brightness(image: Image, random: Generator) -> Image:
    return _looked_up(image, np.arange(256) * random.uniform(0.6, 1.4))


def _contrast(image: Image, random: Generator) -> Image:
    mean = _mean(image)
    return _looked_up(image, mean + (np.arange(256) - mean) * random.uniform(0.6, 1.4))


def _gamma(image: Image, random: Generator) -> Image:
    """Another exposure: black and white stay. 1/1.5 … 1.5, as likely up as down (nnU-Net, Isensee et al. 2021)."""
    return _looked_up(image, 255 * (np.arange(256) / 255) ** math.exp(random.uniform(-1, 1) * math.log(1.5)))


def _clahe(image: Image, random: Generator) -> Image:
    """Local contrast, evened out in 8 x 8 tiles, with a clip limit of 1 … 3 (Zuiderveld 1994). Colours stay."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(random.uniform(1, 3), (8, 8)).apply(lab[..., 0])
    return np.asarray(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), np.uint8)


def _uneven_light(image: Image, random: Generator) -> Image:
    """Brighter towards one side and darker towards the other, by up to 30 % in the corners.

    A lamp at one side, the shade of a lens, or the field of a coil: the first order of the bias fields with which
    scans are expanded (TorchIO, Pérez-García et al. 2021).
    """
    height, width = image.shape[:2]
    angle, most = random.uniform(0, 2 * math.pi), random.uniform(0.1, 0.3)
    across = (np.arange(width, dtype=np.float32) + 0.5) * (2 / width) - 1
    down = (np.arange(height, dtype=np.float32) + 0.5) * (2 / height) - 1
    x, y = math.cos(angle), math.sin(angle)
    light = 1 + (most / (abs(x) + abs(y))) * (x * across[None, :, None] + y * down[:, None, None])
    return _rounded(image * light.astype(np.float32))


def _greyscale(image: Image, random: Generator) -> Image:
    return np.asarray(cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB), np.uint8)


def _saturation(image: Image, random: Generator) -> Image:
    share = random.uniform(0.5, 1.5)
    return np.asarray(cv2.addWeighted(image, share, _greyscale(image, random), 1 - share, 0), np.uint8)


def _hue(image: Image, random: Generator) -> Image:
    """Turned by up to 18 degrees; OpenCV counts hue in steps of two degrees."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(np.int16) + random.integers(-9, 10)) % 180
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)


def _blur(image: Image, random: Generator) -> Image:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), random.uniform(0.3, 1.5)), np.uint8)


def _motion_blur(image: Image, random: Generator) -> Image:
    """Drawn out by 2 … 8 pixels in some direction, evenly to both sides, so that boxes stay right.

    A moving belt or hand; one of the corruptions that detectors are measured under (Michaelis et al. 2019,
    "Benchmarking Robustness in Object Detection").
    """
    angle, length = random.uniform(0, math.pi), random.uniform(2, 8)
    along = np.linspace(-length / 2, length / 2, 65)
    x, y = along * math.cos(angle), along * math.sin(angle)
    # Each point of the line falls on the four pixels around it, by its nearness to each.
    grid = np.arange(-5, 6)
    kernel = np.maximum(1 - np.abs(grid[:, None] - y), 0) @ np.maximum(1 - np.abs(grid[:, None] - x), 0).T
    return np.asarray(cv2.filter2D(image, -1, (kernel / kernel.sum()).astype(np.float32)), np.uint8)


def _noise(image: Image, random: Generator) -> Image:
    noise = random.standard_normal(image.shape, np.float32) * random.uniform(2, 12)
    return _rounded(image + noise)


def _rounded(values: NDArray[np.floating]) -> Image:
    return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)


def _jpeg(image: Image, random: Generator) -> Image:
    # Compressed in RGB order: which channel is which does not matter to the artefacts we are after.
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(random.integers(30, 91))])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


def relight(image: Image, random: Generator) -> Image:
    """As if light and camera had been a little different: brightness and contrast by a fifth at most, colour by 30 %.

    No operation that a task names: every training image goes through it. A grey image stays grey.
    """
    mean = _mean(image)
    brightness, contrast, colour = random.uniform(0.8, 1.2), random.uniform(0.8, 1.2), random.uniform(0.7, 1.3)
    # Not until what is nearly white is white: what is faint on paper or tiles would be gone, and its label would stay.
    brightness = min(brightness, max(_BRIGHTEST / max(mean, 1), 1))
    image = _looked_up(image, brightness * (mean + (np.arange(256) - mean) * contrast))
    return np.asarray(cv2.addWeighted(image, colour, _greyscale(image, random), 1 - colour, 0), np.uint8)


#: In the order in which they are applied, which is that of a camera: light, colour, lens, sensor, file.
PHOTOMETRIC: dict[ExpansionDataClass, Photometric] = {
    ExpansionDataClass.BRIGHTNESS: _brightness,
    ExpansionDataClass.CONTRAST: _contrast,
    ExpansionDataClass.GAMMA: _gamma,
    ExpansionDataClass.CLAHE: _clahe,
    ExpansionDataClass.UNEVEN_LIGHT: _uneven_light,
    ExpansionDataClass.SATURATION: _saturation,
    ExpansionDataClass.HUE: _hue,
    ExpansionDataClass.GRAYSCALE: _greyscale,
    ExpansionDataClass.GAUSSIAN_BLUR: _blur,
    ExpansionDataClass.MOTION_BLUR: _motion_blur,
    ExpansionDataClass.GAUSSIAN_NOISE: _noise,
    ExpansionDataClass.JPEG_COMPRESSION: _jpeg,
}
