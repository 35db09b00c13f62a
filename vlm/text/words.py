"""Words of a caption, as every figure here counts them."""

from __future__ import annotations

import re


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; punctuation alone where there is no word (an emoticon)."""
    lowered = text.lower()
    return re.findall(r"\w+(?:'\w+)?", lowered) or re.findall(r"\S", lowered)
