"""Tests of resizing to the model's square input, of colour modes and of EXIF orientations."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import encoded, picture
from PIL import Image, PngImagePlugin, TiffImagePlugin

from vlm.config import ImageConfig
from vlm.image import compute_resize, open_image, to_pixels

RED, GREEN, GREY, WHITE = (255, 0, 0), (0, 255, 0), (128, 128, 128), (255, 255, 255)
LIGHT = (191, 191, 191)
"""Visible colour of premultiplied grey 64 with half coverage over white.

A decoder that ignores the premultiplication would show the grey level 159."""
RESIZE_MODES = [{"resize": "stretch"}, {"resize": "crop"}, {"resize": "crop", "crop_start": "even"}, {"resize": "pad"}]


def config(size: int, mode: dict[str, str]) -> ImageConfig:
    return ImageConfig.model_validate({"size": size, **mode})


# ------------------------------------------------------------------------------------------------ resize

sides = st.integers(1, 3000)


@given(sides, sides, st.integers(8, 900), st.sampled_from(RESIZE_MODES))
def test_every_point_of_the_model_input_maps_to_a_point_of_the_picture(
    width: int, height: int, size: int, mode: dict[str, str]
) -> None:
    resize = compute_resize(width, height, config(size, mode))
    assert resize.scaled_width > 0
    assert resize.scaled_height > 0
    for x, y in [(0, 0), (size, size), (size / 3, size)]:
        at_x, at_y = resize.to_source(x, y)
        assert 0 <= at_x <= width
        assert 0 <= at_y <= height
    middle_x, middle_y = resize.to_source(size / 2, size / 2)
    assert abs(middle_x - width / 2) <= width / resize.scaled_width
    assert abs(middle_y - height / 2) <= height / resize.scaled_height


@given(sides, sides, st.integers(8, 900))
def test_resize_mode_crop_fills_the_square_with_the_picture_and_mode_pad_keeps_the_whole_picture(
    width: int, height: int, size: int
) -> None:
    crop, pad = (compute_resize(width, height, config(size, {"resize": mode})) for mode in ("crop", "pad"))
    assert min(crop.scaled_width, crop.scaled_height) == size
    assert min(crop.left, crop.top) >= 0
    assert max(pad.scaled_width, pad.scaled_height) == size
    assert max(pad.left, pad.top) <= 0
    corners = {pad.to_source(0, 0), pad.to_source(size, size)}
    assert corners == {(0, 0), (width, height)}


@pytest.mark.parametrize("mode", RESIZE_MODES, ids=lambda mode: "-".join(mode.values()))
@pytest.mark.parametrize("size", [(200, 90), (90, 201), (40, 33)])
def test_a_spot_in_the_model_input_maps_back_to_its_place_in_the_picture(
    size: tuple[int, int], mode: dict[str, str]
) -> None:
    """Paint a spot, find the spot in the model's pixels, and map the spot back to the picture."""
    spot = (round(0.45 * size[0]), round(0.4 * size[1]), round(0.6 * size[0]), round(0.7 * size[1]))
    painted = Image.new("RGB", size, RED)
    painted.paste(GREEN, spot)
    settings = config(64, mode)
    pixels = to_pixels(painted, settings)
    rows, columns = np.nonzero((pixels[:, :, 1] > 128) & (pixels[:, :, 0] < 128))
    resize = compute_resize(*size, settings)
    found = [*resize.to_source(columns.min(), rows.min()), *resize.to_source(columns.max() + 1, rows.max() + 1)]
    model_pixel = max(size[0] / resize.scaled_width, size[1] / resize.scaled_height)
    assert np.abs(np.subtract(found, spot)).max() <= model_pixel


@pytest.mark.parametrize("resize", ["crop", "pad"])
def test_an_extremely_thin_picture_needs_little_memory(resize: str) -> None:
    line = Image.new("RGB", (200_000, 1), RED)
    pixels = to_pixels(line, ImageConfig.model_validate({"size": 224, "resize": resize}))
    assert tuple(pixels[112, 112]) == RED


@pytest.mark.parametrize("name", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("size", [(700, 40), (40, 700), (4, 80), (80, 4), (4, 4000), (5, 900), (600, 20), (20, 600)])
def test_a_crop_of_a_thin_picture_equals_a_crop_of_the_whole_resized_picture(size: tuple[int, int], name: str) -> None:
    """Compare `to_pixels`, which resizes only the middle of a thin picture, with a crop of the resized whole
    picture."""
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    thin, settings = Image.fromarray(noise), ImageConfig.model_validate({"size": 16, "resize": "crop", "filter": name})
    resize = compute_resize(*size, settings)
    whole = thin.resize((resize.scaled_width, resize.scaled_height), Image.Resampling[name.upper()])
    expected = np.array(whole.crop((resize.left, resize.top, resize.left + 16, resize.top + 16)))
    assert np.abs(to_pixels(thin, settings).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", ["bicubic", "bilinear", "lanczos"])
def test_a_picture_is_resized_with_the_configured_filter(name: str) -> None:
    image = picture(4, (50, 30))
    expected = np.array(image.resize((16, 16), Image.Resampling[name.upper()]))
    assert (to_pixels(image, ImageConfig.model_validate({"size": 16, "filter": name})) == expected).all()


# ------------------------------------------------------------------------------------------------ modes


def premultiplied(mode: str, colour: tuple[int, ...]) -> bytes:
    """Encode a picture as a TIFF file with premultiplied alpha."""
    data = encoded(Image.new(mode, (8, 8), colour), "TIFF")
    extra_samples = struct.pack("<HHLHH", 338, 3, 1, 2, 0)
    assert data.count(extra_samples) == 1
    return data.replace(extra_samples, struct.pack("<HHLHH", 338, 3, 1, 1, 0))


def grey_16_bit(kind: str, mode: str) -> bytes:
    sample = {"I;16": b"\x40\x80", "I;16B": b"\x80\x40"}[mode]
    return encoded(Image.frombytes(mode, (8, 8), 64 * sample), kind)


def clear_palette(kind: str) -> bytes:
    """Encode a red palette picture whose right half is transparent."""
    image = Image.new("P", (8, 8), 0)
    image.putpalette([*RED, *RED])
    image.paste(1, (4, 0, 8, 8))
    return encoded(image, kind, transparency=1)


FILES = {
    "TIFF 1": (encoded(Image.new("1", (8, 8), 1), "TIFF"), WHITE),
    "TIFF L": (encoded(Image.new("L", (8, 8), 128), "TIFF"), GREY),
    "TIFF LA": (encoded(Image.new("LA", (8, 8), (0, 0)), "TIFF"), WHITE),
    "TIFF La": (premultiplied("LA", (64, 128)), LIGHT),
    "TIFF P": (encoded(Image.new("RGB", (8, 8), RED).convert("P"), "TIFF"), RED),
    "TIFF PA": (encoded(Image.new("PA", (8, 8), (0, 0)), "TIFF"), WHITE),
    "TIFF RGB": (encoded(Image.new("RGB", (8, 8), RED), "TIFF"), RED),
    "TIFF RGBA": (encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 127)), "TIFF"), GREY),
    "TIFF RGBa": (premultiplied("RGBA", (64, 64, 64, 128)), LIGHT),
    "TIFF RGBX": (encoded(Image.new("RGBX", (8, 8), RED), "TIFF"), RED),
    "TIFF CMYK": (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), RED),
    "TIFF YCbCr": (encoded(Image.new("RGB", (8, 8), RED).convert("YCbCr"), "TIFF"), RED),
    "TIFF LAB": (encoded(Image.new("LAB", (8, 8), (255, 128, 128)), "TIFF"), WHITE),
    "TIFF I;16": (grey_16_bit("TIFF", "I;16"), GREY),
    "TIFF I;16B": (grey_16_bit("TIFF", "I;16B"), GREY),
    "PNG 1": (encoded(Image.new("1", (8, 8), 1)), WHITE),
    "PNG L": (encoded(Image.new("L", (8, 8), 128)), GREY),
    "PNG LA": (encoded(Image.new("LA", (8, 8), (0, 127))), GREY),
    "PNG P": (clear_palette("PNG"), RED),
    "PNG I;16": (grey_16_bit("PNG", "I;16"), GREY),
    "PNG RGB": (encoded(Image.new("RGB", (8, 8), RED)), RED),
    "PNG RGBA": (encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 127))), GREY),
    "GIF P": (clear_palette("GIF"), RED),
    "JPEG L": (encoded(Image.new("L", (8, 8), 128), "JPEG"), GREY),
    "JPEG YCbCr": (encoded(Image.new("YCbCr", (8, 8), (128, 128, 128)), "JPEG"), GREY),
    "JPEG CMYK": (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), RED),
}


@pytest.mark.parametrize("name", FILES)
def test_a_picture_of_every_mode_decodes_to_the_visible_colour(name: str) -> None:
    data, colour = FILES[name]
    image, _ = open_image(data, max_pixels=64, min_side=8)
    assert image.mode == "RGB"
    assert np.abs(np.array(image)[4, 2].astype(int) - colour).max() <= 2
    if name in ("PNG P", "GIF P"):
        assert image.getpixel((6, 4)) == WHITE


def test_the_tests_cover_every_colour_mode_that_pillow_reads_from_tiff_and_png_files() -> None:
    rejected = {"I", "F"}  # test_image.py tests the rejection of float pictures
    of_tiff = {mode for mode, _ in TiffImagePlugin.OPEN_INFO.values()}
    of_png = {mode for mode, _ in PngImagePlugin._MODES.values()}
    assert {f"TIFF {mode}" for mode in of_tiff - rejected} <= set(FILES)
    assert {f"PNG {mode}" for mode in of_png - rejected} <= set(FILES)


# ------------------------------------------------------------------------------------------------ orientation

UPRIGHT: dict[int, Callable[[Any], Any]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}
"""Dict from EXIF orientation (Exif 2.3, tag 0x0112) to the function that turns a stored array upright."""


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_picture_with_any_exif_orientation_decodes_upright(orientation: int) -> None:
    stored = picture(1, (24, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, info = open_image(encoded(stored, exif=exif), max_pixels=10**6, min_side=1)
    upright = UPRIGHT[orientation](np.array(stored))
    assert (info.height, info.width) == upright.shape[:2]
    assert (np.array(image) == upright).all()


def test_an_invalid_exif_orientation_leaves_the_picture_unchanged() -> None:
    stored = picture(1, (24, 16))
    exif = Image.Exif()
    exif[0x0112] = 77
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image, _ = open_image(encoded(stored, exif=exif), max_pixels=10**6, min_side=1)
    assert (np.array(image) == np.array(stored)).all()
