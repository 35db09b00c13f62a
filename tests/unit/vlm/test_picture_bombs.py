"""Tests that small files with huge pictures or huge metadata need less than a gigabyte at the default limits."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pictures import encoded, png
from PIL import Image

SIDE = 8000
MAX_BYTES = 950_000_000
"""A Spark worker needs about 50 MB more memory than the process of this test, which loads only Pillow and numpy."""
MEASURE = """
import re, sys
from pathlib import Path
from vlm.errors import ImageError
from vlm.image import open_image
try:
    _, info = open_image(Path(sys.argv[1]).read_bytes(), max_pixels=64_000_000, min_side=4)
    print(info.width, info.height, end=" ")
except ImageError as error:
    print(error.reason, "-", end=" ")
print(1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]))
"""


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def exif() -> Image.Exif:
    turned = Image.Exif()
    turned[0x0112] = 6
    return turned


def blank(mode: str, kind: str, size: tuple[int, int] = (SIDE, SIDE), **options: Any) -> bytes:
    return encoded(Image.new(mode, size), kind, exif=exif(), **options)


def png_with(*chunks: bytes) -> bytes:
    data = png(1)
    return data[:33] + b"".join(chunks) + data[33:]


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "transparent PNG": (lambda: blank("RGBA", "PNG", compress_level=1), f"{SIDE} {SIDE}"),
    "long PNG": (lambda: blank("RGB", "PNG", (60_000, 1_000), compress_level=1), "1000 60000"),
    "16-bit PNG": (lambda: blank("I;16", "PNG", compress_level=1), f"{SIDE} {SIDE}"),
    "progressive JPEG": (lambda: blank("CMYK", "JPEG", progressive=True, subsampling=0), f"{SIDE} {SIDE}"),
    "JPEG without end": (lambda: blank("RGB", "JPEG", progressive=True, subsampling=0)[:-2], f"{SIDE} {SIDE}"),
    "transparent WebP": (lambda: blank("RGBA", "WEBP", lossless=True, quality=0, method=0), f"{SIDE} {SIDE}"),
    "transparent AVIF": (lambda: blank("RGBA", "AVIF", speed=10), f"{SIDE} {SIDE}"),
    "PNG of texts": (lambda: png_with(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20))) * 40_000), "24 16"),
    "PNG of one text": (
        lambda: png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(2**28)))),
        "24 16",
    ),
    "PNG of large header": (
        lambda: png_with()[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + png_with()[24:],
        "truncated_image -",
    ),
}


QUICK = ("PNG of texts", "PNG of large header")


@pytest.mark.faults
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.matrix) for name in BOMBS]
)
def test_decoding_a_picture_bomb_needs_less_than_a_gigabyte_of_memory(name: str, tmp_path: Path) -> None:
    make, shown = BOMBS[name]
    bomb = tmp_path / "bomb"
    bomb.write_bytes(make())
    command = [sys.executable, "-c", MEASURE, str(bomb)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    found, _, peak = done.stdout.strip().rpartition(" ")
    assert found == shown
    assert int(peak) < MAX_BYTES
