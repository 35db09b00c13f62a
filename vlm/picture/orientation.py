"""Read the orientation of a picture from its EXIF or XMP metadata, even if other parts of the metadata are damaged."""

from __future__ import annotations

import re
import struct

from PIL import Image

ORIENTATION_TAG = 0x0112
INTEGERS = {3: "H", 4: "I", 8: "h", 9: "i"}
"""Dict from a TIFF type to the format of `struct`, for the types that an orientation may have (16-bit and 32-bit
integers)."""
MAX_ENTRIES = 65_536
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')

TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Pillow's method that turns a picture upright, for each orientation except 1."""


def exif_orientation(exif: bytes) -> int | None:
    """Return the orientation in the first directory of EXIF data or of a TIFF file.

    This function reads only the entry of the orientation, so damage in other entries or directories has no effect. A
    value outside of 1 to 8 counts as 1, as in a browser.

    Returns:
        The orientation, or None if the data contains no orientation.
    """
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    if exif[:2] not in {b"II", b"MM"}:
        return None
    order, big = ("<" if exif[:2] == b"II" else ">"), exif[2:4] in {b"+\0", b"\0+"}
    number, word, at, size, inline = ("Q", "Q", 8, 20, 8) if big else ("H", "I", 4, 12, 4)
    orientation = None
    try:
        (first,) = struct.unpack_from(order + word, exif, at)
        (count,) = struct.unpack_from(order + number, exif, first)
        start = first + struct.calcsize(order + number)
        for entry in range(start, start + min(count, MAX_ENTRIES) * size, size):
            tag, kind, values = struct.unpack_from(order + "HH" + word, exif, entry)
            if tag != ORIENTATION_TAG or kind not in INTEGERS or not values:
                continue
            value = entry + size - inline
            if values * struct.calcsize(order + INTEGERS[kind]) > inline:
                (value,) = struct.unpack_from(order + word, exif, value)
            (orientation,) = struct.unpack_from(order + INTEGERS[kind], exif, value)
    except struct.error:  # the data is truncated: use the orientation if it was read
        pass
    return orientation if orientation is None or 1 <= orientation <= 8 else 1


def xmp_orientation(xmp: bytes) -> int | None:
    """Return the orientation in an XMP document, or None if the document contains no orientation."""
    found = XMP_ORIENTATION.search(xmp)
    return int(found[1]) if found else None


def raw_profile(text: bytes) -> bytes:
    """Decode the text of ImageMagick's PNG chunk `Raw profile type exif`: three lines, then lines of hex digits."""
    try:
        return bytes.fromhex("".join(text.decode("latin-1").split("\n")[3:]))
    except ValueError:
        return b""


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Rotate or mirror a picture according to its EXIF orientation."""
    return image.transpose(TRANSPOSES[orientation]) if orientation in TRANSPOSES else image
