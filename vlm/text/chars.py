"""Character tokenizer: one token per character of a fixed alphabet, as in seemore."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vlm.text.base import BOS, EOS, NUM_SPECIAL, PAD

UNKNOWN = NUM_SPECIAL
UNKNOWN_CHAR = "\N{REPLACEMENT CHARACTER}"


class CharTokenizer:
    """Tokenizer with one token per character of a fixed alphabet. A character outside the alphabet becomes the unknown
    token.

    The lowest ids are the special tokens, the next id is the unknown token, and all higher ids are characters.

    Raises:
        ValueError: the alphabet contains a character twice.
    """

    pad_id, bos_id, eos_id = PAD, BOS, EOS
    suppressed_ids: tuple[int, ...] = (PAD, BOS)
    byte_ids: frozenset[int] = frozenset()
    newline_after_empty_prompt = False

    def __init__(self, alphabet: str) -> None:
        if len(set(alphabet)) != len(alphabet):
            raise ValueError("the alphabet contains a character twice")
        self.alphabet = alphabet
        self._ids = {char: index + UNKNOWN + 1 for index, char in enumerate(alphabet)}

    @property
    def vocab_size(self) -> int:
        """Number of all tokens: special tokens, the unknown token and the characters of the alphabet."""
        return UNKNOWN + 1 + len(self.alphabet)

    def encode(self, text: str) -> list[int]:
        """Return one token id per character of a text."""
        return [self._ids.get(char, UNKNOWN) for char in text]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids. The unknown token becomes U+FFFD."""
        return "".join(
            UNKNOWN_CHAR if i == UNKNOWN else self.alphabet[i - UNKNOWN - 1] for i in ids if i >= NUM_SPECIAL
        )

    def unknown(self, text: str) -> list[str]:
        """Return the characters of a text that become the unknown token."""
        return [char for char in text if char not in self._ids]

    def to_json(self) -> str:
        """Return JSON text with the alphabet."""
        return json.dumps({"kind": "chars", "alphabet": self.alphabet})
