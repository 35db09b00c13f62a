"""Describe picture files that are complete but that Pillow cannot decode, to distinguish them from damaged files.

A user must replace a damaged file by an intact copy, but can convert a complete file with an unusual pixel type. The
functions read only the headers of the files. The headers of a TIFF file show whether the file is incomplete. The
headers of a JPEG file do not.
"""

from __future__ import annotations

import io

from PIL import TiffImagePlugin

from vlm.picture.metadata import jpeg_segments

JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG markers of frame headers."""
DECODED_FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)
"""JPEG markers of the frames that Pillow decodes: sequential and progressive."""
TIFF_BITS, TIFF_COMPRESSION, TIFF_SAMPLES, TIFF_SAMPLE_FORMAT = 258, 259, 277, 339
TIFF_DATA = ((273, 279), (324, 325))
"""TIFF tags of the offsets and sizes of strips, and of the offsets and sizes of tiles."""
SAMPLE_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point", 5: "complex integer", 6: "complex"}
MAX_PARTS = 2**20
"""Number of strips or tiles from which a TIFF file counts as incomplete."""


def describe_undecodable(format_name: str, data: bytes) -> str | None:
    """Read the headers of a picture file that Pillow cannot decode, and describe the pixels of the file.

    Args:
        format_name: Pillow's name of the format that the first bytes of the file indicate.
        data: content of a file that could not be decoded.

    Returns:
        The description, for example "JPEG with 12 bits per sample". The result is None if the headers are damaged, if a
        TIFF file is incomplete, or if Pillow can decode the pixels that the headers of a JPEG file describe. The result
        is also None for all other formats.
    """
    describe = {"JPEG": _describe_jpeg, "TIFF": _describe_tiff}.get(format_name)
    return describe(data) if describe else None


def _describe_jpeg(data: bytes) -> str | None:
    for segment in jpeg_segments(data):
        if segment.marker in JPEG_FRAMES and segment.content < segment.end:
            bits = data[segment.content]
            if segment.marker not in DECODED_FRAMES:
                return f"JPEG with a lossless or hierarchical frame (SOF{segment.marker - 0xC0})"
            return f"JPEG with {bits} bits per sample" if bits != 8 else None
    return None


def _describe_tiff(data: bytes) -> str | None:
    try:
        header = data[:16] if b"+" in data[2:4] else data[:8]  # the plus sign marks BigTIFF
        directory = TiffImagePlugin.ImageFileDirectory_v2(header)
        file = io.BytesIO(data)
        file.seek(directory.next)
        directory.load(file)
        complete = any(_fits(directory.get(start), directory.get(size), len(data)) for start, size in TIFF_DATA)
        bits = ", ".join(str(number) for number in sorted(set(directory.get(TIFF_BITS, (1,)))))
        formats = sorted({SAMPLE_FORMATS.get(kind, "unknown") for kind in directory.get(TIFF_SAMPLE_FORMAT, (1,))})
        samples, compression = directory.get(TIFF_SAMPLES, 1), directory.get(TIFF_COMPRESSION, 1)
    except Exception:  # noqa: BLE001 Pillow's parser raises many types of errors for damaged files
        return None
    if not complete:
        return None
    name = TiffImagePlugin.COMPRESSION_INFO.get(compression, "unknown")
    return (
        f"TIFF with {samples} samples per pixel ({' and '.join(formats)}, {bits} bits each), "
        f"compression {compression} ({name})"
    )


def _fits(starts: object, sizes: object, length: int) -> bool:
    """Return True if a picture has fewer than MAX_PARTS strips or tiles, and all of these parts are inside the file."""
    if not isinstance(starts, tuple) or not isinstance(sizes, tuple) or not 0 < len(starts) == len(sizes) < MAX_PARTS:
        return False
    return all(0 < start <= start + size <= length for start, size in zip(starts, sizes, strict=True))
