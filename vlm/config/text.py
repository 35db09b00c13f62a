"""Config of the tokenizer, which turns captions into token ids."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from vlm.config.base import Config


class CharsConfig(Config):
    """One token per character. Characters outside the alphabet become the unknown token."""

    kind: Literal["chars"]
    alphabet: Annotated[str, Field(min_length=1)]


class BpeConfig(Config):
    """Byte-level BPE learned from the training captions. It encodes any text without unknown tokens."""

    kind: Literal["bpe"]
    vocab_size: Annotated[int, Field(ge=260)] = 512


class JsonTextConfig(Config):
    """A published tokenizer.json of the `tokenizers` library, with its own special tokens.

    Attributes:
        path: path of tokenizer.json. It is read once: checkpoints contain a copy.
        vocab_size: rows of the token embedding table. Publishers often round it up above the number of tokens.
        bos: text of the start token.
        eos: text of the end token.
        pad: text of the padding token.
    """

    kind: Literal["json"]
    path: str = ""
    vocab_size: PositiveInt
    bos: str
    eos: str
    pad: str


TextConfig = Annotated[CharsConfig | BpeConfig | JsonTextConfig, Field(discriminator="kind")]
