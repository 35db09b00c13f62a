"""Function that splits a caption into words, for metrics, statistics and drift."""

from __future__ import annotations

import re


def words(text: str) -> list[str]:
    """Return the lower-case words of a text without punctuation, or the symbols of a text without words (`:-)`)."""
    lowered = text.lower()
    return re.findall(r"\w+(?:'\w+)?", lowered) or re.findall(r"\S", lowered)
