"""Tests of decoding untrusted pictures: accepted formats, resulting pixels, and reasons of rejection."""

from __future__ import annotations

import base64
import io
import re
import struct
import zlib
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import as_base64, encoded, picture, png
from PIL import Image, TiffImagePlugin

from vlm.config import ImageConfig
from vlm.errors import IMAGE_REASONS, ImageError
from vlm.image import FORMATS, ImageInfo, decode_base64, open_image, picture_bytes, to_pixels

RED, WHITE = (255, 0, 0), (255, 255, 255)


def opened(data: bytes) -> tuple[Image.Image, ImageInfo]:
    return open_image(data, max_pixels=1_000_000, min_side=4)


def rejection(data: bytes, **limits: int) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(data, **({"max_pixels": 1_000_000, "min_side": 4} | limits))
    return caught.value.reason


@pytest.mark.parametrize("kind", FORMATS)
def test_every_supported_format_decodes_to_an_rgb_picture(kind: str) -> None:
    image, info = opened(encoded(Image.new("RGB", (20, 10), RED), kind))
    assert info == ImageInfo(kind, 20, 10)
    assert image.mode == "RGB"
    assert np.abs(np.array(image).astype(int) - RED).max() <= 3


@pytest.mark.parametrize("kind", ["PPM", "ICO", "JPEG2000", "PCX", "EPS", "PDF"])
def test_a_format_that_only_pillow_supports_is_rejected_as_unsupported(kind: str) -> None:
    data = encoded(Image.new("RGB", (20, 10), RED), kind)
    assert rejection(data) == "unsupported_format"


@pytest.mark.parametrize("data", [b"\0\0\0\x18ftypheic" + b"\0" * 20, b"<svg xmlns='x'/>", b"\xff\x0a" + b"\0" * 20])
def test_a_known_format_that_pillow_cannot_identify_is_rejected_as_unsupported(data: bytes) -> None:
    assert rejection(data) == "unsupported_format"


@pytest.mark.parametrize("data", [b"", b"x", b"a sentence and no picture"])
def test_bytes_in_no_known_picture_format_are_rejected_with_the_reason_not_an_image(data: bytes) -> None:
    assert rejection(data) == "not_an_image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.03, 0.5, 0.9])
def test_a_picture_file_that_was_cut_at_any_byte_is_rejected_as_truncated(kind: str, share: float) -> None:
    data = encoded(picture(1, (64, 64)), kind)
    assert rejection(data[: max(12, int(len(data) * share))]) == "truncated_image"


def png_header(width: int, height: int) -> bytes:
    """Build a PNG file whose header states a width and a height, but without pixel data."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 10) + b"IDAT"


@pytest.mark.parametrize("side", [1001, 12_000, 30_000])
def test_a_picture_with_too_many_pixels_is_rejected_from_its_header_before_decoding(side: int) -> None:
    assert rejection(png_header(side, side)) == "too_large"
    assert Image.MAX_IMAGE_PIXELS == 89_478_485, "Pillow's own pixel limit must not change"


def test_a_picture_exactly_at_the_pixel_limits_is_accepted() -> None:
    data = png(1, (10, 8))
    assert open_image(data, max_pixels=80, min_side=8)[1] == ImageInfo("PNG", 10, 8)
    assert rejection(data, max_pixels=79) == "too_large"
    assert rejection(data, min_side=9) == "too_small"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_rotated_by_its_exif_orientation(kind: str) -> None:
    sideways = Image.new("RGB", (40, 20), "white")
    sideways.paste(RED, (0, 0, 40, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation 6: the upper edge of the stored picture is shown on the right
    image, info = opened(encoded(sideways, kind, exif=exif))
    assert (info.width, info.height) == image.size == (20, 40)
    right, left = np.array(image)[20, 17], np.array(image)[20, 2]
    assert right[1] < 60
    assert left[1] > 200


def clear_palette() -> bytes:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([*RED, 0, 0, 255])
    return encoded(image, "GIF", transparency=0)


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0))), WHITE),
        (encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128))), (127, 127, 127)),
        (encoded(Image.new("LA", (8, 8), (0, 0))), WHITE),
        (encoded(Image.new("RGB", (8, 8), RED), transparency=RED), WHITE),
        (clear_palette(), WHITE),
        (encoded(Image.new("RGB", (8, 8), RED).convert("P")), RED),
        (encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"), WHITE),
        (encoded(Image.new("1", (8, 8), 1)), WHITE),
        (encoded(Image.fromarray(np.full((8, 8), 0x8040, np.uint16))), (128, 128, 128)),
    ],
    ids=["clear", "half-clear", "clear-grey", "colour-key", "clear-gif", "palette", "cmyk", "bits", "16-bit"],
)
def test_a_picture_of_any_mode_or_transparency_decodes_to_the_visible_colour(
    data: bytes, colour: tuple[int, int, int]
) -> None:
    image, _ = opened(data)
    assert np.abs(np.array(image).astype(int) - colour).max() <= 1


def test_a_picture_with_float_pixels_is_rejected_as_an_unsupported_format() -> None:
    assert rejection(encoded(Image.new("F", (8, 8), 0.5), "TIFF")) == "unsupported_format"


def float_tiff() -> bytes:
    """Return a TIFF of three floating-point samples per pixel, which Pillow cannot read."""
    pixels = np.full((8, 8, 3), 0.5, np.float32).tobytes()
    entries = {256: (3, 1, 8), 257: (3, 1, 8), 258: (3, 1, 32), 259: (3, 1, 1), 262: (3, 1, 2), 277: (3, 1, 3)}
    entries |= {278: (3, 1, 8), 279: (4, 1, len(pixels)), 339: (3, 1, 3)}
    start = 8 + 2 + 12 * (len(entries) + 1) + 4
    entries[273] = (4, 1, start)
    listed = b"".join(struct.pack("<HHII", tag, *entries[tag]) for tag in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + listed + bytes(4) + pixels


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (float_tiff(), "TIFF with 3 samples per pixel (floating-point, 32 bits each), compression 1 (raw)"),
        (re.sub(rb"(?s)(\xff\xc0..)\x08", b"\\1\x0c", encoded(picture(1), "JPEG")), "JPEG with 12 bits per sample"),
        (
            encoded(picture(1), "JPEG").replace(b"\xff\xc0", b"\xff\xc3", 1),
            "JPEG with a lossless or hierarchical frame",
        ),
        (b"\0\0\2\0" + bytes(8) + b"\x08\0\x08\0\x18\0" + bytes(200), "TGA"),
        (b"\0\0\0\x18ftypmp42" + bytes(20), "an ISO media file"),
    ],
    ids=["float TIFF", "12-bit JPEG", "lossless JPEG", "TGA", "MP4"],
)
def test_a_complete_picture_that_cannot_be_decoded_is_refused_and_the_error_describes_its_format(
    data: bytes, detail: str
) -> None:
    with pytest.raises(ImageError) as caught:
        opened(data)
    assert (caught.value.reason, caught.value.detail[: len(detail)]) == ("unsupported_format", detail)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_a_truncated_file_is_refused_as_truncated_even_if_its_pixel_format_cannot_be_decoded(share: float) -> None:
    data = float_tiff()
    assert rejection(data[: int(len(data) * share)]) == "truncated_image"


def test_a_tiff_palette_of_8_bit_values_gives_the_same_colours_as_a_palette_of_16_bit_values() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    palette = Image.fromarray(grey).convert("P")
    palette.putpalette(bytes(value for level in range(256) for value in (level, level, 255 - level)))
    data = encoded(palette, "TIFF")
    directory = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
    file = io.BytesIO(data)
    file.seek(directory.next)
    directory.load(file)
    wide = directory[320]
    narrow = data.replace(struct.pack(f"<{len(wide)}H", *wide), struct.pack(f"<{len(wide)}H", *(v >> 8 for v in wide)))
    assert narrow != data
    assert opened(narrow)[0] == opened(data)[0]


def test_a_jpeg_decoded_at_reduced_size_has_at_least_the_requested_size_and_nearly_the_same_pixels() -> None:
    config = ImageConfig(size=60)
    whole = picture(3, (500, 250)).resize((60, 30)).resize((500, 250))
    data = encoded(whole, "JPEG", quality=95)
    pixels = []
    for draft_side, size in ((None, (500, 250)), (200, (500, 250)), (60, (125, 63)), (10, (63, 32))):
        image, _ = open_image(data, max_pixels=1_000_000, min_side=4, draft_side=draft_side)
        assert image.size == size
        pixels.append(to_pixels(image, config).astype(int))
    assert 0 < np.abs(pixels[2] - pixels[0]).mean() < 3
    assert open_image(encoded(whole), max_pixels=1_000_000, min_side=4, draft_side=10)[0].size == (500, 250)


def test_an_animation_decodes_to_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255))]
    image, _ = opened(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert image.getpixel((0, 0)) == RED


@pytest.mark.parametrize(
    ("resize", "corner", "middle"),
    [("stretch", RED, (0, 0, 255)), ("crop", (0, 0, 255), (0, 0, 255)), ("pad", WHITE, (0, 0, 255))],
)
def test_a_picture_is_stretched_or_cropped_or_padded_as_the_resize_mode_says(
    resize: str, corner: tuple[int, int, int], middle: tuple[int, int, int]
) -> None:
    wide = Image.new("RGB", (120, 40), RED)
    wide.paste((0, 0, 255), (40, 0, 80, 40))
    pixels = to_pixels(wide, ImageConfig.model_validate({"size": 30, "resize": resize}))
    assert pixels.shape == (30, 30, 3)
    assert pixels.dtype == np.uint8
    # The resize filter mixes in some pixels from outside the crop.
    assert np.abs(pixels[0, 0].astype(int) - corner).max() <= 12
    assert tuple(pixels[15, 15]) == middle


def test_shrinking_a_picture_averages_its_pixels() -> None:
    stripes = Image.fromarray(np.tile(np.array([[0], [255]], np.uint8), (64, 128))).convert("RGB")
    pixels = to_pixels(stripes, ImageConfig(size=8))
    assert np.abs(pixels.astype(int) - 128).max() <= 8


@settings(max_examples=150)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"]), st.data())
def test_damaged_bytes_decode_to_an_rgb_picture_or_raise_an_image_error(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(encoded(picture(5, (16, 16)), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        image, _ = opened(bytes(damaged))
    except ImageError as error:
        reason = error.reason
    else:
        reason = ""
        assert image.mode == "RGB"
        assert np.array(image).shape == (image.height, image.width, 3)
    assert reason in ("", *IMAGE_REASONS)


def test_base64_text_of_too_many_bytes_is_rejected_before_decoding() -> None:
    with pytest.raises(ImageError) as caught:
        decode_base64("!" * 80_000, max_bytes=50_000)
    assert caught.value.reason == "too_large"


@given(
    st.binary(max_size=60),
    st.sampled_from(["", " ", "\r\n"]),
    *(st.booleans() for _ in range(3)),
    st.sampled_from([1, 4, 7, 76, 100]),
)
def test_base64_text_is_decoded_with_white_space_or_a_url_prefix_or_without_padding(
    data: bytes, space: str, url: bool, padded: bool, safe: bool, width: int
) -> None:
    body = base64.urlsafe_b64encode(data).decode() if safe else as_base64(data)
    body = body if padded else body.rstrip("=")
    body = space.join(body[at : at + width] for at in range(0, len(body), width))
    prefix = "data:image/png;base64," if url else ""
    assert decode_base64(f"{space}{prefix}{body}{space}", max_bytes=60) == data


@pytest.mark.parametrize(
    "text",
    [
        "AAE=",
        "AAE",
        "AAE===",
        "AAE%3D",
        "\ufeffAAE=",
        "DATA:image/png;BASE64,AAE=",
        "data:image/png;name=a b;charset=utf-8; base64,AAE=",
    ],
)
def test_base64_text_in_an_unusual_but_unambiguous_form_is_decoded(text: str) -> None:
    assert picture_bytes(text) == b"\x00\x01"


@pytest.mark.parametrize("empty", [None, "", " \n", b""])
def test_an_empty_picture_cell_is_rejected_with_the_reason_missing_field(empty: str | bytes | None) -> None:
    with pytest.raises(ImageError) as caught:
        picture_bytes(empty)
    assert caught.value.reason == "missing_field"


@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_base64_text_is_decoded_completely_or_rejected(text: str) -> None:
    try:
        data = decode_base64(text, max_bytes=100)
    except ImageError as error:
        reason = error.reason
    else:
        reason = ""
        body = "".join(unquote(text.strip().removeprefix("\ufeff")).split()).rpartition(",")[2].rstrip("=")
        assert len(data) == len(body) * 3 // 4
        assert base64.urlsafe_b64decode(body.translate(str.maketrans("+/", "-_")) + "=" * (-len(body) % 4)) == data
    assert reason in ("", "bad_base64")
