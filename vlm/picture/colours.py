"""Convert decoded pictures of all modes to RGB with 8 bits per sample.

Samples of 16 bits are scaled to 8 bits. Cameras, microscopes and X-ray detectors store values of 8, 10 or 12 bits in
samples of 16 bits without scaling the values, so that the pictures are almost black. The samples of a picture therefore
count as values of 8, 10, 12 or 16 bits: the smallest of these sizes that can hold the largest sample of the picture.
TIFF palettes have values of 16 bits. Some old programs wrote values of 8 bits into these palettes, and these values are
scaled too.

Pictures are converted in bands of rows, because the conversion of a band needs several times the memory of the band.
Decoding a picture of 64 megapixels needs 0.6 GB.
"""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin, TiffImagePlugin

from vlm.errors import ImageError

GREY_16_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
TIFF_PALETTE = 320
BAND_PIXELS = 2**22
"""Largest number of pixels that are converted at once, unless a single row has more pixels."""
Box = tuple[int, int, int, int]


def row_bands(size: tuple[int, int]) -> list[Box]:
    """Divide a picture of the given width and height into bands of rows, and return the box of each band."""
    width, height = size
    rows = max(1, BAND_PIXELS // width)
    return [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]


def to_rgb(image: Image.Image, data: bytes) -> Image.Image:
    """Convert a decoded picture to RGB, with transparent pixels over white.

    Args:
        image: decoded picture.
        data: bytes of the picture's file, or empty if the file is not known. Only the file still contains the lower 8
            bits of 16-bit colours.

    Raises:
        ImageError: the reason is unsupported_format if the samples have 32 bits.
    """
    if image.mode in ("I", "F"):
        raise ImageError("unsupported_format", f"mode {image.mode}: samples of 32 bits have no agreed range")
    if image.format == "PNG" and data[24:26] in {b"\x10\x02", b"\x10\x06"}:
        image = _scale_colours(image, data)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.mode in ("P", "PA"):
        _widen_palette(image)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    bands = row_bands(image.size)
    convert = _to_rgb
    if image.mode in GREY_16_BIT_MODES:
        largest = max(int(np.asarray(image.crop(band)).max()) for band in bands)
        convert = partial(_grey_to_rgb, shift=_used_bits(largest) - 8)
    rgb = Image.new("RGB", image.size)
    for band in bands:
        rgb.paste(convert(image.crop(band)), band)
    return rgb


def _widen_palette(image: TiffImagePlugin.TiffImageFile) -> None:
    """Correct the palette of a TIFF picture whose colours have values from 0 to 255 instead of 0 to 65535.

    Old programs wrote palettes with values of 8 bits. Pillow keeps only the upper 8 of 16 bits, so every colour becomes
    black.
    """
    colours = image.tag_v2.get(TIFF_PALETTE, ())
    if colours and max(colours) < 2**8:
        image.putpalette(bytes(colours), "RGB;L")


def _used_bits(largest: int) -> int:
    """Given the largest sample of a picture, return how many bits the samples use: 8, 10, 12 or 16."""
    return next((bits for bits in (8, 10, 12) if largest < 2**bits), 16)


def _grey_to_rgb(image: Image.Image, shift: int) -> Image.Image:
    return Image.fromarray((np.asarray(image) >> shift).astype(np.uint8)).convert("RGB")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # Pillow cannot convert La (premultiplied grey in TIFF files) to RGBA
        image = image.convert("LA")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image.convert("RGB")


def _scale_colours(image: Image.Image, data: bytes) -> Image.Image:
    """Scale the colours of a PNG with 16 bits per sample. Pillow has kept only the upper 8 bits of each sample.

    A picture with colours of more than 12 bits, or with a transparent colour, is returned unchanged.

    This function decodes the file a second time and swaps the two bytes of each sample, so that Pillow keeps the lower
    8 bits.
    """
    colours = np.array(image.getextrema())[:3]
    if colours.max() >= 2**4 or "transparency" in image.info:
        return image
    low = Image.open(io.BytesIO(data), formats=["PNG"])
    assert isinstance(low, PngImagePlugin.PngImageFile)
    low.tile = [tile._replace(args=f"{image.mode};16L") for tile in low.tile]
    bands = row_bands(image.size)
    largest = np.max([_join_bytes(image, low, band).max(axis=(0, 1)) for band in bands], axis=0)
    colour_shift, alpha_shift = _used_bits(int(largest[:3].max())) - 8, _used_bits(int(largest[-1])) - 8
    scaled = Image.new(image.mode, image.size)
    for band in bands:
        samples = _join_bytes(image, low, band)
        samples[..., :3] >>= colour_shift
        samples[..., 3:] >>= alpha_shift
        scaled.paste(Image.fromarray(samples.astype(np.uint8)), band)
    return scaled


def _join_bytes(high: Image.Image, low: Image.Image, band: Box) -> npt.NDArray[np.uint16]:
    """Return the 16-bit samples of a band, given a picture of the upper 8 bits and a picture of the lower 8 bits."""
    return (np.asarray(high.crop(band)).astype(np.uint16) << 8) | np.asarray(low.crop(band))
