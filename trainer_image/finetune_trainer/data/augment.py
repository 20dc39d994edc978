"""Random changes of images, drawn from a generator that is given, with torchvision's kernels. Called by pixels.

torchvision's own transforms draw from torch's global generator, which the threads that prepare images would share with each other and
with dropout; what they drew would depend on which of them comes first.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional

RATIOS: Final = (3 / 4, 4 / 3)
"""Width by height of a random part, as in Inception (Szegedy et al. 2015)."""
TRIES: Final = 10
MAGNITUDES: Final = 30
"""RandAugment's scale has 31 marks."""


def random_resized_crop(
    image: Tensor, size: tuple[int, int] | None, min_scale: float, interpolation: Any, draw: np.random.Generator
) -> Tensor:
    """A part of an image, scaled to a size, if there is one. image: uint8 (channels, height, width)."""
    height, width = image.shape[-2:]
    part = _part(height, width, min_scale, draw)
    if size is None:
        return image[:, part[0] : part[0] + part[2], part[1] : part[1] + part[3]]
    cropped: Tensor = functional.resized_crop(
        image, *part, size=list(size), interpolation=interpolation, antialias=True
    )
    return cropped


def _part(height: int, width: int, min_scale: float, draw: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width. After ten tries that do not fit it is the largest part in the middle of a ratio that may be."""
    for _ in range(TRIES):
        area = height * width * draw.uniform(min_scale, 1)
        ratio = math.exp(draw.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draw.integers(height - h + 1)), int(draw.integers(width - w + 1)), h, w
    ratio = min(max(width / height, RATIOS[0]), RATIOS[1])
    h, w = min(height, round(width / ratio)), min(width, round(height * ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def _sheared(image: Tensor, x: float, y: float) -> Tensor:
    shear = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    found: Tensor = functional.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0, 0])
    return found


def _moved(image: Tensor, x: float, y: float) -> Tensor:
    far = [int(150 / 331 * x * image.shape[-1]), int(150 / 331 * y * image.shape[-2])]
    found: Tensor = functional.affine(image, angle=0.0, translate=far, scale=1.0, shear=[0.0, 0.0])
    return found


Operation = Callable[[Tensor, float], Tensor]

SIGNED: Final[dict[str, Operation]] = {
    "ShearX": lambda image, part: _sheared(image, 0.3 * part, 0.0),
    "ShearY": lambda image, part: _sheared(image, 0.0, 0.3 * part),
    "TranslateX": lambda image, part: _moved(image, part, 0.0),
    "TranslateY": lambda image, part: _moved(image, 0.0, part),
    "Rotate": lambda image, part: functional.rotate(image, angle=30.0 * part),
    "Brightness": lambda image, part: functional.adjust_brightness(image, 1.0 + 0.9 * part),
    "Color": lambda image, part: functional.adjust_saturation(image, 1.0 + 0.9 * part),
    "Contrast": lambda image, part: functional.adjust_contrast(image, 1.0 + 0.9 * part),
    "Sharpness": lambda image, part: functional.adjust_sharpness(image, 1.0 + 0.9 * part),
}
"""Operations by a part of their greatest strength, -1 to 1 (ranges of torchvision's RandAugment)."""
UNSIGNED: Final[dict[str, Operation]] = {
    "Identity": lambda image, _: image,
    "Posterize": lambda image, part: functional.posterize(image, bits=round(8 - 4 * part)),
    "Solarize": lambda image, part: functional.solarize(image, threshold=255 * (1 - part)),
    "AutoContrast": lambda image, _: functional.autocontrast(image),
    "Equalize": lambda image, _: functional.equalize(image),
}
"""The same for parts from 0 to 1."""
_ALL: Final = [*SIGNED, *UNSIGNED]


def rand_augment(image: Tensor, operations: int, magnitude: int, draw: np.random.Generator) -> Tensor:
    """RandAugment (Cubuk et al. 2020). image: uint8 (channels, height, width)."""
    for _ in range(operations):
        name = _ALL[draw.integers(len(_ALL))]
        part = magnitude / MAGNITUDES
        if name in SIGNED and draw.random() < 0.5:
            part = -part
        image = (SIGNED | UNSIGNED)[name](image, part)
    return image


def rectangle(height: int, width: int, share: float, draw: np.random.Generator) -> tuple[slice, slice]:
    """CutMix's rectangle of about a share of an image, cut off at its edges (Yun et al. 2019)."""
    side = math.sqrt(share)
    y, x = int(draw.integers(height)), int(draw.integers(width))
    half_y, half_x = int(height * side) // 2, int(width * side) // 2
    return slice(max(0, y - half_y), min(height, y + half_y)), slice(max(0, x - half_x), min(width, x + half_x))
