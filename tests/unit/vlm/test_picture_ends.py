"""Tests of pictures without an end marker, of pictures with 16 bits per sample, and of the memory of conversions."""

from __future__ import annotations

import itertools
import struct
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from pictures import encoded, picture
from PIL import Image

from vlm.errors import ImageError
from vlm.image import open_image
from vlm.picture import colours

FLAT = Image.new("RGB", (48, 40), (90, 20, 200))
SMOOTH = Image.fromarray(np.random.default_rng(7).integers(0, 256, (4, 5, 3), np.uint8)).resize((48, 40))


def opened(data: bytes, **options: int) -> Image.Image:
    return open_image(data, max_pixels=1_000_000, min_side=1, **options)[0]


def opened_or_none(data: bytes) -> Image.Image | None:
    try:
        return opened(data)
    except ImageError as error:
        return None if error.reason == "truncated_image" else Image.new("RGB", (1, 1))


def same(one: Image.Image, two: Image.Image) -> bool:
    return one.size == two.size and one.tobytes() == two.tobytes()


def jpegs() -> dict[str, bytes]:
    images = {"flat": FLAT, "smooth": SMOOTH, "noise": picture(1, (48, 40)), "grey": SMOOTH.convert("L")}
    files = {}
    for (name, image), progressive, optimize in itertools.product(images.items(), (False, True), (False, True)):
        files[f"{name} {progressive} {optimize}"] = encoded(image, "JPEG", progressive=progressive, optimize=optimize)
    files["subsampled"] = encoded(SMOOTH, "JPEG", subsampling="4:2:0")
    files["restarts"] = encoded(SMOOTH, "JPEG", restart_marker_blocks=2)
    files["CMYK"] = encoded(SMOOTH.convert("CMYK"), "JPEG")
    return files


JPEGS = jpegs()


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_without_its_end_marker_is_decoded_only_if_no_pixel_is_missing(name: str) -> None:
    data = JPEGS[name]
    whole = opened(data)
    assert same(opened(data[:-2]), whole)
    assert same(opened(data[:-1]), whole)
    assert same(opened(data[:-2] + bytes(1000)), whole)
    draft = {"draft_side": 20}
    assert same(opened(data[:-2], **draft), opened(data, **draft))
    for length in range(len(data) // 8, len(data) - 2, max(1, len(data) // 60)):
        shown = opened_or_none(data[:length])
        assert shown is None or same(shown, whole), f"{length} of {len(data)} bytes are taken for the whole picture"


def test_a_progressive_jpeg_that_ends_between_two_scans_is_truncated() -> None:
    data = encoded(SMOOTH, "JPEG", progressive=True)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    for scan in scans[1:]:
        with pytest.raises(ImageError, match="truncated_image"):
            opened(data[: data.rindex(b"\xff\xc4", 0, scan)])


@pytest.mark.parametrize(("kind", "end"), [("PNG", 12), ("PNG", 16), ("GIF", 1), ("GIF", 2)])
def test_a_png_or_gif_without_its_end_marker_is_decoded(kind: str, end: int) -> None:
    data = encoded(SMOOTH, kind)
    assert same(opened(data[:-end]), opened(data))


@pytest.mark.parametrize("size", [(47, 5), (48, 5), (1, 1)])
def test_a_webp_without_its_last_padding_byte_is_decoded(size: tuple[int, int]) -> None:
    for seed in range(8):
        data = encoded(picture(seed, size), "WEBP", lossless=True)
        odd = int.from_bytes(data[16:20], "little") % 2
        assert same(opened(data[: len(data) - odd]), opened(data))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [8, 10, 12])
def test_the_values_of_a_16_bit_grey_picture_that_uses_few_bits_are_scaled_to_the_full_range(
    kind: str, bits: int
) -> None:
    levels = np.linspace(0, 2**bits - 1, 64 * 64).astype(np.uint16).reshape(64, 64)
    shown = np.asarray(opened(encoded(Image.fromarray(levels), kind)))
    assert (shown.min(), shown.max()) == (0, 255)
    assert np.array_equal(shown[..., 0], levels >> (bits - 8))


def test_the_values_of_a_16_bit_picture_that_uses_more_than_12_bits_are_scaled_as_16_bit_values() -> None:
    levels = np.array([[0, 4096], [300, 40]], np.uint16)
    assert np.asarray(opened(encoded(Image.fromarray(levels))))[..., 0].tolist() == [[0, 16], [1, 0]]


def deep_png(samples: npt.NDArray[np.uint16]) -> bytes:
    """Encode samples (H, W, 3 or 4) as a PNG with 16 bits a sample, which Pillow cannot write."""
    height, width, channels = samples.shape
    kinds = {3: 2, 4: 6}
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, kinds[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(("bits", "shift"), [(8, 0), (10, 2), (12, 4), (13, 8), (16, 8)])
def test_the_values_of_a_16_bit_colour_png_that_uses_few_bits_are_scaled_to_the_full_range(
    bits: int, shift: int
) -> None:
    samples = np.random.default_rng(bits).integers(0, 2**bits, (20, 30, 3)).astype(np.uint16)
    samples[0, 0] = 2**bits - 1
    assert np.array_equal(np.asarray(opened(deep_png(samples))), samples >> shift)
    opaque = np.concatenate([samples, np.full((20, 30, 1), 65535, np.uint16)], axis=2)
    assert np.array_equal(np.asarray(opened(deep_png(opaque))), samples >> shift)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "LAB", "I;16"])
def test_converting_a_picture_band_by_band_gives_the_same_pixels(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SMOOTH.copy()
    source.putalpha(SMOOTH.convert("L"))
    if mode == "LAB":
        image = Image.frombytes("LAB", SMOOTH.size, SMOOTH.tobytes())
    elif mode == "I;16":
        image = Image.frombytes(mode, SMOOTH.size, SMOOTH.convert("LA").tobytes())
    else:
        image = source.convert(mode)
    whole = opened(encoded(image, "TIFF"))
    monkeypatch.setattr(colours, "BAND_PIXELS", 100)
    assert same(opened(encoded(image, "TIFF")), whole)
