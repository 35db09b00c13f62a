"""Tests that a picture with odd, huge or broken metadata decodes to the same pixels as without metadata."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from vlm.errors import ImageError
from vlm.image import ImageInfo, open_image

GRID = np.random.default_rng(7).integers(0, 256, (4, 5, 3), np.uint8)
SHOWN = Image.fromarray(GRID).resize((40, 32), Image.Resampling.BICUBIC)
TURNED = SHOWN.transpose(Image.Transpose.ROTATE_270)
"""A smooth picture, and the same picture turned as EXIF orientation 6 says."""
CLEAR = SHOWN.copy()
CLEAR.putalpha(SHOWN.convert("L"))


def opened(data: bytes) -> Image.Image:
    image, info = open_image(data, max_pixels=1_000_000, min_side=1)
    assert (info.width, info.height) == image.size
    return image


def same(one: Image.Image, two: Image.Image) -> bool:
    return one.size == two.size and one.tobytes() == two.tobytes()


def decoded_by_pillow(data: bytes) -> Image.Image:
    """Decode a picture with undamaged metadata as Lakesight 0.1.0 decoded it."""
    image = Image.open(io.BytesIO(data))
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image.convert("RGB")


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = orientation, "a description " * 20
    exif.get_ifd(0x8769)[0x9003] = "2026:01:02 03:04:05"
    return exif


def ordinary_files() -> dict[str, bytes]:
    """Encode pictures of all formats, modes and orientations, with undamaged metadata."""
    files: dict[str, bytes] = {}
    for orientation, kind in itertools.product(range(10), ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"]):
        files[f"{kind} {orientation}"] = encoded(SHOWN, kind, exif=exif_of(orientation))
        if kind in {"JPEG", "WEBP", "AVIF"}:
            xmp = f"<x tiff:Orientation='?' tiff:Orientation=\"{orientation}\"/>".encode()
            files[f"{kind} XMP {orientation}"] = encoded(SHOWN, kind, xmp=xmp)
    exif = exif_of(6).tobytes()
    for zipped in (True, False):
        profile, xmp_chunk = PngInfo(), PngInfo()
        profile.add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{exif.hex()}\n", zip=zipped)
        xmp_chunk.add_itxt("XML:com.adobe.xmp", "<tiff:Orientation>8</tiff:Orientation>", zip=zipped)
        files[f"PNG profile {zipped}"] = encoded(SHOWN, pnginfo=profile)
        files[f"PNG XMP {zipped}"] = encoded(SHOWN, pnginfo=xmp_chunk)
    for compression in ("tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate"):
        files[f"TIFF {compression}"] = encoded(SHOWN, "TIFF", compression=compression, exif=exif_of(5))
    files["TIFF group4"] = encoded(SHOWN.convert("1"), "TIFF", compression="group4")
    files["BigTIFF"] = encoded(SHOWN, "TIFF", big_tiff=True, exif=exif_of(7))
    files["progressive"] = encoded(SHOWN, "JPEG", progressive=True)
    files["grey JPEG"], files["CMYK JPEG"] = (encoded(SHOWN.convert(mode), "JPEG") for mode in ("L", "CMYK"))
    for mode, kind in itertools.product(["1", "L", "P", "LA", "RGBA"], ["PNG", "TIFF", "BMP", "GIF", "WEBP", "AVIF"]):
        if not (kind == "BMP" and mode == "LA"):
            files[f"{kind} {mode}"] = encoded(CLEAR.convert(mode), kind)
    levels = np.arange(40 * 32, dtype=np.uint16).reshape(32, 40) * 51
    files["PNG I;16"], files["TIFF I;16"] = (encoded(Image.fromarray(levels), kind) for kind in ("PNG", "TIFF"))
    files["palette alpha"] = encoded(SHOWN.convert("P"), transparency=bytes(range(256)))
    files["grey key"] = encoded(SHOWN.convert("L"), transparency=SHOWN.convert("L").getpixel((3, 3)))
    files["colour key"] = encoded(SHOWN, transparency=SHOWN.getpixel((3, 3)))
    frames: dict[str, Any] = {"save_all": True, "append_images": [SHOWN.rotate(90), SHOWN.rotate(180)]}
    files |= {
        f"{kind} frames": encoded(SHOWN, kind, **frames) for kind in ("PNG", "GIF", "WEBP", "AVIF", "TIFF", "MPO")
    }
    files["hidden default"] = encoded(SHOWN, default_image=True, **frames)
    return files


ORDINARY = ordinary_files()


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_picture_decodes_to_the_same_pixels_as_in_earlier_releases(name: str) -> None:
    """Existing captions and shards of a home folder stay valid only if the same file decodes to the same pixels."""
    assert same(opened(ORDINARY[name]), decoded_by_pillow(ORDINARY[name]))


def chunk(kind: bytes, content: bytes, *, wrong: bool = False) -> bytes:
    check = zlib.crc32(kind + content) ^ int(wrong)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def segment(content: bytes, marker: int = 0xE1) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def tiff_block(
    *entries: tuple[int, int, int, bytes], orientation: bytes = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
) -> bytes:
    """Build EXIF data with the given entries (tag, type, count, four bytes) and an orientation."""
    listed = [struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries] + [orientation]
    return b"II*\0" + struct.pack("<IH", 8, len(listed)) + b"".join(listed) + bytes(4)


BIG_TEXT = zlib.compress(b"a" * 2**21)
EXIF = {
    "letters as width": tiff_block((0x100, 2, 4, b"640\0")),
    "fraction as width": tiff_block((0x100, 11, 1, struct.pack("<f", 1.5))),
    "huge count": tiff_block((0x10E, 2, 2**32 - 1, bytes(4))),
    "position outside": tiff_block((0x10E, 2, 100, b"\xff\xff\xff\x7f")),
    "loop": tiff_block((0x8769, 4, 1, struct.pack("<I", 8)), (0x8825, 4, 1, struct.pack("<I", 8))),
    "no such type": tiff_block((0x10F, 99, 1, bytes(4))),
    "zero fraction": tiff_block((0x11A, 5, 1, struct.pack("<I", 8))),
    "bytes as directory": tiff_block((0x8769, 2, 4, b"abc\0"), (0xA005, 7, 4, b"abcd")),
    "two values": tiff_block(orientation=struct.pack("<HHIHH", 0x112, 3, 2, 6, 6)),
    "long": tiff_block(orientation=struct.pack("<HHII", 0x112, 4, 1, 6)),
    "no end": tiff_block()[:-4],
}
IGNORED_EXIF = {
    "nothing": b"",
    "garbage": b"garbage",
    "other order": b"XX" + tiff_block()[2:],
    "directory outside": b"II*\0" + struct.pack("<I", 2**31),
    "orientation 0": tiff_block(orientation=struct.pack("<HHIHH", 0x112, 3, 1, 0, 0)),
    "orientation 99": tiff_block(orientation=struct.pack("<HHIHH", 0x112, 3, 1, 99, 0)),
    "orientation as text": tiff_block(orientation=struct.pack("<HHI", 0x112, 2, 2) + b"6\0\0\0"),
}


def png_with(extra: bytes, image: Image.Image = SHOWN) -> bytes:
    data = encoded(image)
    return data[:33] + extra + data[33:]


def jpeg_with(extra: bytes) -> bytes:
    data = encoded(SHOWN, "JPEG")
    return data[:2] + extra + data[2:]


def webp_with(*chunks: tuple[bytes, bytes], flags: int = 0x0C) -> bytes:
    """Build a WebP file of the extended form with metadata chunks after the pixels."""
    pixels = encoded(SHOWN, "WEBP", lossless=True)[12:]
    size = struct.pack("<I", SHOWN.width - 1)[:3] + struct.pack("<I", SHOWN.height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<IB3x", 10, flags) + size + pixels
    for kind, content in chunks:
        body += kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def without_bytes(kind: str, image: Image.Image = SHOWN) -> Image.Image:
    return opened(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})))


WRITERS: dict[str, Callable[[bytes], bytes]] = {
    "PNG": lambda exif: png_with(chunk(b"eXIf", exif)),
    "JPEG": lambda exif: jpeg_with(segment(b"Exif\0\0" + exif)),
    "WEBP": lambda exif: webp_with((b"EXIF", exif)),
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("name", EXIF)
def test_a_picture_with_broken_exif_is_turned_by_its_orientation(kind: str, name: str) -> None:
    whole = without_bytes(kind)
    assert same(opened(WRITERS[kind](EXIF[name])), whole.transpose(Image.Transpose.ROTATE_270))


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", IGNORED_EXIF)
def test_a_picture_with_exif_that_holds_no_orientation_is_not_turned(kind: str, name: str) -> None:
    assert same(opened(WRITERS[kind](IGNORED_EXIF[name])), without_bytes(kind))


def test_an_avif_picture_with_broken_exif_is_turned_by_its_own_rotation() -> None:
    data = encoded(SHOWN, "AVIF", exif=exif_of(6))
    at = data.index(b"MM\0*")
    for garbage in (b"garbage!" * 3, b"MM\0*" + b"\xff" * 20):
        assert same(opened(data[:at] + garbage + data[at + 24 :]), decoded_by_pillow(data))


PNG_EXTRAS = {
    "long iTXt": chunk(b"iTXt", b"workflow\0\1\0\0\0" + BIG_TEXT),
    "long zTXt": chunk(b"zTXt", b"a\0\0" + BIG_TEXT),
    "long tEXt": chunk(b"tEXt", b"a\0" + b"b" * 2**21),
    "much text": b"".join(chunk(b"zTXt", b"%d\0\0" % n + zlib.compress(b"a" * 2**20)) for n in range(80)),
    "large profile": chunk(b"iCCP", b"p\0\0" + BIG_TEXT),
    "unknown profile": chunk(b"iCCP", b"p\0\7"),
    "empty profile": chunk(b"iCCP", b""),
    "wrong checksum": chunk(b"tEXt", b"a\0b", wrong=True),
    "wrong checksum of an unknown chunk": chunk(b"prVt", b"abc", wrong=True),
    "short chunks": b"".join(chunk(kind, b"") for kind in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"eXIf", b"tIME")),
    "short animation": chunk(b"acTL", b"\0"),
    "no frames": chunk(b"acTL", struct.pack(">II", 0, 0)),
    "frames in disorder": chunk(b"fcTL", struct.pack(">IIIIIHHBB", 5, 40, 32, 0, 0, 1, 1, 0, 0)),
    "frame outside": chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 90, 90, 9, 9, 1, 1, 0, 0)),
    "transparency too short": chunk(b"tRNS", b"\0"),
}


@pytest.mark.parametrize("name", PNG_EXTRAS)
def test_the_metadata_chunks_of_a_png_never_change_its_pixels(name: str) -> None:
    assert same(opened(png_with(PNG_EXTRAS[name])), SHOWN)
    data = encoded(SHOWN)
    assert same(opened(data[:-12] + PNG_EXTRAS[name] + data[-12:]), SHOWN)


def test_a_png_keeps_its_transparency_even_if_the_checksum_of_the_transparency_is_wrong() -> None:
    data = encoded(SHOWN.convert("P"), transparency=bytes(range(256)))
    at = data.index(b"tRNS")
    check = at + 4 + int.from_bytes(data[at - 4 : at], "big")
    wrong = data[:check] + bytes([data[check] ^ 1]) + data[check + 1 :]
    assert same(opened(wrong), decoded_by_pillow(data))
    header = data[:29] + bytes([data[29] ^ 1]) + data[30:]
    with pytest.raises(ImageError, match="truncated_image"):
        opened(header)


def test_a_png_with_another_chunk_between_its_pixel_chunks_is_decoded_completely() -> None:
    data = encoded(SHOWN)
    at = data.index(b"IDAT") + 4
    pixels = data[at : at + int.from_bytes(data[at - 8 : at - 4], "big")]
    halves = chunk(b"IDAT", pixels[:50]) + chunk(b"tEXt", b"a\0b") + chunk(b"IDAT", pixels[50:])
    assert same(opened(data[: at - 8] + halves + data[-12:]), SHOWN)


JPEG_EXTRAS = {
    "large profile": b"".join(segment(b"ICC_PROFILE\0\1\1" + bytes(60_000), 0xE2) for _ in range(40)),
    "XMP": segment(b"http://ns.adobe.com/xap/1.0/\0" + b"<" * 60_000),
    "no pictures": segment(b"MPF\0II*\0\x08\0\0\0\0\0\0\0\0\0", 0xE2),
    "garbage": segment(b"Photoshop 3.0\0" + b"8BIM" * 100, 0xED),
    "comments": segment(b"x" * 60_000, 0xFE) * 40,
    "fill bytes": b"\xff" * 100,
    "empty segments": b"".join(segment(b"", marker) for marker in range(0xE0, 0xF0)),
}


@pytest.mark.parametrize("name", JPEG_EXTRAS)
def test_the_metadata_segments_of_a_jpeg_never_change_its_pixels(name: str) -> None:
    assert same(opened(jpeg_with(JPEG_EXTRAS[name])), without_bytes("JPEG"))


def test_a_jpeg_with_several_pictures_decodes_to_the_first_picture_and_its_format_is_jpeg() -> None:
    data = encoded(SHOWN, "MPO", save_all=True, append_images=[TURNED])
    image, info = open_image(data, max_pixels=10_000, min_side=1)
    assert info == ImageInfo("JPEG", 40, 32)
    assert same(image, decoded_by_pillow(data))


def test_a_jpeg_is_decoded_for_any_order_of_its_tables() -> None:
    data = encoded(SHOWN, "JPEG")
    parts = {data[at : at + 2]: at for at in range(len(data)) if data[at : at + 2] in (b"\xff\xdb", b"\xff\xc0")}
    tables, frame = parts[b"\xff\xdb"], parts[b"\xff\xc0"]
    end = frame + 2 + int.from_bytes(data[frame + 2 : frame + 4], "big")
    moved = data[:tables] + data[frame:end] + data[tables:frame] + data[end:]
    assert same(opened(moved), without_bytes("JPEG"))


@pytest.mark.parametrize("flags", [0x00, 0x0C, 0x3E])
def test_the_metadata_chunks_of_a_webp_never_change_its_pixels(flags: int) -> None:
    extra = ((b"EXIF", b"garbage"), (b"XMP ", b"<" * 2**21), (b"ICCP", b""), (b"abcd", b"odd"))
    assert same(opened(webp_with(*extra, flags=flags & ~0x02)), without_bytes("WEBP"))
    assert same(opened(webp_with(*extra) + b"garbage at the end"), without_bytes("WEBP"))


def test_the_metadata_tags_of_a_tiff_never_change_its_pixels() -> None:
    data = encoded(SHOWN, "TIFF", exif=exif_of(6), compression="tiff_lzw")
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    tags = data[at + 2 : at + 2 + 12 * count]
    odd = [(0x100 + n, kind, 2**32 - 1, b"\xff" * 4) for n, kind in enumerate([2, 5, 12, 13, 99], 50)]
    odd += [(0x8769, 4, 1, struct.pack("<I", at)), (700, 2, 4, b"abc\0"), (0xC4A5, 3, 1, bytes(4))]
    listed = sorted(
        [tags[n : n + 12] for n in range(0, len(tags), 12)] + [struct.pack("<HHI", *e[:3]) + e[3] for e in odd]
    )
    directory = struct.pack("<H", len(listed)) + b"".join(listed) + struct.pack("<I", 7)
    moved = data[:4] + struct.pack("<I", len(data)) + data[8:] + directory
    assert same(opened(moved), TURNED)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_bytes_after_the_end_of_a_picture_are_ignored_and_bytes_before_its_start_are_an_error(kind: str) -> None:
    data = encoded(SHOWN, kind)
    assert same(opened(data + b"\0\0garbage" * 50), opened(data))
    with pytest.raises(ImageError):
        opened(b"xx" + data)


TEXTS = st.binary(max_size=80)


@settings(max_examples=60)
@given(st.data())
def test_random_metadata_inserted_anywhere_into_a_picture_file_changes_no_pixel(data: st.DataObject) -> None:
    names = [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"acTL", b"gAMA", b"sBIT", b"bKGD", b"hIST", b"prVt"]
    extra = b"".join(
        chunk(data.draw(st.sampled_from(names)), data.draw(TEXTS), wrong=data.draw(st.booleans()))
        for _ in range(data.draw(st.integers(1, 4)))
    )
    image = data.draw(st.sampled_from([SHOWN, CLEAR, SHOWN.convert("P"), SHOWN.convert("L")]))
    assert same(opened(png_with(extra, image)), decoded_by_pillow(encoded(image)))
    markers = st.sampled_from([*range(0xE1, 0xEE), 0xEF, 0xFE])
    prefixes = st.sampled_from([b"", b"Exif\0\0", b"ICC_PROFILE\0", b"MPF\0", b"Photoshop 3.0\0", b"FPXR\0"])
    extra = b"".join(
        segment(data.draw(prefixes) + data.draw(TEXTS), data.draw(markers)) for _ in range(data.draw(st.integers(1, 4)))
    )
    assert same(opened(jpeg_with(extra)), without_bytes("JPEG"))
    chunks = [
        (data.draw(st.sampled_from([b"EXIF", b"XMP ", b"ICCP", b"prVt"])), data.draw(TEXTS))
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    assert same(opened(webp_with(*chunks)), without_bytes("WEBP"))
