"""Byte-level BPE learned from the corpus (Sennrich et al., 2016; GPT-2's bytes), by the `tokenizers` library.

Every byte is a token, so no text is unknown. Ids of the library are shifted by the special tokens, which keeps those
out of reach of any text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from vlm.text.base import BOS, EOS, NUM_SPECIAL, PAD


class BpeTokenizer:
    """Byte-level BPE with a table of `vocab_size` rows (the corpus may fill fewer)."""

    pad_id, bos_id, eos_id = PAD, BOS, EOS
    silenced_ids: tuple[int, ...] = (PAD, BOS)

    def __init__(self, backend: Backend, vocab_size: int) -> None:
        self._backend = backend
        self._vocab_size = vocab_size

    @classmethod
    def learn(cls, texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
        """Merge the most frequent pairs of the corpus until `vocab_size` ids, special tokens counted, are taken."""
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - NUM_SPECIAL,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend, vocab_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the token table, as configured."""
        return self._vocab_size

    def encode(self, text: str) -> list[int]:
        """Ids of the merges."""
        return [i + NUM_SPECIAL for i in self._backend.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        return str(self._backend.decode([i - NUM_SPECIAL for i in ids if i >= NUM_SPECIAL]))

    def to_json(self) -> str:
        """The merges, in the library's own form."""
        return json.dumps({"kind": "bpe", "vocab_size": self._vocab_size, "merges": json.loads(self._backend.to_str())})
