"""A picture from bytes to pixels, one way for shards, training and captioning, so that a model always sees the same.

Bytes come from strangers: the header is judged (format, number of pixels, sides) before anything is decoded, only the
decoders of FORMATS ever run, and whatever is wrong becomes an ImageError with a reason from a closed list. Pillow's
global settings are left alone; its own guard, which refuses pictures above 178 megapixels, stays in force.

A picture comes out as people see it: turned as its EXIF says, transparency over white, first frame of an animation,
16-bit grey scaled to 8 bit, palette and CMYK converted. Colour profiles are ignored.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import sys
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from vlm.config import ImageConfig
from vlm.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Pillow's filters widen when they shrink a picture (antialias); torch's do not unless asked."""

MAX_ASPECT = 16
"""Above this, what a crop leaves away is never made: 4 x 16,000,000 pixels at 384 would first become 1.8 TB."""

FOREIGN = (
    (b"%PDF", "PDF"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML or SVG"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
)
"""First bytes of what people send as pictures and Pillow has no name for. ISO media is told by its brand instead."""

URL_SAFE = str.maketrans("-_", "+/")
DATA_URL = re.compile(r"data:[^,]{0,200};base64,")

WIDE_GREY = ("I;16", "I;16L", "I;16B", "I;16N")


def picture_bytes(image: bytes | str | None) -> bytes:
    """Return the bytes of a picture that is given as bytes or as base64 text.

    Raises:
        ImageError: reason missing_field (nothing is given), not_an_image (neither bytes nor text) or bad_base64.
    """
    if not image:
        raise ImageError("missing_field", "no picture")
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise ImageError("not_an_image", f"a {type(image).__name__}, expected bytes or base64 text")
    return decode_base64(image)


def decode_base64(text: str, max_bytes: int = sys.maxsize) -> bytes:
    """Decode base64, standard or URL-safe; white space, a data-URL prefix and missing padding are accepted.

    Raises:
        ImageError: reason bad_base64, or too_large for more than `max_bytes` (checked before decoding).
    """
    body = text.strip()
    prefix = DATA_URL.match(body)
    body = body[prefix.end() :] if prefix else body
    most = (max_bytes + 2) // 3 * 4
    if len(body) > most:
        body = "".join(body.split())
    if len(body) > most:
        raise ImageError("too_large", f"{len(body) * 3 // 4} bytes, at most {max_bytes}")
    try:
        try:
            data = _decode_strictly(body)
        except (binascii.Error, ValueError):  # rare: only then is the text scanned for white space and other letters
            data = _decode_strictly("".join(body.split()).translate(URL_SAFE))
    except (binascii.Error, ValueError) as error:
        raise ImageError("bad_base64", f"{len(body)} characters: {error}") from None
    if len(data) > max_bytes:
        raise ImageError("too_large", f"{len(data)} bytes, at most {max_bytes}")
    return data


def _decode_strictly(body: str) -> bytes:
    return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)


class ImageInfo(NamedTuple):
    """What was sent: format as Pillow names it, width and height in pixels of the picture as people see it."""

    format: str
    width: int
    height: int


def open_image(
    data: bytes, *, max_pixels: int, min_side: int, draft_side: int | None = None
) -> tuple[Image.Image, ImageInfo]:
    """Decode a picture wholly into RGB.

    Args:
        data: the bytes of a picture file.
        max_pixels: width times height at most.
        min_side: width and height at least, pixels.
        draft_side: let the JPEG decoder halve the picture up to three times while both sides keep at least this many
            pixels. This is much faster; the pixels after a resize are nearly the same. None: decode at full size.

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
        if draft_side is not None:
            image.draft(None, (draft_side, draft_side))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        rgb = _to_rgb(image)
    except (ImageError, MemoryError):  # out of memory is this machine's trouble, not the picture's
        raise
    except Exception as error:  # a damaged file breaks decoders in every way there is
        raise ImageError("truncated_image", f"{format_}: {_sentence(error)}") from error
    return rgb, ImageInfo(format_, *rgb.size)


class PixelStats(NamedTuple):
    """Mean and standard deviation of a picture's levels, 0 to 255."""

    brightness: float
    contrast: float


def pixel_stats(pixels: npt.NDArray[np.uint8]) -> PixelStats:
    """The light of a picture of any shape."""
    return PixelStats(float(pixels.mean()), float(pixels.std()))


class ResizeTransform(NamedTuple):
    """How a picture lies in the model's square: scaled as a whole, then cut from (left, top) on.

    Attributes:
        size: of the square, pixels a side.
        width: of the picture, pixels.
        height: of the picture, pixels.
        scaled_width: of the whole picture at model resolution, pixels.
        scaled_height: of the whole picture at model resolution, pixels.
        left: scaled pixels cut away on the left; negative where white is added.
        top: scaled pixels cut away above; negative where white is added.
    """

    size: int
    width: int
    height: int
    scaled_width: int
    scaled_height: int
    left: int
    top: int

    def to_source(self, x: float, y: float) -> tuple[float, float]:
        """The point of the picture that lies at (x, y) of the model's square, or its nearest point.

        Edges, not centres, of pixels are counted: 0 is the left or upper border of both.
        """
        x = (x + self.left) * self.width / self.scaled_width
        y = (y + self.top) * self.height / self.scaled_height
        return min(max(x, 0.0), float(self.width)), min(max(y, 0.0), float(self.height))


def compute_resize(width: int, height: int, config: ImageConfig) -> ResizeTransform:
    """Where a picture of that many pixels comes to lie. Sides round as transformers' and timm's own processors do."""
    size, short, long = config.size, min(width, height), max(width, height)
    if config.resize == "stretch":
        return ResizeTransform(size, width, height, size, size, 0, 0)
    covering, inside = (size, int(size * long / short)), (max(1, round(size * short / long)), size)
    scaled = covering if config.resize == "crop" else inside
    across, down = scaled if width <= height else scaled[::-1]
    left, top = (_margin(side - size, config) for side in (across, down))
    return ResizeTransform(size, width, height, across, down, left, top)


def _margin(spare: int, config: ImageConfig) -> int:
    return round(spare / 2) if config.crop_start == "even" else spare // 2


def to_pixels(image: Image.Image, config: ImageConfig) -> npt.NDArray[np.uint8]:
    """Pixels of an RGB picture at model resolution, HWC uint8, height = width = config.size."""
    size, resampling = (config.size, config.size), FILTERS[config.filter]
    placed = compute_resize(*image.size, config)
    if max(placed.scaled_width, placed.scaled_height) > MAX_ASPECT * config.size:
        box = (*placed.to_source(0, 0), *placed.to_source(*size))
        return np.array(image.resize(size, resampling, box))
    canvas = Image.new("RGB", size, "white")
    canvas.paste(image.resize((placed.scaled_width, placed.scaled_height), resampling), (-placed.left, -placed.top))
    return np.array(canvas)


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
    if image.mode == "La":  # grey times alpha, of TIFF: Pillow turns it into LA and into nothing else
        image = image.convert("LA")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
