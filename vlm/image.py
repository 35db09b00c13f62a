"""A picture from bytes to pixels, one way for shards, training and captioning, so that a model always sees the same.

Bytes come from strangers: the header is judged (format, number of pixels, sides) before anything is decoded, only the
decoders of FORMATS ever run, and whatever is wrong becomes an ImageError with a reason from a closed list. Pillow's
global settings are left alone; its own guard, which refuses pictures above 178 megapixels, stays in force.

A picture comes out as people see it: turned as its EXIF says, transparency over white, first frame of an animation,
16-bit grey scaled to 8 bit, palette and CMYK converted. Colour profiles are ignored.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from vlm.config import ImageConfig
from vlm.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")

RESAMPLING = Image.Resampling.BICUBIC
"""Pillow's bicubic widens its filter when it shrinks a picture (antialias); torch's does not unless asked."""

FOREIGN = (
    (b"%PDF", "PDF"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML or SVG"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
)
"""First bytes of what people send as pictures and Pillow has no name for. ISO media is told by its brand instead."""

WIDE_GREY = ("I;16", "I;16L", "I;16B", "I;16N")


class ImageInfo(NamedTuple):
    """What was sent: format as Pillow names it, width and height in pixels of the picture as people see it."""

    format: str
    width: int
    height: int


def open_image(data: bytes, *, max_pixels: int, min_side: int) -> tuple[Image.Image, ImageInfo]:
    """Decode a picture wholly into RGB.

    Args:
        data: the bytes of a picture file.
        max_pixels: width times height at most.
        min_side: width and height at least, pixels.

    Raises:
        ImageError: reason too_large or too_small (by the header, nothing decoded), unsupported_format, not_an_image,
            or truncated_image (a known format that does not decode to the end).
    """
    image = _open_header(data)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width} x {height} pixels, at most {max_pixels} in all")
    if min(width, height) < min_side:
        raise ImageError("too_small", f"{width} x {height} pixels, at least {min_side} a side")
    format_ = str(image.format)
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        rgb = _to_rgb(image)
    except (ImageError, MemoryError):  # out of memory is this machine's trouble, not the picture's
        raise
    except Exception as error:  # a damaged file breaks decoders in every way there is
        raise ImageError("truncated_image", f"{format_}: {_sentence(error)}") from error
    return rgb, ImageInfo(format_, *rgb.size)


def to_pixels(image: Image.Image, config: ImageConfig) -> npt.NDArray[np.uint8]:
    """Pixels of an RGB picture at model resolution, HWC uint8, height = width = config.size.

    stretch: both sides to size. crop: the largest centred square, then to size. pad: the whole picture, centred on
    white.
    """
    size = (config.size, config.size)
    if config.resize == "crop":
        image = ImageOps.fit(image, size, method=RESAMPLING)
    elif config.resize == "pad":
        image = ImageOps.pad(image, size, method=RESAMPLING, color="white")
    else:
        image = image.resize(size, RESAMPLING)
    return np.array(image)


def _open_header(data: bytes) -> Image.Image:
    """The picture, recognised and not yet decoded."""
    try:
        return Image.open(io.BytesIO(data), formats=_decoders())
    except UnidentifiedImageError:
        claimed = _claimed_format(data)
        if claimed in _decoders():
            raise ImageError("truncated_image", f"starts like {claimed}, its header cannot be read") from None
        if claimed:
            raise ImageError("unsupported_format", f"{claimed}, not one of {', '.join(FORMATS)}") from None
        raise ImageError("not_an_image", f"{len(data)} bytes starting {data[:8]!r}") from None
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", _sentence(error)) from None
    except MemoryError:
        raise
    except Exception as error:  # a header parser that met what its author did not think of
        raise ImageError("truncated_image", f"header: {_sentence(error)}") from error


@lru_cache(maxsize=1)
def _decoders() -> tuple[str, ...]:
    """FORMATS that this Pillow was built with (AVIF came with 11.3)."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _claimed_format(data: bytes) -> str | None:
    """What the first bytes claim to be, by signatures alone: no parser outside FORMATS ever sees the data."""
    start = data[:16].ljust(16, b"\0")  # some of the tests below unpack without looking at the length
    if start[4:8] == b"ftyp":
        return {b"avif": "AVIF", b"avis": "AVIF"}.get(start[8:12], "HEIF")
    for signature, name in FOREIGN:
        if start.startswith(signature):
            return name
    for name, (_, accept) in Image.OPEN.items():
        if accept is not None and accept(start) is True:
            return name
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in WIDE_GREY:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError("unsupported_format", f"mode {image.mode}: 32 bits a sample have no agreed range")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
