"""What every tokenizer here can do, and the special tokens they share.

Special tokens have ids of their own and no spelling: no caption, whatever it contains, can produce an end token. A
place of a picture is no token at all: it is SLOT, which no vocabulary holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

SLOT = -1
"""In a sequence, a place that a picture takes."""

PAD, BOS, EOS = range(3)
NUM_SPECIAL = 3


class Tokenizer(Protocol):
    """Text to token ids and back."""

    pad_id: int
    bos_id: int
    eos_id: int
    silenced_ids: tuple[int, ...]
    """Ids that are never generated."""

    @property
    def vocab_size(self) -> int:
        """Rows the model's token table needs."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens around it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are skipped."""
        ...

    def to_json(self) -> str:
        """Everything `vlm.text.load` needs to build an equal tokenizer."""
        ...
