"""Split of a caption into words, shared by metrics, statistics and drift."""

from __future__ import annotations

import re


def words(text: str) -> list[str]:
    """Return the lower-case words of a text without punctuation, or its symbols if it has no words (an emoticon)."""
    lowered = text.lower()
    return re.findall(r"\w+(?:'\w+)?", lowered) or re.findall(r"\S", lowered)
