"""How a picture becomes pixels."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from vlm.config.base import Config


class ImageConfig(Config):
    """How a picture becomes pixels. The same numbers serve shards, training and captioning."""

    size: PositiveInt
    resize: Literal["stretch", "crop", "pad"] = "stretch"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
