"""A BMP decoder that crashes its process for pictures of one size, and never returns for pictures of another size.

Importing this module installs the decoder in Pillow. Spark's Python workers import this module when they unpickle
settings whose class is defined in this module.
"""

from __future__ import annotations

import ctypes
import itertools
from collections import deque
from typing import Any

from pictures import encoded, picture
from PIL import BmpImagePlugin, Image

from pipelines.config import LimitsConfig
from vlm.config import ImageConfig

CRASHING_SIZE, HANGING_SIZE = (41, 43), (43, 41)


def crashing_picture() -> bytes:
    """Return a valid BMP file that crashes a process in which the decoder is installed."""
    return encoded(picture(41, CRASHING_SIZE), "BMP")


def hanging_picture() -> bytes:
    """Return a valid BMP file whose decoding never ends in a process in which the decoder is installed."""
    return encoded(picture(43, HANGING_SIZE), "BMP")


class CrashingBmp(BmpImagePlugin.BmpImageFile):
    """A BMP file whose decoder crashes in C, or loops in C where no signal handler of Python runs."""

    def load(self) -> Any:
        """For a picture of size CRASHING_SIZE, read from address zero. For size HANGING_SIZE, loop for ever."""
        if self.size == CRASHING_SIZE:
            ctypes.string_at(0)
        if self.size == HANGING_SIZE:
            deque(itertools.repeat(0), maxlen=0)
        return super().load()


class CrashingLimits(LimitsConfig):
    """Row limits whose class is defined in this module, so that a process that unpickles the limits imports the
    module.
    """


class CrashingImage(ImageConfig):
    """Picture settings whose class is defined in this module, so that a process that unpickles the settings imports the
    module.
    """


def install() -> None:
    """Replace Pillow's BMP decoder by the decoder that crashes."""
    Image.init()
    _, accept = Image.OPEN["BMP"]
    Image.register_open("BMP", CrashingBmp, accept)


install()
