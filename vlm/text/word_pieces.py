"""Division of a text into pieces. The pieces are words, marks, and those spaces that a simple rule does not predict.

The rule expects one space before each word and no space before a mark (`,`), so most spaces of a text need no piece.
Between two words of scripts without spaces, such as Han and Thai, the rule expects no space. A space that the rule does
not expect is a piece, and the piece JOIN marks the place of an expected space that is missing. The pieces of a text
therefore restore the text exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import regex

JOIN = ""
"""Piece that marks a place where the rule expects a space and the text has none, such as the place after `(` in `(see`.
"""
BOUNDARY = regex.compile(r"\b", regex.V1 | regex.WORD)
# In `re`, but not in `regex`, `\s` matches exactly the characters for which `isspace` is True.
SPACES = re.compile(r"(\s+)")
NO_SPACES = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")


def split_pieces(text: str) -> Iterator[str]:
    """Yield the pieces of a text: words and marks (split as in Unicode's UAX 29), and the spaces that need a piece."""
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
    """Join any sequence of pieces to a text. The pieces that `split_pieces` yields are joined to the original text."""
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
    """Return whether a piece contains a letter, a digit or an underscore."""
    return any(char.isalnum() or char == "_" for char in piece)


def expected_space(previous: str, piece: str) -> str:
    """Return what the spacing rule expects between the pieces `previous` and `piece`: a space or an empty string. If
    `piece` is the first piece, `previous` is empty.
    """
    if not previous or not is_word(piece) or (NO_SPACES.match(previous[-1]) and NO_SPACES.match(piece)):
        return ""
    return " "
