"""Where an answer stops: at the first place where its text holds a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from vlm.text.base import Tokenizer


def stop_at(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins; None where there is none."""
    return min((place for place in map(text.find, stop) if place >= 0), default=None)


def settled(tokenizer: Tokenizer, tokens: Sequence[int], given: int, stop: Sequence[str]) -> int:
    """How many tokens stand before any stop string, even one that has only begun; at least `given`."""
    text = tokenizer.decode(tokens)
    end = stop_at(text, stop)
    if end is None:
        begun = (n for word in stop for n in range(1, len(word)) if text.endswith(word[:n]))
        end = len(text) - max(begun, default=0)
    while given < len(tokens) and len(tokenizer.decode(tokens[: given + 1])) <= end:
        given += 1
    return given
