"""Function that splits a caption into words, for metrics, statistics and drift."""

from __future__ import annotations

import re


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation. Return the symbols if there is no word (`:-)`)."""
    lowered = text.lower()
    return re.findall(r"\w+(?:'\w+)?", lowered) or re.findall(r"\S", lowered)
