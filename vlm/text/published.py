"""Tokenizer read from a published tokenizer.json of the `tokenizers` library.

Special tokens of a tokenizer.json have a text form. This module divides special tokens into control tokens and region
tokens. Control tokens are start, end, padding, and all further special tokens that are not region tokens. No text is
encoded to a control token, so "<eos>" in a caption or prompt is encoded as ordinary characters. Region tokens
(<loc0512>, <seg003>) are text: captions may contain region tokens, and decoding keeps region tokens. The template,
truncation and padding settings of the file are not used, because `prompt.py` builds the sequence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from vlm.config import JsonTextConfig
from vlm.errors import ConfigError
from vlm.files import read_json
from vlm.text.regions import REGION_TOKEN

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
"""Pattern of the tokens that each stand for a single byte (byte fallback)."""


class PublishedTokenizer:
    """Tokenizer read from a tokenizer.json. No text is encoded to a control token.

    Args:
        content: the parsed tokenizer.json.
        config: config section with the number of rows of the token embedding table, and the texts of the start token,
            end token and padding token.

    Raises:
        ValueError: the content is not a tokenizer, lacks the start, end or padding token, or has more tokens than the
            token embedding table has rows.
    """

    def __init__(self, content: object, config: JsonTextConfig) -> None:
        control = (config.pad, config.bos, config.eos)
        flagged = _with_special_flags(_parse(content), control)
        backend = _parse(flagged)
        ids = backend.get_vocab()
        rows = max(ids.values(), default=-1) + 1
        if rows > config.vocab_size:
            raise ValueError(f"the tokenizer has {rows} tokens, more than vocab_size {config.vocab_size}")
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # encode special tokens in a text as ordinary characters
        self._backend, self._config = backend, config
        self.pad_id, self.bos_id, self.eos_id = (ids[token] for token in control)
        self.suppressed_ids = tuple(sorted({self.pad_id, self.bos_id} - {self.eos_id}))
        self._word_suffix = _word_suffix(flagged)
        self.byte_ids = frozenset(i for token, i in ids.items() if BYTE_TOKEN.fullmatch(token))
        self.newline_after_empty_prompt = config.newline_after_empty_prompt
        self._replacements = {ids[token]: self._character_ids(token) for token in control}

    @classmethod
    def read(cls, config: JsonTextConfig) -> PublishedTokenizer:
        """Read the tokenizer from the file at `config.path`.

        Raises:
            ConfigError: the file is missing or does not fit the config.
        """
        try:
            return cls(read_json(Path(config.path)), config)
        except (OSError, ValueError) as error:
            raise ConfigError(
                "the model's tokenizer cannot be used",
                where=f"model.text.path = {config.path!r}",
                got=str(error),
                fix="set the path of the published tokenizer.json (--set model.text.path=FILE), and set vocab_size, "
                "bos, eos and pad to the published values",
            ) from None

    @property
    def vocab_size(self) -> int:
        """Number of rows of the token embedding table, as configured."""
        return self._config.vocab_size

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, which never include a control token."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [piece for i in ids for piece in self._replacements.get(i, (i,))]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text. Skip control tokens and ids without a token, and keep region tokens."""
        text = str(self._backend.decode(list(ids), skip_special_tokens=True))
        return text.replace(self._word_suffix, " ").strip() if self._word_suffix else text

    def unknown(self, text: str) -> list[str]:
        """Return an empty list. A published tokenizer has its own rule for characters without a token."""
        return []

    def to_json(self) -> str:
        """Return JSON text with the whole tokenizer.json and the config without `path`."""
        config = self._config.hashed_settings(exclude={"path"})
        return json.dumps({**config, "tokenizer": json.loads(self._backend.to_str())})

    def _character_ids(self, token: str) -> tuple[int, ...]:
        """Return the token ids that spell the text of a control token character by character.

        If BPE merges produce a control token from a text, `encode` replaces the control token with these ids.
        """
        control = {self.pad_id, self.bos_id, self.eos_id}
        ids = (i for char in token for i in self._backend.encode(char, add_special_tokens=False).ids)
        return tuple(i for i in ids if i not in control)


def _parse(content: object) -> Backend:
    """Return the tokenizer that the content of a tokenizer.json describes.

    Raises:
        ValueError: the library refuses the content, or the tokenizer would split texts at random (BPE dropout).
    """
    try:
        backend = _read_backend(content)
    except ValueError as error:
        key = _invalid_key(content)
        named = f", because of the key {key}" if key else ""
        raise ValueError(f"the file is not a tokenizer of the library `tokenizers`{named}: {error}") from error
    if dropout := getattr(backend.model, "dropout", None):
        raise ValueError(
            f"the key model.dropout is {dropout}, so equal texts would get different tokens; set the key to null"
        )
    return backend


def _read_backend(content: object) -> Backend:
    """Read a tokenizer with the library `tokenizers`, and turn each of the library's errors into a ValueError."""
    try:
        return Backend.from_str(json.dumps(content))
    except BaseException as error:
        # The library raises Exception itself, or PanicException, which is not a subclass of Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from error


def _invalid_key(content: object) -> str | None:
    """Return the first key of a tokenizer.json whose value is invalid, or None if no single value is invalid."""
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    for key, value in content.items() if isinstance(content, dict) else ():
        try:
            _read_backend({**empty, key: value})
        except ValueError:
            return str(key)
    return None


def _with_special_flags(backend: Backend, control: Sequence[str]) -> dict[str, Any]:
    """Return the tokenizer's JSON with control tokens flagged as special, and region tokens flagged as not special.

    Some published files flag region tokens as special, and some files do not flag all control tokens as special.

    Args:
        backend: tokenizer of the published file.
        control: texts of the start token, end token and padding token.

    Raises:
        ValueError: the tokenizer lacks a token of `control`.
    """
    missing = [token for token in dict.fromkeys(control) if backend.token_to_id(token) is None]
    if missing:
        names = " or ".join(map(repr, missing))
        raise ValueError(f"the tokenizer has no token {names}, neither in added_tokens nor in model.vocab")
    backend.add_special_tokens(list(control))
    content: dict[str, Any] = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["special"] and not REGION_TOKEN.fullmatch(token["content"])
    return content


def _word_suffix(content: dict[str, Any]) -> str:
    """Return the suffix that marks the last BPE token of a word (Sennrich et al., 2016). Return an empty text if the
    tokenizer has no suffix, or if the decoder removes the suffix. Only byte-level decoders keep the suffix.
    """
    suffix = content["model"].get("end_of_word_suffix") or ""
    return suffix if (content["decoder"] or {}).get("type") == "ByteLevel" else ""
