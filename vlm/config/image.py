"""Config of picture preprocessing."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from vlm.config.base import Config


class ImageConfig(Config):
    """Preprocessing of a picture. Shards, training and captioning all use the same values.

    Attributes:
        size: height and width of the model's input, in pixels.
        resize: how a picture becomes a square. `stretch` scales both sides to `size`. `crop` scales the shorter side to
            `size` and keeps the centre. `pad` scales the longer side to `size` and fills the empty area with white.
        filter: interpolation method of the resize. Every method is antialiased when a picture shrinks.
        crop_start: how the position of a crop is rounded if an odd number of pixels must be cut. `down` rounds to the
            lower integer, as transformers does. `even` rounds to the nearest even integer, as torchvision and timm do.
        mean: numbers to subtract from the red, green and blue channel, as fractions of full brightness.
        std: numbers by which the channels are divided after `mean` is subtracted, as fractions of full brightness.
    """

    size: PositiveInt
    resize: Literal["stretch", "crop", "pad"] = "stretch"
    filter: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    crop_start: Literal["down", "even"] = "down"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
