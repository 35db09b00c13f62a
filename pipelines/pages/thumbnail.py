"""Thumbnails, which are small JPEG copies of pictures for HTML pages."""

from __future__ import annotations

import io

from pipelines.config import LimitsConfig
from vlm.errors import ImageError
from vlm.image import open_image

SIDE = 256
"""Length of the longer side of a thumbnail, in pixels."""
MAX_PIXELS = LimitsConfig().max_pixels


def make_thumbnail(data: bytes | None, *, side: int = SIDE, max_pixels: int = MAX_PIXELS) -> bytes | None:
    """Encode a small JPEG copy of a picture. Return None if `data` is None or if the picture cannot be decoded.

    Args:
        data: bytes of a picture file, or None if there is no picture.
        side: largest length of the thumbnail's longer side, in pixels.
        max_pixels: largest width times height of the picture; a picture with more pixels is not decoded.
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
