"""Config of the tokenizer, which turns captions into token ids."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from vlm.config.base import ADDED_LATER, Config


class CharsConfig(Config):
    """Config of a tokenizer with one token per character. Characters outside the alphabet become the unknown token.

    Attributes:
        alphabet: all characters that have a token.
    """

    kind: Literal["chars"]
    alphabet: Annotated[str, Field(min_length=1)]


class BpeConfig(Config):
    """Config of a byte-level BPE tokenizer that is learned from the training captions. BPE can encode any text.

    Attributes:
        vocab_size: largest number of tokens. 256 of the tokens are the single bytes.
    """

    kind: Literal["bpe"]
    vocab_size: Annotated[int, Field(ge=260)] = 512


class WordsConfig(Config):
    """Config of a tokenizer that is learned from the training captions and has one token per word.

    Attributes:
        vocab_size: largest number of tokens. If too many words occur at least `min_count` times, only the most frequent
            words become tokens.
        min_count: smallest number of times that a word must occur in the training captions to become a token. Rarer
            words become the unknown token.
        lowercase: whether texts are converted to lower case, so that `A` and `a` are the same word.
    """

    kind: Literal["words"]
    vocab_size: Annotated[int, Field(ge=8)] = 10_000
    min_count: PositiveInt = 2
    lowercase: bool = False


class JsonTextConfig(Config):
    """Config of a tokenizer read from a published tokenizer.json of the `tokenizers` library.

    Attributes:
        path: path of tokenizer.json. The file is needed only to create a model, because checkpoints contain a copy of
            the file.
        vocab_size: number of rows of the token embedding table. Publishers often round `vocab_size` up, so that the
            table has more rows than the tokenizer has tokens.
        bos: text of the start token.
        eos: text of the end token.
        pad: text of the padding token.
        newline_after_empty_prompt: whether a line break follows the start token even if the prompt is empty
            (PaliGemma). `import-weights` sets `newline_after_empty_prompt` in the tokenizer of the checkpoint.
    """

    kind: Literal["json"]
    path: str = ""
    vocab_size: PositiveInt
    bos: str
    eos: str
    pad: str
    newline_after_empty_prompt: Annotated[bool, ADDED_LATER] = False


TextConfig = Annotated[CharsConfig | BpeConfig | WordsConfig | JsonTextConfig, Field(discriminator="kind")]
