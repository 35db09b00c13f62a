"""Text in and out of the model: character and byte-level BPE tokenizers, and the prompt form. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as Backend

from vlm.config import CharsConfig, TextConfig
from vlm.errors import CheckpointError
from vlm.text.base import Tokenizer
from vlm.text.bpe import BpeTokenizer
from vlm.text.chars import CharTokenizer

__all__ = ["Tokenizer", "learn", "load", "save"]


def learn(config: TextConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer a config asks for; BPE reads `texts`, an alphabet does not need them."""
    if isinstance(config, CharsConfig):
        return CharTokenizer(config.alphabet)
    return BpeTokenizer.learn(texts, config.vocab_size)


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizer as JSON."""
    path.write_text(tokenizer.to_json(), encoding="utf-8")


def load(path: Path) -> Tokenizer:
    """Read a tokenizer written by `save`.

    Raises:
        CheckpointError: the file is missing or is not a tokenizer.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["kind"] == "chars":
            return CharTokenizer(content["alphabet"])
        return BpeTokenizer(Backend.from_str(json.dumps(content["merges"])), content["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "the tokenizer cannot be read",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            fix="the file is written beside the weights by training",
        ) from None
