"""Division of a text into words, marks and spaces, and the rule that says which spaces follow from the words around.

Most spaces of a text need no token: a word is separated from the word or the mark before it by one space, and a mark
(`,`) follows the word directly. Scripts without spaces between words, such as Han and Thai, have no space there. Only
other spaces, and missing ones, are pieces of their own, so every text can be restored exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import regex

JOIN = ""
"""Piece that stands for a space which the rule expects and the text does not have, as in `(see`."""
BOUNDARY = regex.compile(r"\b", regex.V1 | regex.WORD)
SPACES = re.compile(r"(\s+)")  # the characters for which `isspace` is true, unlike those of `regex`
NO_SPACES = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")


def split_pieces(text: str) -> Iterator[str]:
    """Yield the pieces of a text: words and marks by the word boundaries of Unicode (UAX 29), and spaces if needed."""
    previous, space = "", ""
    for run in SPACES.split(text):
        if run.isspace():
            space = run
            continue
        for piece in filter(None, BOUNDARY.split(run)):
            if space != expected_space(previous, piece):
                yield space or JOIN
            yield piece
            previous, space = piece, ""
    if space:
        yield space


def join_pieces(pieces: Sequence[str]) -> str:
    """Return the text of pieces. Any sequence of pieces has a text, and the pieces of a text give this text."""
    parts: list[str] = []
    explicit = True
    for piece in pieces:
        if piece == JOIN or piece.isspace():
            parts.append(piece)
            explicit = True
            continue
        if not explicit:
            parts.append(expected_space(parts[-1], piece))
        parts.append(piece)
        explicit = False
    return "".join(parts)


def is_word(piece: str) -> bool:
    """Return whether a piece has a letter or a digit."""
    return any(char.isalnum() or char == "_" for char in piece)


def expected_space(previous: str, piece: str) -> str:
    """Return the space between two pieces that needs no piece of its own. Before the first piece, there is none."""
    if not previous or not is_word(piece) or (NO_SPACES.match(previous[-1]) and NO_SPACES.match(piece)):
        return ""
    return " "
