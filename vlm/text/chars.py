"""One token a character: the smallest tokenizer that works, and the seeds' own."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vlm.text.base import BOS, EOS, NUM_SPECIAL, PAD

UNKNOWN = NUM_SPECIAL
UNKNOWN_CHAR = "\N{REPLACEMENT CHARACTER}"


class CharTokenizer:
    """Characters of a fixed alphabet; any other character becomes one unknown token.

    Ids: the special tokens, the unknown token, then the alphabet in order.
    """

    pad_id, bos_id, eos_id = PAD, BOS, EOS
    silenced_ids: tuple[int, ...] = (PAD, BOS)

    def __init__(self, alphabet: str) -> None:
        if len(set(alphabet)) != len(alphabet):
            raise ValueError("an alphabet names each character once")
        self.alphabet = alphabet
        self._ids = {char: index + UNKNOWN + 1 for index, char in enumerate(alphabet)}

    @property
    def vocab_size(self) -> int:
        """Special tokens, unknown, alphabet."""
        return UNKNOWN + 1 + len(self.alphabet)

    def encode(self, text: str) -> list[int]:
        """One id a character."""
        return [self._ids.get(char, UNKNOWN) for char in text]

    def decode(self, ids: Sequence[int]) -> str:
        """The characters; unknown ones as U+FFFD."""
        return "".join(
            UNKNOWN_CHAR if i == UNKNOWN else self.alphabet[i - UNKNOWN - 1] for i in ids if i >= NUM_SPECIAL
        )

    def to_json(self) -> str:
        """The alphabet."""
        return json.dumps({"kind": "chars", "alphabet": self.alphabet})
