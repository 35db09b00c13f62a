"""Byte-level BPE tokenizer learned from captions (Sennrich et al., 2016), built with the `tokenizers` library.

As in GPT-2, every byte is a token, so every text can be encoded. The library's ids are shifted up by the number of
special tokens, so no text is encoded as a special token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from vlm.text.base import BOS, EOS, NUM_SPECIAL, PAD


class BpeTokenizer:
    """Byte-level BPE tokenizer with `vocab_size` ids. If the corpus is small, some ids have no token."""

    pad_id, bos_id, eos_id = PAD, BOS, EOS
    suppressed_ids: tuple[int, ...] = (PAD, BOS)
    byte_ids: frozenset[int] = frozenset()
    newline_after_empty_prompt = False

    def __init__(self, backend: Backend, vocab_size: int) -> None:
        self._backend = backend
        self._vocab_size = vocab_size

    @classmethod
    def learn(cls, texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
        """Learn BPE merges from `texts` until the vocabulary, including special tokens, has `vocab_size` ids, or until
        no merge is left.
        """
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
        """Number of rows of the token embedding table, as configured."""
        return self._vocab_size

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return [i + NUM_SPECIAL for i in self._backend.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids. Bytes that are not valid UTF-8 become U+FFFD."""
        return str(self._backend.decode([i - NUM_SPECIAL for i in ids if i >= NUM_SPECIAL]))

    def unknown(self, text: str) -> list[str]:
        """Return an empty list, because BPE can encode any text."""
        return []

    def to_json(self) -> str:
        """Return JSON text with the vocabulary size and the tokenizer in the format of the `tokenizers` library."""
        return json.dumps({"kind": "bpe", "vocab_size": self._vocab_size, "merges": json.loads(self._backend.to_str())})
