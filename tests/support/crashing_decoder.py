"""Importing this arms a process: Pillow's BMP decoder then ends it, by a real segmentation fault, at one picture.

Spark's workers import it when they unpickle settings of a class that is at home here.
"""

from __future__ import annotations

import ctypes
from typing import Any

from pictures import encoded, picture
from PIL import BmpImagePlugin, Image

from pipelines.config import LimitsConfig
from vlm.config import ImageConfig

DEADLY_SIZE = (41, 43)


def deadly() -> bytes:
    """A sound picture, at which an armed process dies."""
    return encoded(picture(41, DEADLY_SIZE), "BMP")


class CrashingBmp(BmpImagePlugin.BmpImageFile):
    """A BMP whose decoder has a defect in C."""

    def load(self) -> Any:
        """Read address zero if it is the picture."""
        if self.size == DEADLY_SIZE:
            ctypes.string_at(0)
        return super().load()


class ArmingLimits(LimitsConfig):
    """Limits of a row. Where they arrive, this module has been imported."""


class ArmingImage(ImageConfig):
    """What pictures become. Where it arrives, this module has been imported."""


def arm() -> None:
    """Put the decoder with the defect into the place of the sound one."""
    Image.init()
    _, accept = Image.OPEN["BMP"]
    Image.register_open("BMP", CrashingBmp, accept)


arm()
