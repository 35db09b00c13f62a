"""Text that the model reads and writes: tokenizers, prompts, stop strings, regions in answers and words of captions.

Import `learn`, `save`, `load` and the `Tokenizer` protocol from `vlm.text`, and any other name from its own module.
Start reading in `base.py` (the protocol), then read `prompt.py` (the layout of a sequence); no module of this package
imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as Backend

from vlm.config import CharsConfig, JsonTextConfig, TextConfig, WordsConfig
from vlm.errors import CheckpointError
from vlm.files import read_json
from vlm.text.base import Tokenizer
from vlm.text.bpe import BpeTokenizer
from vlm.text.chars import CharTokenizer
from vlm.text.published import PublishedTokenizer
from vlm.text.word_tokenizer import WordTokenizer

__all__ = ["Tokenizer", "learn", "load", "save"]


def learn(config: TextConfig, texts: Iterable[str]) -> Tokenizer:
    """Learn BPE merges or words from `texts`, or build a tokenizer from an alphabet or from a published file.

    Raises:
        ConfigError: the published file is missing or does not fit the config, or no word is frequent enough.
        ValueError: the alphabet contains a character twice.
    """
    if isinstance(config, CharsConfig):
        return CharTokenizer(config.alphabet)
    if isinstance(config, JsonTextConfig):
        return PublishedTokenizer.read(config)
    if isinstance(config, WordsConfig):
        return WordTokenizer.learn(texts, config)
    return BpeTokenizer.learn(texts, config.vocab_size)


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizer to a JSON file."""
    path.write_text(tokenizer.to_json(), encoding="utf-8")


def load(path: Path) -> Tokenizer:
    """Read a tokenizer written by `save`.

    Raises:
        CheckpointError: the file is missing or is not a tokenizer.
    """
    try:
        content = read_json(path)
        if content["kind"] == "chars":
            return CharTokenizer(content["alphabet"])
        if content["kind"] == "words":
            return WordTokenizer(content["pieces"], lowercase=content["lowercase"])
        if content["kind"] == "json":
            tokenizer = content.pop("tokenizer")
            return PublishedTokenizer(tokenizer, JsonTextConfig.model_validate(content))
        return BpeTokenizer(Backend.from_str(json.dumps(content["merges"])), content["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "the tokenizer cannot be read",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            fix="restore tokenizer.json of this checkpoint: training and import-weights write it next to the weights",
        ) from None
