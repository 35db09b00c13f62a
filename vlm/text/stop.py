"""Functions that find stop strings in an answer, and count the tokens that can already be streamed."""

from __future__ import annotations

from collections.abc import Sequence

from vlm.text.base import Tokenizer


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return the character index at which the first stop string begins, or None if the text has no stop string."""
    return min((index for index in map(text.find, stop) if index >= 0), default=None)


def count_safe_tokens(tokenizer: Tokenizer, tokens: Sequence[int], sent: int, stop: Sequence[str]) -> int:
    """Return how many tokens of an unfinished answer can be streamed.

    Tokens after the start of a stop string are not counted. This rule also applies if the answer ends in the middle of
    a stop string.

    Args:
        tokenizer: tokenizer of the model.
        tokens: tokens of the answer so far.
        sent: number of tokens that were already streamed, which is the minimum of the result.
        stop: stop strings.
    """
    text = tokenizer.decode(tokens)
    end = find_stop(text, stop)
    if end is None:
        partial = (n for word in stop for n in range(1, len(word)) if text.endswith(word[:n]))
        end = len(text) - max(partial, default=0)
    while sent < len(tokens) and len(tokenizer.decode(tokens[: sent + 1])) <= end:
        sent += 1
    return sent
