"""Decoding and resizing of pictures. Ingest, shard writing and captioning all use this module.

The bytes of a picture are untrusted. The header (format, number of pixels, sides) is checked before any pixel is
decoded, and only the decoders of FORMATS run. Every defect becomes an ImageError whose reason is one of IMAGE_REASONS.
This module changes no global setting of Pillow. Pillow therefore still rejects pictures of more than 178 megapixels.

Decoders get the file without its metadata (`vlm.picture.metadata`), so a text, colour profile or EXIF entry that is
damaged or huge cannot make a picture unusable. A file without an end marker is accepted if the file contains all
pixels.

A decoded picture is rotated according to its EXIF orientation, transparent pixels are composed over white, and an
animation is represented by its first frame. Samples of 16 bits are scaled to 8 bits, and palette and CMYK colours are
converted to RGB (`vlm.picture.colours`). Colour profiles are ignored.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
import sys
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from vlm.config import ImageConfig
from vlm.errors import ImageError
from vlm.picture.colours import to_rgb
from vlm.picture.jpeg_end import decode_without_end
from vlm.picture.metadata import split_metadata
from vlm.picture.orientation import ORIENTATION_TAG, turn_upright
from vlm.picture.undecodable import describe_undecodable

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Pillow's resize filter for each value of the config field `filter`. The filters always antialias a shrinking
picture."""

FILTER_RADIUS = 3
"""Radius, in pixels of the picture, of the widest resize filter (lanczos) when it enlarges a picture."""

MAX_ASPECT = 16
"""If the longer side of a scaled picture is at most this multiple of the side of the model's input, the whole picture
is resized. If the longer side exceeds this limit, only the part of the picture inside the crop is resized. For a crop
of side 384, resizing a whole picture of 4 x 16,000,000 pixels would need 1.8 TB of memory.
"""

UNSUPPORTED_SIGNATURES = (
    (b"%PDF", "PDF"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML or SVG"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
)
"""First bytes and names of common formats that Pillow does not identify.

The formats HEIF and AVIF are not in this list, because `_claimed_format` recognises them by their ISO media brand."""
MEDIA_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIF"),
}
"""Dict from the brand of an ISO media file to the name of its picture format."""

MAX_PATH = 4096
"""Length of the longest text that can be a path or a URL."""
URL_SAFE = str.maketrans("-_", "+/")
DATA_URL = re.compile(r"data:[^,]{0,1000};\s*base64\s*,", re.IGNORECASE)


def picture_bytes(image: bytes | str | None, max_bytes: int = sys.maxsize) -> bytes:
    """Return the content of a picture file that is given as bytes or as base64 text.

    Raises:
        ImageError: the reason is missing_field (None, empty or white space), not_an_image (neither bytes nor text),
            bad_base64, or too_large if the file has more than `max_bytes` bytes.
    """
    if image is None or (isinstance(image, str | bytes) and not image.strip()):
        raise ImageError("missing_field", "no picture")
    if isinstance(image, bytes):
        if len(image) > max_bytes:
            raise ImageError("too_large", f"{len(image)} bytes; at most {max_bytes} are allowed")
        return image
    if not isinstance(image, str):
        raise ImageError("not_an_image", f"a {type(image).__name__}, expected bytes or base64 text")
    return decode_base64(image, max_bytes)


def decode_base64(text: str, max_bytes: int = sys.maxsize) -> bytes:
    """Decode standard or URL-safe base64.

    White space, a data-URL prefix, percent-encoding, a byte-order mark, and missing or excess padding are accepted.

    Raises:
        ImageError: the reason is bad_base64, or too_large if the data has more than `max_bytes` bytes. A text with too
            many characters is not decoded.
    """
    body = text.strip().removeprefix("\ufeff")
    prefix = DATA_URL.match(body)
    body = body[prefix.end() :] if prefix else body
    max_characters = (max_bytes + 2) // 3 * 4
    if len(body) > max_characters:
        body = "".join(body.split())
    if len(body) > max_characters:
        raise ImageError("too_large", f"{len(body) * 3 // 4} bytes; at most {max_bytes} are allowed")
    try:
        try:
            data = _decode_strictly(body)
        except (binascii.Error, ValueError):  # the tolerant decoding is slower, so try the strict decoding first
            data = _decode_strictly("".join(unquote(body).split()).rstrip("=").translate(URL_SAFE))
    except (binascii.Error, ValueError) as error:
        raise ImageError("bad_base64", f"{len(body)} characters: {error}") from None
    if len(data) > max_bytes:
        raise ImageError("too_large", f"{len(data)} bytes; at most {max_bytes} are allowed")
    return data


def _decode_strictly(body: str) -> bytes:
    return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)


class ImageInfo(NamedTuple):
    """Format of a decoded picture (Pillow's name), and the width and height in pixels after EXIF rotation."""

    format: str
    width: int
    height: int


def open_image(
    data: bytes, *, max_pixels: int, min_side: int, draft_side: int | None = None
) -> tuple[Image.Image, ImageInfo]:
    """Decode a picture file to RGB, and return the picture with its format and size.

    Args:
        data: bytes of a picture file.
        max_pixels: largest allowed number of pixels (width times height).
        min_side: smallest allowed width and height, in pixels.
        draft_side: smallest side, in pixels, to which the JPEG decoder may shrink the picture, or None for the full
            size. The decoder halves both sides up to three times, which is much faster and hardly changes the pixels
            after a resize.

    Raises:
        ImageError: the reason is too_large or too_small (both known from the header, before decoding),
            unsupported_format, not_an_image, or truncated_image (a supported format that does not decode completely).
    """
    file = split_metadata(data)
    image = _open_header(file.data)
    check_size(image, max_pixels=max_pixels, min_side=min_side)
    format_ = str(image.format)
    try:
        image = _load(image, file.data, draft_side)
        orientation = file.orientation or image.getexif().get(ORIENTATION_TAG, 1)
        image = to_rgb(image, file.data)  # the decoded picture is freed before the next copy is made
        image = turn_upright(image, orientation)
    except (ImageError, MemoryError):  # a lack of memory is not a defect of the picture
        raise
    except Exception as error:  # decoders raise many types of errors for damaged files
        if format_ == "JPEG" and (found := describe_undecodable(format_, file.data)):
            raise ImageError("unsupported_format", found) from error
        raise ImageError("truncated_image", f"{format_}: {_sentence(error)}") from error
    return image, ImageInfo(format_, *image.size)


def check_size(image: Image.Image, *, max_pixels: int, min_side: int) -> None:
    """Check the size of a picture, which need not be decoded yet. `open_image` describes the arguments.

    Raises:
        ImageError: the reason is too_large or too_small.
    """
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width} x {height} pixels; at most {max_pixels} are allowed in all")
    if min(width, height) < min_side:
        raise ImageError("too_small", f"{width} x {height} pixels; each side needs at least {min_side}")


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of Pillow to RGB and rotate it according to its EXIF orientation, as `open_image` does.

    Raises:
        ImageError: the reason is truncated_image if the pixels cannot be read, missing_field if the picture is closed,
            or unsupported_format if the samples have 32 bits.
    """
    try:
        image.load()
        return turn_upright(to_rgb(image, b""), image.getexif().get(ORIENTATION_TAG, 1))
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise many types of errors for damaged files
        if "closed" in str(error):
            raise ImageError("missing_field", "the Pillow image is closed; open the picture again") from error
        raise ImageError("truncated_image", f"{image.format}: {_sentence(error)}") from error


def _load(image: Image.Image, data: bytes, draft_side: int | None) -> Image.Image:
    """Decode the pixels of an opened picture file."""
    try:
        return _load_draft(image, draft_side)
    except OSError:
        if image.format != "JPEG":
            raise
        whole = decode_without_end(data, lambda file: _load_draft(_open_header(file), draft_side))
        if whole is None:
            raise
        return whole


def _load_draft(image: Image.Image, draft_side: int | None) -> Image.Image:
    if draft_side is not None:
        image.draft(None, (draft_side, draft_side))
    if image.format == "WEBP":
        _free_webp_decoder(image)
    image.load()
    return image


def _free_webp_decoder(image: Any) -> None:
    """Change a WebP picture so that its decoder is freed after the first frame is decoded.

    For a picture of 64 megapixels, the decoder needs half a gigabyte of memory. Pillow would free this memory only
    together with the picture.
    """
    get_next = image._get_next

    def get_next_and_free() -> Any:
        frame = get_next()
        image._decoder = None
        return frame

    image._get_next = get_next_and_free


class PixelStats(NamedTuple):
    """Brightness (mean) and contrast (standard deviation) of a picture's pixel values, which range from 0 to 255."""

    brightness: float
    contrast: float


def pixel_stats(pixels: npt.NDArray[np.uint8]) -> PixelStats:
    """Compute the brightness and the contrast of a picture from its pixel values."""
    return PixelStats(float(pixels.mean()), float(pixels.std()))


class ResizeTransform(NamedTuple):
    """Transform from a picture to the model's square input: the picture is scaled and then cropped or padded.

    Attributes:
        size: side of the square, in pixels.
        width: width of the picture, in pixels.
        height: height of the picture, in pixels.
        scaled_width: width of the whole picture after scaling, in pixels.
        scaled_height: height of the whole picture after scaling, in pixels.
        left: number of scaled pixels cropped on the left; negative if white padding is added.
        top: number of scaled pixels cropped at the top; negative if white padding is added.
    """

    size: int
    width: int
    height: int
    scaled_width: int
    scaled_height: int
    left: int
    top: int

    def to_source(self, x: float, y: float) -> tuple[float, float]:
        """Map a point of the model's input to the picture. A point in the padding maps to the nearest border.

        A coordinate is the distance from the left or upper border in pixels, so the centre of the first pixel has the
        coordinate 0.5.
        """
        x = (x + self.left) * self.width / self.scaled_width
        y = (y + self.top) * self.height / self.scaled_height
        return min(max(x, 0.0), float(self.width)), min(max(y, 0.0), float(self.height))


def compute_resize(width: int, height: int, config: ImageConfig) -> ResizeTransform:
    """Compute the transform that resizes a picture of the given width and height, in pixels.

    The scaled sides are rounded in the same way as in the image processors of transformers and timm.
    """
    size, short, long = config.size, min(width, height), max(width, height)
    if config.resize == "stretch":
        return ResizeTransform(size, width, height, size, size, 0, 0)
    cover, contain = (size, int(size * long / short)), (max(1, round(size * short / long)), size)
    scaled = cover if config.resize == "crop" else contain
    scaled_width, scaled_height = scaled if width <= height else scaled[::-1]
    left, top = (_margin(side - size, config) for side in (scaled_width, scaled_height))
    return ResizeTransform(size, width, height, scaled_width, scaled_height, left, top)


def _margin(excess: int, config: ImageConfig) -> int:
    return round(excess / 2) if config.crop_start == "even" else excess // 2


def to_pixels(image: Image.Image, config: ImageConfig) -> npt.NDArray[np.uint8]:
    """Resize an RGB picture to the model's input, an array of uint8 pixels (config.size, config.size, 3)."""
    size, resampling = (config.size, config.size), FILTERS[config.filter]
    resize = compute_resize(*image.size, config)
    if max(resize.scaled_width, resize.scaled_height) > MAX_ASPECT * config.size:
        return np.array(_resize_part(image, resize, resampling))
    canvas = Image.new("RGB", size, "white")
    canvas.paste(image.resize((resize.scaled_width, resize.scaled_height), resampling), (-resize.left, -resize.top))
    return np.array(canvas)


def _resize_part(image: Image.Image, resize: ResizeTransform, resampling: Image.Resampling) -> Image.Image:
    """Resize only the part of a long picture that is inside the crop. The result is the same as if the whole picture
    were resized and then cropped.

    Pillow resizes in a horizontal and a vertical pass, rounds the pixels between the two passes, and chooses the order
    of the passes by the sizes. When Pillow enlarges a whole picture, it begins with the horizontal pass. For a part of
    a tall picture, Pillow would begin with the vertical pass, so this function makes both passes itself.
    """
    size = (resize.size, resize.size)
    left, upper, right, lower = (*resize.to_source(0, 0), *resize.to_source(*size))
    if resize.scaled_height < resize.height:
        return image.resize(size, resampling, (left, upper, right, lower))
    margin = math.ceil(FILTER_RADIUS * max(1.0, resize.height / resize.scaled_height))
    first, last = max(0, math.floor(upper) - margin), min(resize.height, math.ceil(lower) + margin)
    rows = image.crop((0, first, resize.width, last))
    rows = rows.resize((resize.size, last - first), resampling, (left, 0, right, last - first))
    return rows.resize(size, resampling, (0, upper - first, resize.size, lower - first))


def _open_header(data: bytes) -> Image.Image:
    """Identify the format of a picture and read its header, without decoding the pixels."""
    try:
        return Image.open(io.BytesIO(data), formats=load_decoders())
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", _sentence(error)) from None
    except MemoryError:
        raise
    except Exception as error:  # header parsers raise many types of errors for damaged files
        raise _header_error(data, error) from error


def _header_error(data: bytes, error: Exception) -> ImageError:
    """Return the error for a file whose header Pillow cannot read."""
    claimed = _claimed_format(data)
    if claimed in load_decoders():
        if found := describe_undecodable(claimed, data):
            return ImageError("unsupported_format", found)
        cause = "its header cannot be read" if isinstance(error, UnidentifiedImageError) else _sentence(error)
        return ImageError("truncated_image", f"starts like {claimed}, {cause}")
    if claimed:
        return ImageError("unsupported_format", f"{claimed}, not one of {', '.join(FORMATS)}")
    return ImageError("not_an_image", f"{len(data)} bytes starting {data[:8]!r}")


@lru_cache(maxsize=1)
def load_decoders() -> tuple[str, ...]:
    """Load Pillow's decoders, and return the formats of FORMATS that Pillow can decode (AVIF only since Pillow 11.3).

    Loading the decoders takes a quarter of a second. A process that forks children to decode pictures therefore calls
    this function first, so that the children need not load the decoders again.
    """
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _claimed_format(data: bytes) -> str | None:
    """Return the name of the format whose signature matches the first bytes, or None if no signature matches."""
    start = data[:16].ljust(16, b"\0")  # Pillow's signature tests need 16 bytes
    if start[4:8] == b"ftyp":
        return MEDIA_BRANDS.get(start[8:12], "an ISO media file, such as MP4")
    for signature, name in UNSUPPORTED_SIGNATURES:
        if start.startswith(signature):
            return name
    for name, (_, accept) in Image.OPEN.items():
        if accept is not None and accept(start) is True:
            # Pillow does not know the header of TGA, and identifies a TGA file as a CUR file with 0 cursors.
            return "TGA" if name == "CUR" and start[4:6] == b"\0\0" else name
    return None


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def looks_like_path(value: str) -> bool:
    """Return whether a text is probably the path or URL of a picture, and not base64."""
    path = r"\w+://.+|.+\.(avif|bmp|gif|jpe?g|png|tiff?|webp)"
    return len(value) <= MAX_PATH and re.fullmatch(path, value.strip(), re.IGNORECASE | re.DOTALL) is not None
