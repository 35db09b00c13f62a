"""Protocol of the tokenizers, the special token ids, and the id that marks an image slot.

No text is encoded to a start, end or padding token, so a caption cannot contain an end token. An image slot is not a
token. The id of an image slot is SLOT (-1), and no vocabulary contains this id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

SLOT = -1
"""Id of a sequence position that holds a picture feature instead of a token."""

PAD, BOS, EOS = range(3)
NUM_SPECIAL = 3


class Tokenizer(Protocol):
    """Protocol of a tokenizer, which encodes text to token ids and decodes token ids to text."""

    pad_id: int
    bos_id: int
    eos_id: int
    suppressed_ids: tuple[int, ...]
    """Token ids that generation never produces."""
    byte_ids: frozenset[int]
    """Ids of the tokens that each stand for one byte. `decode` joins adjacent byte tokens before it decodes them."""
    newline_after_empty_prompt: bool
    """True if a line break follows the start token even if the prompt is empty."""

    @property
    def vocab_size(self) -> int:
        """Number of rows that the token embedding table needs."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text, and skip special tokens."""
        ...

    def unknown(self, text: str) -> list[str]:
        """Return the characters or words of a text that become the unknown token, with repeats."""
        ...

    def to_json(self) -> str:
        """Return the JSON text from which `vlm.text.load` builds the same tokenizer."""
        ...
