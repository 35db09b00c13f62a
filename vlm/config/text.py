"""Text: how captions become token ids."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from vlm.config.base import Config


class CharsConfig(Config):
    """One token a character. Characters outside the alphabet become the unknown token."""

    kind: Literal["chars"]
    alphabet: Annotated[str, Field(min_length=1)]


class BpeConfig(Config):
    """Byte-level BPE learned from the training captions: no unknown characters, any language."""

    kind: Literal["bpe"]
    vocab_size: Annotated[int, Field(ge=260)] = 512


class JsonTextConfig(Config):
    """A tokenizer of the `tokenizers` library as published (tokenizer.json), with its own special tokens.

    Attributes:
        path: the file; a checkpoint holds a copy and needs it no more.
        vocab_size: rows of the token table, which publishers round up.
        bos: spelling of the start token.
        eos: spelling of the end token.
        pad: spelling of the padding token.
    """

    kind: Literal["json"]
    path: str = ""
    vocab_size: PositiveInt
    bos: str
    eos: str
    pad: str


TextConfig = Annotated[CharsConfig | BpeConfig | JsonTextConfig, Field(discriminator="kind")]
