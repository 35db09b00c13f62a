"""Word tokenizer: one token per word of a vocabulary that is learned from the training captions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from vlm.config import WordsConfig
from vlm.errors import ConfigError
from vlm.text.base import BOS, EOS, NUM_SPECIAL, PAD
from vlm.text.chars import UNKNOWN, UNKNOWN_CHAR
from vlm.text.word_pieces import JOIN, is_word, join_pieces, split_pieces

FIRST_PIECE = UNKNOWN + 1


class WordTokenizer:
    """Tokenizer with one token per word, mark or space of a fixed vocabulary (`word_pieces`).

    The lowest ids are the special tokens, the next id is the unknown token, and all higher ids are pieces. A piece that
    is not in the vocabulary becomes the unknown token, which generation never produces.

    Args:
        pieces: pieces of the vocabulary.
        lowercase: whether texts are converted to lower case.

    Raises:
        ValueError: the vocabulary contains a piece twice.
    """

    pad_id, bos_id, eos_id = PAD, BOS, EOS
    suppressed_ids: tuple[int, ...] = (PAD, BOS, UNKNOWN)
    byte_ids: frozenset[int] = frozenset()
    newline_after_empty_prompt = False

    def __init__(self, pieces: Sequence[str], *, lowercase: bool) -> None:
        self.pieces, self.lowercase = tuple(pieces), lowercase
        self._ids = {piece: number for number, piece in enumerate(self.pieces, FIRST_PIECE)}
        if len(self._ids) != len(self.pieces):
            raise ValueError("the vocabulary contains a piece twice")

    @classmethod
    def learn(cls, texts: Iterable[str], config: WordsConfig) -> WordTokenizer:
        """Learn the vocabulary: the pieces that occur at least `min_count` times, and the piece JOIN.

        If the tokenizer would have more than `vocab_size` tokens, the rarest of these pieces are left out.

        Raises:
            ConfigError: there are texts, but no word occurs at least `min_count` times.
        """
        counts = Counter(piece for text in texts for piece in split_pieces(text.lower() if config.lowercase else text))
        frequent = [piece for piece, count in counts.items() if count >= config.min_count and piece != JOIN]
        if counts and not any(map(is_word, frequent)):
            raise ConfigError(
                "no word is frequent enough for the vocabulary",
                where="model.text.min_count",
                got=f"min_count {config.min_count}, but the most frequent word occurs {max(counts.values())} times",
                fix="set a smaller model.text.min_count, or use text.kind bpe",
            )
        frequent.sort(key=lambda piece: (-counts[piece], piece))
        return cls([JOIN, *frequent[: config.vocab_size - FIRST_PIECE - 1]], lowercase=config.lowercase)

    @property
    def vocab_size(self) -> int:
        """Number of all tokens: special tokens, the unknown token and the pieces of the vocabulary."""
        return FIRST_PIECE + len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Return one token id per piece of a text."""
        return [self._ids.get(piece, UNKNOWN) for piece in self._split(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids. The unknown token becomes U+FFFD."""
        known = (i for i in ids if i >= NUM_SPECIAL)
        return join_pieces([UNKNOWN_CHAR if i == UNKNOWN else self.pieces[i - FIRST_PIECE] for i in known])

    def unknown(self, text: str) -> list[str]:
        """Return the pieces of a text that become the unknown token."""
        return [piece for piece in self._split(text) if piece not in self._ids]

    def to_json(self) -> str:
        """Return JSON text with the vocabulary."""
        return json.dumps({"kind": "words", "lowercase": self.lowercase, "pieces": self.pieces}, ensure_ascii=False)

    def _split(self, text: str) -> list[str]:
        return list(split_pieces(text.lower() if self.lowercase else text))
