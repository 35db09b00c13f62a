"""Functions that find stop strings in an answer, and return the text that can already be streamed."""

from __future__ import annotations

from collections.abc import Sequence

from vlm.text.base import Tokenizer


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return the character index at which the first stop string begins, or None if the text has no stop string."""
    return min((index for index in map(text.find, stop) if index >= 0), default=None)


def safe_text(tokenizer: Tokenizer, tokens: Sequence[int], stop: Sequence[str]) -> str:
    """Return the text of an unfinished answer, without the ending that later tokens can change.

    Later tokens can change three kinds of endings. Adjacent byte tokens are decoded together, so a further byte token
    can change the text of all adjacent byte tokens. A replacement character (U+FFFD) at the end can become a real
    character. If the text ends with the beginning of a stop string and the rest of the stop string follows, this ending
    is cut.

    Args:
        tokenizer: tokenizer of the model.
        tokens: tokens of the answer so far. The text of these tokens contains no whole stop string.
        stop: stop strings.
    """
    length = len(tokens)
    while length and (tokens[length - 1] in tokenizer.byte_ids or not tokenizer.decode([tokens[length - 1]])):
        length -= 1
    text = tokenizer.decode(tokens[:length]).rstrip("\N{REPLACEMENT CHARACTER}")
    partial = (n for word in stop for n in range(1, len(word)) if text.endswith(word[:n]))
    return text[: len(text) - max(partial, default=0)]
