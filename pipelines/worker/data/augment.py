"""Random augmentation of training pictures: crop, flips, rotation, brightness, contrast, saturation and erasing.

The random numbers for a row depend only on (seed, epoch, row). The augmentation is therefore the same for any number of
ranks and loader threads, and after a restart. Pillow changes the pixels, and releases the GIL meanwhile. Brightness,
contrast and saturation are combined into one matrix, so pixel values are rounded and clipped only once.

A picture is augmented only in ways that keep its text true. For example, a picture is not flipped if its text contains
"left" or "right", and not rotated if its text contains "above". A picture is not cropped if its text contains the
coordinates of boxes.

Letters in tensor names: rows (B), random numbers (N), height (H), width (W), channels (C).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import regex
from PIL import Image

from pipelines.config import AugmentConfig
from pipelines.formats.shards import Row
from pipelines.worker.data.order import RowPicks, random_fractions
from vlm.text.regions import REGION_TOKEN

WIDEST = 4 / 3
"""Largest aspect ratio (width / height) of a crop. The smallest aspect ratio is 1 / WIDEST (Szegedy et al., 2015)."""
LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in a pixel's grey value (ITU-R BT.601, as in Pillow)."""
ERASED, WIDEST_ERASED = (0.02, 1 / 3), 3.3
"""Smallest and largest share of the picture that is erased, and largest aspect ratio of the erased rectangle.

Source: Zhong et al., 2017.
"""
NUMBERS = 16
"""Number of random numbers per row: crop area, crop shape, crop position (2), flip, three colour factors, vertical
flip, rotation (2), erasing, erased area, erased shape, and erased position (2)."""
QUARTER_TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


class Augmenter:
    """Object that augments the pictures of training rows with the settings of `train.augment`."""

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._sided = _any_of(config.sided_words)
        self._directed = _any_of((*config.sided_words, *config.upright_words))

    def rows(self, rows: Sequence[Row], texts: Sequence[tuple[str, str]], picks: RowPicks) -> list[Row]:
        """Return the rows with augmented pixels. The shape of the pixels does not change.

        Args:
            rows: B rows of the shards.
            texts: pair (prompt, text) that is shown with each row.
            picks: index of each row in the shards, and epoch in which the row is shown.
        """
        numbers_BN = random_fractions(picks, NUMBERS, seed=self._seed)
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
        if max(config.flip_vertical, config.rotate) and not boxes and not self._directed.search(text):
            if numbers[8] < config.flip_vertical:
                image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
            if numbers[9] < config.rotate:
                image = image.transpose(QUARTER_TURNS[int(numbers[10] * len(QUARTER_TURNS))])
        strengths = np.array([config.brightness, config.contrast, config.saturation])
        if strengths.any():
            image = _adjust_colours(image, *(1 + strengths * (2 * numbers[5:8] - 1)))
        if numbers[11] < config.erase and not boxes:
            _erase(image, numbers[12:])
        return np.asarray(image)


def _any_of(words: Sequence[str]) -> regex.Pattern[str]:
    """Return a pattern that finds any of the words in upper or lower case, but not as part of a longer word."""
    return regex.compile(rf"\b(?:{'|'.join(map(regex.escape, words))})\b", regex.IGNORECASE)


def _crop(
    width: int, height: int, scale: tuple[float, float], numbers: Floats, widest: float = WIDEST
) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a random crop. The crop's share of the picture's area is within `scale`.

    The aspect ratio is drawn at random from the ratios at which a crop of this area fits into the picture. Each crop
    draws exactly one ratio, so every row uses the same number of random numbers. The aspect ratio of the crop is
    between 1 / widest and widest.
    """
    area = scale[0] + numbers[0] * (scale[1] - scale[0])
    ratio = min(widest, 1 / area) ** (2 * numbers[1] - 1)
    across, down = width * (area * ratio) ** 0.5, height * (area / ratio) ** 0.5
    left, top = numbers[2] * (width - across), numbers[3] * (height - down)
    return left, top, min(left + across, width), min(top + down, height)


def _erase(image: Image.Image, numbers: Floats) -> None:
    """Fill a random rectangle of the picture with the picture's mean colour, in place."""
    left, top, right, bottom = (round(edge) for edge in _crop(*image.size, ERASED, numbers, WIDEST_ERASED))
    size = max(right - left, 1), max(bottom - top, 1)
    image.paste(image.reduce(image.size).resize(size), (left, top))


def _adjust_colours(image: Image.Image, brightness: float, contrast: float, saturation: float) -> Image.Image:
    """Change the saturation, then the contrast, then the brightness of a picture. A factor of 1 changes nothing.

    `saturation` scales the distance of a pixel from its own grey value. `contrast` scales the distance of a pixel from
    the mean grey value of the picture. `brightness` scales the value of a pixel.
    """
    grey = np.asarray(image.reduce(image.size))[0, 0] @ LUMA
    colours = saturation * np.eye(3) + (1 - saturation) * LUMA
    matrix = brightness * np.column_stack([contrast * colours, np.full(3, (1 - contrast) * grey)])
    return image.convert("RGB", tuple(matrix.ravel().tolist()))
