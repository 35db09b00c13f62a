"""How a picture becomes pixels."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from vlm.config.base import Config


class ImageConfig(Config):
    """How a picture becomes pixels. The same numbers serve shards, training and captioning.

    Attributes:
        size: height and width, pixels.
        resize: `stretch` both sides to size; `crop` the centre after the shorter side is size; `pad` with white after
            the longer side is size.
        filter: of the resize; each widens when it shrinks a picture (antialias).
        crop_start: where a crop begins when its margin is odd: half a pixel `down` (transformers) or to the `even`
            side (torchvision, timm).
        mean: of each channel, as a share of full brightness.
        std: of each channel, likewise.
    """

    size: PositiveInt
    resize: Literal["stretch", "crop", "pad"] = "stretch"
    filter: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    crop_start: Literal["down", "even"] = "down"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
