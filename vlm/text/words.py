"""Function that splits a caption into words, for metrics, statistics and drift."""

from __future__ import annotations

import unicodedata

import regex

TOKENISATION = "UAX 29 (ASCII punctuation separates)"
"""Name of the rules with which the function `words` splits a text. Change this name if a code change makes `words`
split a text differently.
"""
CHUNK = regex.compile(r"[[\w[^\x00-\x7f]]--\s]+(?:'[[\w[^\x00-\x7f]]--\s]+)?", regex.V1)
"""Pattern of a run of letters, digits, `_` and characters that are not ASCII, without white space and with at most one
apostrophe inside."""
BOUNDARY = regex.compile(r"\b", regex.V1 | regex.WORD)
GRAPHEME = regex.compile(r"\X")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation. If a text such as `:-)` has no word, return its
    symbols.

    White space and ASCII punctuation separate words, except `_` and one apostrophe inside a word. Text that is not
    ASCII is split at Unicode's word boundaries (UAX 29), so a letter keeps its combining marks. In scripts without
    spaces between words (Han, Hiragana, Thai, Lao, Khmer and Burmese), each character with its marks counts as one
    word.

    Source: https://www.unicode.org/reports/tr29/
    """
    lowered = unicodedata.normalize("NFC", text.lower())
    found = [word for chunk in CHUNK.findall(lowered) for word in _split(chunk)]
    return found or [symbol for symbol in GRAPHEME.findall(lowered) if not symbol.isspace()]


def _split(chunk: str) -> list[str]:
    if chunk.isascii():
        return [chunk]
    return [part for part in BOUNDARY.split(chunk) if any(char.isalnum() or char == "_" for char in part)]
