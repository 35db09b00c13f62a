"""Functions that recognise the encoding of a text by its first bytes, and decode the text."""

from __future__ import annotations

import codecs

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    # UTF-32 is tried before UTF-16, because the byte-order mark of UTF-32 begins with the mark of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decode_text(content: bytes) -> str:
    """Decode a text by its byte-order mark, else as UTF-16 if its zero bytes suggest UTF-16, else as UTF-8.

    Invalid bytes become U+FFFD.
    """
    encoding, mark = encoding_of(content)
    return content[mark:].decode(encoding, "replace")


def encoding_of(start: bytes) -> tuple[str, int]:
    """Return the encoding of a text that begins with the bytes `start`, and the length of the byte-order mark."""
    for mark, encoding in BYTE_ORDER_MARKS:
        if start.startswith(mark):
            return encoding, len(mark)
    return _unmarked_encoding(start), 0


def _unmarked_encoding(content: bytes) -> str:
    """Recognise UTF-16 without a byte-order mark by the positions of the zero bytes in the first 2,000 bytes.

    Return utf-16-be if most bytes at even positions and few bytes at odd positions are zero. Return utf-16-le if most
    bytes at odd positions and few bytes at even positions are zero. Otherwise, or if the number of bytes is odd, return
    utf-8.
    """
    even, odd = content[0:2000:2], content[1:2000:2]
    if len(content) % 2 or not odd:
        return "utf-8"
    if odd.count(0) > len(odd) / 2 and even.count(0) < odd.count(0) / 8:
        return "utf-16-le"
    return "utf-16-be" if even.count(0) > len(even) / 2 and odd.count(0) < even.count(0) / 8 else "utf-8"
