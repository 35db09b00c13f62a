"""Tests of pictures from public bug reports: viewers show these pictures, but a naive reader refuses many of them.

Each picture is built as its report describes. The report `Pillow 4472` is GitHub issue 4472 of Pillow. The column
`Pillow` says what `Image.open`, `load` and `exif_transpose` of Pillow 13.0.0 do, and the next column says what
Lakesight 0.1.0 did. Lakesight now decodes all of these pictures except two: a TIFF with five channels and a progressive
JPEG that was cut.

| report | input | Pillow | Lakesight 0.1.0 |
|---|---|---|---|
| Pillow 4472, 4592, 5631 | PNG, wrong checksum of the colour profile | refused | refused |
| Pillow 5978 | PNG, wrong checksum of pHYs | refused | refused |
| Pillow 7504 | PNG, wrong checksums of eXIf and of the pixels | refused | refused |
| Pillow 2445, 8363; LlamaFactory 6300; STAMP 76 | PNG, profile or text of more than 1 MB | refused | refused |
| Pillow 7817 | PNG, profile of unknown compression | refused | refused |
| Pillow 6252 | PNG, broken IHDR after the pixels | refused | refused |
| Pillow 6118 | PNG, the file ends in an IDAT chunk behind the last pixel | refused | refused |
| Pillow 5528; libpng 326 | PNG, EXIF that is no TIFF structure | refused | refused |
| chunky_png 96; libplum 22 | PNG, two null bytes at the end | read | read |
| Pillow 8348 | JPEG, EXIF with a double prefix | read | read |
| Pillow 8965 | JPEG, orientation 6 and a fraction -1/0 | refused | refused |
| Pillow 7839, 3973 | JPEG, orientation 6 and a fraction where text is expected | refused | refused |
| Pillow 7879 | JPEG, EXIF segment that holds XMP | read | read |
| datasets 7668 | JPEG, XMP that is not UTF-8 | read | read |
| Pillow 450, 889, 4414, 2038 | JPEG, no end marker, all pixels there | refused | refused |
| Pillow 123 | JPEG, end marker overwritten by zeros | refused | refused |
| Pillow 1960 | JPEG with a second picture behind it | read | read |
| tensorflow/models 2194 | JPEG, garbage before the end marker | read | read |
| Pillow 1718 | GIF, extension of no length | read | read |
| image-gif 138 | GIF, no trailer | read | read |
| Pillow 8790 | TIFF, XMP as numbers | read | read |
| Pillow 6435 | BMP, 32 bits with the masks RGBA | read | read |
| Pillow 5991, 2574, 5403, 4073 | PNG, 16 bits of which 10 are used | black | black |
| Pillow 7007 | TIFF, five channels | refused | refused (still refused) |
| Pillow 2717 | JPEG, progressive, cut in the middle | refused | refused (still refused, since pixels are missing) |
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from pictures import encoded
from PIL import Image

from vlm.errors import ImageError
from vlm.image import open_image

SHOWN = Image.fromarray(np.random.default_rng(3).integers(0, 256, (4, 5, 3), np.uint8)).resize((40, 32))
PNG, JPEG, GIF = (encoded(SHOWN, kind) for kind in ("PNG", "JPEG", "GIF"))
PIXELS_AT = PNG.index(b"IDAT") + 4
PIXELS = PNG[PIXELS_AT : PIXELS_AT + int.from_bytes(PNG[PIXELS_AT - 8 : PIXELS_AT - 4], "big")]


def opened(data: bytes) -> Image.Image:
    return open_image(data, max_pixels=10_000, min_side=1)[0]


def chunk(kind: bytes, content: bytes, *, wrong: bool = False) -> bytes:
    check = zlib.crc32(kind + content) ^ int(wrong)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png(*headers: bytes, pixels: bytes | None = None, end: bytes = chunk(b"IEND", b"")) -> bytes:
    return PNG[:33] + b"".join(headers) + (chunk(b"IDAT", PIXELS) if pixels is None else pixels) + end


def jpeg(content: bytes) -> bytes:
    return JPEG[:2] + struct.pack(">BBH", 0xFF, 0xE1, len(content) + 2) + content + JPEG[2:]


def exif(*entries: tuple[int, int, int, bytes], values: bytes = b"") -> bytes:
    """Build EXIF data with entries (tag, type, count, four bytes). An entry has space for four bytes, so longer values
    are in the bytes `values` after the entries.
    """
    listed = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + listed + bytes(4) + values


ORIENTATION = (0x112, 3, 1, struct.pack("<HH", 6, 0))
FRACTION = exif((0x11A, 10, 1, struct.pack("<I", 38)), ORIENTATION, values=struct.pack("<ii", -1, 0))
WORDS = exif((0x10F, 5, 1, struct.pack("<I", 38)), ORIENTATION, values=struct.pack("<II", 1, 3))
PROFILE = b"ICC\0\0" + zlib.compress(b"profile")

SHOWN_PNGS = {
    "Pillow 4472": png(chunk(b"iCCP", PROFILE, wrong=True)),
    "Pillow 5978": png(chunk(b"pHYs", struct.pack(">IIB", 7874, 7874, 1), wrong=True)),
    "Pillow 7504": png(chunk(b"eXIf", b"II*\0", wrong=True), pixels=chunk(b"IDAT", PIXELS, wrong=True)),
    "Pillow 2445": png(chunk(b"iCCP", b"ICC\0\0" + zlib.compress(bytes(2**21)))),
    "Pillow 8363": png(chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2**21)))),
    "Pillow 7817": png(chunk(b"iCCP", b"ICC\0\1" + zlib.compress(b"profile"))),
    "Pillow 6252": png(end=b"\x00\x00\x00\x00IHDR\xa8\xa1\xae\x0a" + chunk(b"IEND", b"")),
    "Pillow 6118": png(pixels=chunk(b"IDAT", PIXELS) + struct.pack(">I", 500) + b"IDAT" + b"abc", end=b""),
    "Pillow 5528": png(chunk(b"eXIf", b"\x00\x08\x00\x02\x01\x12\x00\x03")),
    "chunky_png 96": PNG + bytes(2),
}
SHOWN_JPEGS = {
    "Pillow 7879": jpeg(b"Exif\0\0http://ns.adobe.com/xap/1.0/\0<x/>"),
    "datasets 7668": jpeg(b"http://ns.adobe.com/xap/1.0/\0\xa8\xff<x/>"),
    "Pillow 450": JPEG[:-2],
    "Pillow 123": JPEG[:-2] + bytes(2),
    "Pillow 1960": JPEG + JPEG,
    "tensorflow/models 2194": JPEG[:-2] + bytes(245) + JPEG[-2:],
}
TURNED_JPEGS = {
    "Pillow 8348": jpeg(b"Exif\0\0Exif\0\0" + exif(ORIENTATION)),
    "Pillow 8965": jpeg(b"Exif\0\0" + FRACTION),
    "Pillow 7839": jpeg(b"Exif\0\0" + WORDS),
}


@pytest.mark.parametrize("report", SHOWN_PNGS)
def test_a_png_from_a_public_bug_report_is_decoded_to_its_original_pixels(report: str) -> None:
    assert opened(SHOWN_PNGS[report]).tobytes() == SHOWN.tobytes()


@pytest.mark.parametrize("report", SHOWN_JPEGS)
def test_a_jpeg_from_a_public_bug_report_is_decoded_to_its_original_pixels(report: str) -> None:
    assert opened(SHOWN_JPEGS[report]).tobytes() == opened(JPEG).tobytes()


@pytest.mark.parametrize("report", TURNED_JPEGS)
def test_a_jpeg_from_a_public_bug_report_is_turned_by_its_exif_orientation(report: str) -> None:
    upright = opened(JPEG).transpose(Image.Transpose.ROTATE_270)
    assert opened(TURNED_JPEGS[report]).tobytes() == upright.tobytes()


def test_gifs_from_public_bug_reports_are_decoded_to_their_original_pixels() -> None:
    empty = "47494638396101000100800000FFFFFF00000021FE002C00000000010001000002024401003B"
    assert opened(bytes.fromhex(empty)).getpixel((0, 0)) == (255, 255, 255), "Pillow 1718"
    assert opened(GIF[:-1]).tobytes() == opened(GIF).tobytes(), "image-gif 138"


def test_a_tiff_whose_xmp_metadata_is_stored_as_numbers_is_decoded_to_its_original_pixels() -> None:
    data = encoded(SHOWN, "TIFF", tiffinfo={700: 7})
    assert opened(data).tobytes() == SHOWN.tobytes(), "Pillow 8790"


def test_a_bmp_with_colour_masks_is_decoded_to_its_original_pixels() -> None:
    masks = struct.pack("<4I", 0xFF000000, 0xFF0000, 0xFF00, 0xFF)
    header = struct.pack("<IiiHHIIiiII", 124, 1, 1, 1, 32, 3, 4, 0, 0, 0, 0) + masks + bytes(68)
    data = b"BM" + struct.pack("<IHHI", 142, 0, 0, 138) + header + bytes([255, 3, 2, 1])
    assert opened(data).getpixel((0, 0)) == (1, 2, 3), "Pillow 6435"


@pytest.mark.parametrize("length", [300, 600])
def test_a_progressive_jpeg_that_was_cut_is_refused(length: int) -> None:
    data = encoded(SHOWN, "JPEG", progressive=True)
    with pytest.raises(ImageError, match="truncated_image"):
        opened(data[:length])
