"""Decode a JPEG file without an end marker, if the file nevertheless contains all pixels of the picture.

Pillow's decoder does not report missing pixels, but fills them with grey. This module therefore makes two checks.
First, the scans of the file must contain all coefficients of all components, because a progressive file may end after
any scan. Second, random bytes after the data must not change the pixels. If the last block were incomplete, the decoder
would read the random bytes as pixels.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

from PIL import Image

from vlm.picture.colours import row_bands
from vlm.picture.metadata import JPEG_SCAN, jpeg_segments

END = b"\xff\xd9"
NOISE = bytes(byte for byte in random.Random(0).randbytes(16_384) if byte != 0xFF)  # noqa: S311 (not for cryptography)
PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
FRAMES = (0xC0, 0xC1, *PROGRESSIVE, 0xC9)
"""JPEG markers of a frame header, for sequential and progressive files with Huffman or arithmetic coding."""


def decode_without_end(data: bytes, decode: Callable[[bytes], Image.Image]) -> Image.Image | None:
    """Decode a JPEG file that lacks its end marker. Return None if pixels are missing.

    Args:
        data: bytes of the file. Zeros at the end of the file are ignored.
        decode: function that decodes a complete file.
    """
    data = data.rstrip(b"\0").removesuffix(b"\xff")
    if not _has_all_coefficients(data):
        return None
    expected = _hash_pixels(decode(data + END))  # keep only a hash, because two large pictures would not fit in memory
    image = decode(data + NOISE + END)
    return image if _hash_pixels(image) == expected else None


def _has_all_coefficients(data: bytes) -> bool:
    """Return whether the scans of a JPEG file together contain all bits of the 64 coefficients of every component."""
    missing: set[tuple[int, int]] = set()
    position = 2
    progressive = False
    while position:
        position, start = 0, position
        for segment in jpeg_segments(data, start):
            content = data[segment.content : segment.end]
            if segment.marker in FRAMES:
                progressive = segment.marker in PROGRESSIVE
                components = content[6::3]
                missing = {(component, k) for component in components for k in range(64)}
            elif segment.marker == JPEG_SCAN and content:
                components = content[1 : 1 + 2 * content[0] : 2]
                first, last, bits = content[-3:] if progressive else (0, 63, 0)
                if not bits & 15:
                    missing -= {(component, k) for component in components for k in range(first, last + 1)}
                position = segment.end
    return not missing and position == 0


def _hash_pixels(image: Image.Image) -> bytes:
    sha256 = hashlib.sha256()
    for band in row_bands(image.size):
        sha256.update(image.crop(band).tobytes())
    return sha256.digest()
