"""Separate the pixels of a picture file from its metadata, without running an image parser.

Metadata (texts, colour profiles, EXIF, XMP and their checksums) is often broken or huge, and Pillow then refuses the
whole picture. The function `split_metadata` therefore returns the file without metadata. The function also returns the
orientation, which is the only metadata value that Lakesight uses. The data of the pixels are not changed, so that the
decoder still detects damaged or missing pixels.

| format | what stays |
|---|---|
| PNG | header, palette, transparency and pixels; frames of an animation after the first are dropped |
| JPEG | all but comments and application segments; JFIF and Adobe segments stay because they decide the colours |
| WebP | pixels, transparency and frames |
| TIFF | the first picture, with the tags of TIFF_TAGS |
| AVIF | everything except the EXIF item, because rotation is stored outside of EXIF |

GIF and BMP files are not changed.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from vlm.picture.orientation import exif_orientation, raw_profile, xmp_orientation

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_HEADERS = (b"IHDR", b"PLTE", b"tRNS")
PNG_CHUNKS = (*PNG_HEADERS, b"IDAT", b"IEND")
"""Chunks of a PNG file that decide the pixels of its first frame."""
MAX_PNG_TEXT = 2**20
"""Maximum number of bytes to decompress from a text chunk when the chunk is searched for an orientation."""

JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
JPEG_ALONE = (0x01, *range(0xD0, 0xDA), *range(0xF0, 0xFE))
"""Markers in a JPEG file after which no segment length follows."""
JPEG_SCAN, JPEG_EXIF, JPEG_COMMENT = 0xDA, 0xE1, 0xFE
XMP_PREFIX = b"http://ns.adobe.com/xap/1.0/\0"

WEBP_CHUNKS = (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")
WEBP_ALPHA, WEBP_EXIF, WEBP_XMP, WEBP_ANIMATION = 0x10, 0x08, 0x04, 0x02

TIFF_TAGS = frozenset(
    [
        *(256, 257, 258, 259, 262, 266),  # tags for size, bits, compression, photometric interpretation and fill order
        *(273, 277, 278, 279, 284, 292, 293, 317, 320),  # tags for strips, samples, fax options, predictor and palette
        *(322, 323, 324, 325, 332, 334, 338, 339, 340, 341, 347),  # tags for tiles, inks, samples and JPEG tables
        *(512, 513, 514, 515, 517, 518, 519, 520, 521),  # old JPEG compression
        *(529, 530, 531, 532),  # YCbCr
    ]
)
"""Tags of a TIFF file that decide its pixels."""
TIFF_XMP = 700

AVIF_EXIF_ITEM = re.compile(rb"(infe(?:\x02.{3}.{2}|\x03.{3}.{4}).{2})Exif", re.DOTALL)


class PictureFile(NamedTuple):
    """Picture file without metadata.

    Attributes:
        data: content of the file without its metadata.
        orientation: EXIF orientation, from 1 to 8. None for AVIF, because the decoder of AVIF reads an orientation that
            is stored outside of EXIF.
    """

    data: bytes
    orientation: int | None


def split_metadata(data: bytes) -> PictureFile:
    """Return a picture file without its metadata, and the picture's orientation. Data of a format that is not in the
    table of this module are returned unchanged, with orientation 1.
    """
    if data.startswith(PNG_SIGNATURE):
        return _split_png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _split_jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _split_webp(data)
    if data[:4] in {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}:
        return _split_tiff(data)
    if data[4:12] in {b"ftypavif", b"ftypavis", b"ftypmif1"}:
        return PictureFile(_without_avif_exif(data), None)
    return PictureFile(data, 1)


class _Kept:
    """Collector of the parts of a file to keep. Adjacent parts are merged, so a file without metadata is not copied."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._view = memoryview(data)
        self._parts: list[memoryview | bytes] = []
        self._start = self._end = 0

    def keep(self, start: int, end: int) -> None:
        if start != self._end:
            self._close()
            self._start = start
        self._end = end

    def insert(self, part: bytes) -> None:
        self._close()
        self._parts.append(part)
        self._start = self._end = -1

    def _close(self) -> None:
        if self._end > self._start:
            self._parts.append(self._view[self._start : self._end])

    def join(self) -> bytes:
        if not self._parts and (self._start, self._end) == (0, len(self._data)):
            return self._data
        self._close()
        return b"".join(self._parts)


def _choose(exif: bytes, xmp: bytes) -> int:
    """Return the orientation from the EXIF data, else the orientation from the XMP data. Return 1 if both have none."""
    return exif_orientation(exif) or xmp_orientation(xmp) or 1


# ------------------------------------------------------------------------------------------------ PNG


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind, start and end of each chunk up to the end chunk. In a truncated file, the end of the last chunk
    can be beyond the end of the data.
    """
    start = len(PNG_SIGNATURE)
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        if not kind.isalpha():
            return
        yield kind, start, start + 12 + length
        if kind == b"IEND":
            return
        start += 12 + length


def _split_png(data: bytes) -> PictureFile:
    kept = _Kept(data)
    kept.keep(0, len(PNG_SIGNATURE))
    colour_type = data[25:26]
    exif = profile = xmp = b""
    has_pixels = False
    for kind, start, end in _png_chunks(data):
        content = memoryview(data)[start + 8 : end - 4]
        has_pixels |= kind == b"IDAT"
        if has_pixels and kind in PNG_HEADERS:
            continue  # these chunks must precede the pixels
        if kind == b"tRNS":
            if _is_usable_transparency(colour_type, len(content)):
                kept.insert(_png_chunk(kind, bytes(content)))
        elif kind in PNG_CHUNKS and end <= len(data):
            kept.keep(start, end)
        elif kind == b"IDAT":  # the file ends inside this chunk, perhaps after the last pixel
            kept.insert(_png_chunk(kind, data[start + 8 :]))
        elif kind == b"eXIf":
            exif = bytes(content)
        elif kind in {b"tEXt", b"zTXt", b"iTXt"}:
            keyword, text = _png_text(kind, content)
            if keyword == b"Raw profile type exif":
                profile = raw_profile(text)
            elif keyword == b"XML:com.adobe.xmp":
                xmp = text
    return PictureFile(kept.join(), _choose(exif or profile, xmp))


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _is_usable_transparency(colour_type: bytes, length: int) -> bool:
    """Return whether the length of a transparency chunk is valid for the colour type (grey, RGB or palette)."""
    return {0: length >= 2, 2: length >= 6, 3: 0 < length <= 256}.get(next(iter(colour_type), -1), False)


def _png_text(kind: bytes, content: memoryview) -> tuple[bytes, bytes]:
    """Return the keyword and the text of a text chunk. If chunks with this keyword never contain an orientation, the
    returned text is b''.
    """
    keyword, _, rest = bytes(content[:80]).partition(b"\0")
    if keyword not in {b"Raw profile type exif", b"XML:com.adobe.xmp"}:
        return keyword, b""
    rest = bytes(content[len(keyword) + 1 :])
    if kind == b"tEXt":
        return keyword, rest
    compressed = kind == b"zTXt" or rest[:1] == b"\1"
    # in an iTXt chunk, four fields precede the text: compression flag and method, language tag, translated keyword
    text = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
    return keyword, _decompress(text) if compressed else text


def _decompress(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, MAX_PNG_TEXT)
    except zlib.error:
        return b""


# ----------------------------------------------------------------------------------------------- JPEG


class JpegSegment(NamedTuple):
    """Segment of a JPEG file: its marker, the position of the marker, and where its content starts and ends."""

    marker: int
    start: int
    content: int
    end: int


def jpeg_segments(data: bytes, position: int = 2) -> Iterator[JpegSegment]:
    """Yield the segments that have a length, from a position up to and including the next scan header.

    Iteration ends at a segment that does not fit into the data.
    """
    while found := JPEG_MARKER.search(data, position):
        marker, position = found[1][0], found.end()
        if marker in JPEG_ALONE:
            continue
        end = position + int.from_bytes(data[position : position + 2], "big")
        if end < position + 2 or end > len(data):
            return
        yield JpegSegment(marker, found.end() - 2, position + 2, end)
        if marker == JPEG_SCAN:
            return
        position = end


def _split_jpeg(data: bytes) -> PictureFile:
    kept = _Kept(data)
    kept.keep(0, 2)
    rest = 2  # position after the last segment; bytes between two segments are fill bytes or garbage
    exif: list[bytes] = []  # EXIF data of more than 64 KiB has several segments
    xmp = b""
    for segment in jpeg_segments(data):
        rest = segment.end
        is_application = 0xE0 <= segment.marker <= 0xEF
        content = data[segment.content : segment.end] if is_application else b""
        if segment.marker != JPEG_COMMENT and (not is_application or content.startswith((b"JFIF\0", b"Adobe"))):
            kept.keep(segment.start, segment.end)
        elif segment.marker == JPEG_EXIF and content.startswith(b"Exif\0\0"):
            exif.append(content[6:])
        elif segment.marker == JPEG_EXIF and content.startswith(XMP_PREFIX):
            xmp = content[len(XMP_PREFIX) :]
    kept.keep(rest, len(data))
    return PictureFile(kept.join(), _choose(b"".join(exif), xmp))


# ----------------------------------------------------------------------------------------------- WebP


def _split_webp(data: bytes) -> PictureFile:
    kept = _Kept(data)
    exif = xmp = b""
    flags = data[20] if data[12:16] == b"VP8X" and len(data) >= 30 else 0
    start = 12
    while start + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, start)
        end = min(start + 8 + length + length % 2, len(data))
        if kind in WEBP_CHUNKS:
            kept.keep(start, end)
        elif kind == b"EXIF" and flags & WEBP_EXIF and not exif:
            exif = data[start + 8 : start + 8 + length]
        elif kind == b"XMP " and flags & WEBP_XMP and not xmp:
            xmp = data[start + 8 : start + 8 + length]
        start = end
    chunks = bytearray(kept.join())
    if flags and len(chunks) > 8:
        chunks[8] = flags & (WEBP_ALPHA | WEBP_ANIMATION)
    chunks += bytes(len(chunks) % 2)
    header = struct.pack("<4sI4s", b"RIFF", len(chunks) + 4, b"WEBP")
    return PictureFile(header + bytes(chunks), _choose(exif, xmp))


# ----------------------------------------------------------------------------------------------- TIFF


def _split_tiff(data: bytes) -> PictureFile:
    order, big = ("<" if data[:2] == b"II" else ">"), data[2:4] in {b"+\0", b"\0+"}
    at, size = (8, 20) if big else (4, 12)
    number, word = ("Q", "Q") if big else ("H", "I")
    try:
        (first,) = struct.unpack_from(order + word, data, at)
        (count,) = struct.unpack_from(order + number, data, first)
    except struct.error:
        return PictureFile(data, 1)
    start = first + struct.calcsize(order + number)
    end = start + count * size
    if end + struct.calcsize(order + word) > len(data):
        return PictureFile(data, _choose(data, b""))
    entries = [data[entry : entry + size] for entry in range(start, end, size)]
    kept = [entry for entry in entries if struct.unpack_from(order + "H", entry)[0] in TIFF_TAGS]
    directory = struct.pack(order + number, len(kept)) + b"".join(kept)  # zeros mean that no directory follows
    directory = directory.ljust(end + struct.calcsize(order + word) - first, b"\0")
    file = data[:first] + directory + data[first + len(directory) :]
    return PictureFile(file, _choose(data, _tiff_xmp(data, entries, order, big=big)))


def _tiff_xmp(data: bytes, entries: list[bytes], order: str, *, big: bool) -> bytes:
    for entry in entries:
        if struct.unpack_from(order + "H", entry)[0] == TIFF_XMP:
            length, offset = struct.unpack_from(order + ("QQ" if big else "II"), entry, 4)
            return data[offset : offset + length]
    return b""


# ----------------------------------------------------------------------------------------------- AVIF


def _without_avif_exif(data: bytes) -> bytes:
    """Rename the type of the EXIF item in the box `meta`, so that the decoder ignores the EXIF item."""
    start = 0
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + length if length else len(data)
        if kind == b"meta" and length:
            return data[:start] + AVIF_EXIF_ITEM.sub(rb"\1skip", data[start:end]) + data[end:]
        if end < start + 8:
            break
        start = end
    return data
