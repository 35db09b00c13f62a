"""Thumbnails: small JPEG files for people to look at."""

from __future__ import annotations

import io

from pipelines.config import LimitsConfig
from vlm.errors import ImageError
from vlm.image import open_image

SIDE = 256
"""Pixels of the longer side."""
MAX_PIXELS = LimitsConfig().max_pixels


def make_thumbnail(data: bytes | None, *, side: int = SIDE, max_pixels: int = MAX_PIXELS) -> bytes | None:
    """Encode a small JPEG of a picture file. Return None without data or if the picture cannot be decoded.

    Args:
        data: bytes of a picture file.
        side: longer side of the result at most, pixels.
        max_pixels: width times height of the picture at most; a larger picture is not decoded.
    """
    if not data:
        return None
    try:
        image, _ = open_image(data, max_pixels=max_pixels, min_side=1)
    except ImageError:
        return None
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
