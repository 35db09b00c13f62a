"""Functions that decide whether a value of a row is missing, and convert a value to an id or a text.

A missing value never becomes a text such as "None". The number NaN is a missing value, but the text `nan` in a CSV
file is not.
"""

from __future__ import annotations

import re
import unicodedata
from datetime import date, time
from decimal import Decimal
from numbers import Number
from uuid import UUID

import numpy as np
import regex

from pipelines.executor.ingest.outcome import Refused

MAX_ID_CHARS = 256
MAX_SHRINKAGE = 4
"""Largest number of characters that the Unicode form NFC composes into one character."""
CONTROL = regex.compile(r"[\p{Cc}\p{Zl}\p{Zp}]")
INVISIBLE = regex.compile(r"[\s\p{Cc}\p{Default_Ignorable_Code_Point}]*")
"""Pattern of a text without visible characters.

The characters with the Unicode property `Default_Ignorable_Code_Point`, such as the zero-width space, are not visible.
"""
SPACES = (
    "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000\u200b\ufeff"
)
"""Characters that count as white space: those of `str.isspace`, the zero-width space and the byte-order mark."""
SURROGATE = re.compile(r"[\ud800-\udfff]")


def is_missing(value: object) -> bool:
    """Return whether a value is missing.

    A value is missing if it is None, NaN, NaT or pandas' NA. A text without a visible character is missing too, and so
    are empty bytes, bytes that contain only white space, and a list whose elements are all missing.
    """
    if value is None:
        return True
    if isinstance(value, str):
        return INVISIBLE.fullmatch(value) is not None
    if isinstance(value, bytes):
        return not value.strip()
    if isinstance(value, list | tuple):
        return all(is_missing(element) for element in value)
    return not isinstance(value, np.ndarray | dict) and _is_missing_scalar(value)


def _is_missing_scalar(value: object) -> bool:
    if isinstance(value, Decimal):
        return value.is_nan()  # a comparison with a signaling NaN raises an exception
    # NaN and NaT differ from themselves. A comparison with pandas' NA is NA, which is neither true nor false.
    return type(value).__name__ == "NAType" or bool(value != value)  # noqa: PLR0124


def to_text(value: object, what: str) -> str:
    """Convert a value to a text. A missing value becomes an empty text. Invalid UTF-8 in bytes becomes U+FFFD.

    Args:
        value: value from a row of a source, of any type.
        what: description of the value for the error message, such as "column title".

    Raises:
        Refused: with the reason malformed_record (the value is an infinite number, or is not a text, bytes, number,
            date, time or UUID).
    """
    if is_missing(value):
        return ""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if not isinstance(value, str | Number | np.generic | date | time | UUID):
        raise Refused("decode", "malformed_record", f"{what} holds a {type(value).__name__}, neither text nor number")
    _require_finite(value, what)
    return replace_surrogates(str(value))


def _require_finite(value: object, what: str) -> None:
    """Refuse an infinite number. Some JSON writers write `Infinity` or `1e400` if a number is missing or too large."""
    if isinstance(value, float | np.floating | Decimal) and abs(value) == float("inf"):
        raise Refused("decode", "malformed_record", f"{what} is an infinite number")


def replace_surrogates(text: str) -> str:
    """Join pairs of UTF-16 surrogates. Replace lone surrogates, which UTF-8 cannot encode, by U+FFFD."""
    if SURROGATE.search(text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def trim(text: str) -> str:
    """Remove white space, zero-width spaces and byte-order marks from both ends of a text."""
    return text.strip(SPACES)


def normalize_id(value: object) -> str | None:
    """Convert a value to an id, a text in Unicode NFC without control characters. Return None for a missing value.

    The number 7.0 becomes the id `7`, because many tools convert a column of integers with missing values to floats.
    The text `7.0` is not changed.

    Raises:
        Refused: with the reason malformed_record (`to_text` refuses the value, or the id has a control character or
            more than MAX_ID_CHARS characters).
    """
    if is_missing(value):
        return None
    text = bytes_to_id(value) if isinstance(value, bytes) else trim(to_text(_to_integer(value), "the id"))
    if len(text) <= MAX_SHRINKAGE * MAX_ID_CHARS:
        text = unicodedata.normalize("NFC", text)
    if len(text) > MAX_ID_CHARS:
        raise Refused("decode", "malformed_record", f"the id has {len(text)} characters, at most {MAX_ID_CHARS}")
    if control := CONTROL.search(text):
        raise Refused("decode", "malformed_record", f"the id has the control character U+{ord(control[0]):04X}")
    return text or None  # the text is empty if the bytes contain, for example, only a byte-order mark


def bytes_to_id(value: bytes) -> str:
    """Decode bytes as UTF-8. If the bytes are not text (such as a binary UUID), return their hexadecimal digits."""
    try:
        text = trim(value.decode())
    except UnicodeDecodeError:
        return value.hex()
    return value.hex() if CONTROL.search(text) else text


def _to_integer(value: object) -> object:
    """Convert a number with an integer value, such as 7.0, to an integer. Return any other value unchanged.

    Raises:
        Refused: with the reason malformed_record (the number is infinite).
    """
    if isinstance(value, np.floating):
        value = float(value)
    if not isinstance(value, float | Decimal):
        return value
    _require_finite(value, "the id")
    return int(value) if value == int(value) else value
