"""A picture as one epoch shows it: a part of it, mirrored, in another light.

What is done to a row follows from (seed, epoch, row) alone, so it is the same on any number of ranks, with any number
of loader workers, and after a restart. Crop, mirror and light are three calls of Pillow, which lets go of the
interpreter: brightness, contrast and saturation together are one matrix, rounded and cut off once.

A text that says left or right is true of one of two mirrored pictures, and a box in a text is true of no other crop:
the text that a picture is shown with decides what may be done to it.

Letters: B rows, H W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.config import AugmentConfig
from pipelines.formats.shards import Row
from pipelines.worker.data.order import Draw, fractions
from vlm.text.regions import REGION_TOKEN

WIDEST = 4 / 3
"""Width by height of a crop is between this and its inverse (as Szegedy et al., 2015)."""
LUMA = np.array([0.299, 0.587, 0.114])
"""How much of a pixel's grey is red, green and blue (ITU-R BT.601, as Pillow's)."""
NUMBERS = 8
"""Random numbers of a row: area, shape and place of its crop (2), side, brightness, contrast, saturation."""

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


class Augmenter:
    """Changes the pictures of a run's rows as its config says."""

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        sided = "|".join(map(re.escape, config.sided_words))
        self._sided = re.compile(rf"\b(?:{sided})\b", re.IGNORECASE)

    def rows(self, rows: Sequence[Row], texts: Sequence[tuple[str, str]], drawn: Draw) -> list[Row]:
        """The rows with other pixels, of the same shapes.

        Args:
            rows: B of them.
            texts: the (prompt, text) that each is shown with.
            drawn: which rows of the shards these are, and in which epoch.
        """
        numbers_BN = fractions(drawn, NUMBERS, seed=self._seed)
        return [
            row._replace(pixels=self._pixels(row.pixels, "\n".join(text), numbers))
            for row, text, numbers in zip(rows, texts, numbers_BN, strict=True)
        ]

    def _pixels(self, pixels_HWC: Pixels, text: str, numbers: Floats) -> Pixels:
        config, image = self._config, Image.fromarray(pixels_HWC)
        boxes = REGION_TOKEN.search(text)
        if config.scale[0] < 1 and not boxes:
            image = image.resize(image.size, Image.Resampling.BILINEAR, _crop(*image.size, config.scale, numbers[:4]))
        if numbers[4] < config.flip and not boxes and not self._sided.search(text):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        strengths = np.array([config.brightness, config.contrast, config.saturation])
        if strengths.any():
            image = _lit(image, *(1 + strengths * (2 * numbers[5:] - 1)))
        return np.asarray(image)


def _crop(width: int, height: int, scale: tuple[float, float], numbers: Floats) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a crop, whose area is a share of the picture's within `scale`.

    The shape is drawn among those that fit: none is drawn in vain, so every row takes as many numbers.
    """
    area = scale[0] + numbers[0] * (scale[1] - scale[0])
    ratio = min(WIDEST, 1 / area) ** (2 * numbers[1] - 1)
    across, down = width * (area * ratio) ** 0.5, height * (area / ratio) ** 0.5
    left, top = numbers[2] * (width - across), numbers[3] * (height - down)
    return left, top, min(left + across, width), min(top + down, height)


def _lit(image: Image.Image, brightness: float, contrast: float, saturation: float) -> Image.Image:
    """Each pixel moved from its own grey by `saturation`, from the picture's grey by `contrast`, then times
    `brightness`; 1 leaves it as it is."""
    grey = np.asarray(image.reduce(image.size))[0, 0] @ LUMA
    colours = saturation * np.eye(3) + (1 - saturation) * LUMA
    matrix = brightness * np.column_stack([contrast * colours, np.full(3, (1 - contrast) * grey)])
    return image.convert("RGB", tuple(matrix.ravel().tolist()))
