"""A tokenizer as its authors published it: the tokenizer.json of the `tokenizers` library.

Such a file has special tokens with a spelling, and two kinds of them are not alike. Control tokens (start, end,
padding, whatever else the file calls special) mean something that no text may claim: a caption or prompt that spells
"<eos>" gets its letters. Region tokens (<loc0512>, <seg003>) are text: data may contain them, and decoding keeps them.
The file's own template, truncation and padding are not used: where a sequence starts and ends is `prompt.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from vlm.config import JsonTextConfig
from vlm.errors import ConfigError
from vlm.text.regions import REGION_TOKEN


class PublishedTokenizer:
    """Text to ids as the file says, with the control tokens out of reach of any text.

    Args:
        content: a tokenizer.json, parsed.
        config: the rows of the token table and how the control tokens are spelled.

    Raises:
        ValueError: the file is no tokenizer, lacks a control token, or has more tokens than the table has rows.
    """

    def __init__(self, content: object, config: JsonTextConfig) -> None:
        control = (config.pad, config.bos, config.eos)
        marked = _marked(_backend(content), control)
        backend = _backend(marked)
        ids = backend.get_vocab()
        rows = max(ids.values()) + 1
        if rows > config.vocab_size:
            raise ValueError(f"{rows} tokens, more than vocab_size {config.vocab_size}")
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # the library's name for: as the letters they are spelled with
        self._backend, self._config = backend, config
        self.pad_id, self.bos_id, self.eos_id = (ids[token] for token in control)
        self.silenced_ids = tuple(sorted({self.pad_id, self.bos_id} - {self.eos_id}))
        self._word_end = _word_end(marked)
        self._letters = {ids[token]: self._letters_of(token) for token in control}

    @classmethod
    def read(cls, config: JsonTextConfig) -> PublishedTokenizer:
        """The tokenizer of the file at `config.path`.

        Raises:
            ConfigError: the file is missing or does not fit the config.
        """
        try:
            return cls(json.loads(Path(config.path).read_text(encoding="utf-8")), config)
        except (OSError, ValueError) as error:
            raise ConfigError(
                "the model's tokenizer cannot be used",
                where=f"model.text.path = {config.path!r}",
                got=str(error),
                fix="name the tokenizer.json published with the weights (--set model.text.path=FILE), and vocab_size, "
                "bos, eos and pad as published",
            ) from None

    @property
    def vocab_size(self) -> int:
        """Rows of the token table, as configured."""
        return self._config.vocab_size

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a control token."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [piece for i in ids for piece in self._letters.get(i, (i,))]

    def decode(self, ids: Sequence[int]) -> str:
        """The text; control tokens and rows without a token are skipped, region tokens are kept."""
        text = str(self._backend.decode(list(ids), skip_special_tokens=True))
        return text.replace(self._word_end, " ").strip() if self._word_end else text

    def to_json(self) -> str:
        """The file whole, and the config without its path."""
        config = self._config.model_dump(exclude={"path"})
        return json.dumps({**config, "tokenizer": json.loads(self._backend.to_str())})

    def _letters_of(self, token: str) -> tuple[int, ...]:
        """What a text gets that spells a control token by the merges themselves: its characters one by one."""
        control = {self.pad_id, self.bos_id, self.eos_id}
        ids = (i for char in token for i in self._backend.encode(char, add_special_tokens=False).ids)
        return tuple(i for i in ids if i not in control)


def _backend(content: object) -> Backend:
    try:
        return Backend.from_str(json.dumps(content))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"not a tokenizer of the tokenizers library: {error}") from error


def _marked(backend: Backend, control: Sequence[str]) -> dict[str, Any]:
    """The file of the same tokenizer with control tokens flagged as special and region tokens not.

    Publishers flag region tokens either way and leave a control token unflagged where nothing of theirs needs it.

    Raises:
        ValueError: a control token is missing.
    """
    missing = [token for token in dict.fromkeys(control) if backend.token_to_id(token) is None]
    if missing:
        raise ValueError(f"no token is spelled {' or '.join(map(repr, missing))}")
    backend.add_special_tokens(list(control))
    content: dict[str, Any] = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["special"] and not REGION_TOKEN.fullmatch(token["content"])
    return content


def _word_end(content: dict[str, Any]) -> str:
    """The mark at the end of a word (Sennrich et al., 2016) that a byte-level decoder leaves to whoever decodes."""
    suffix = content["model"].get("end_of_word_suffix") or ""
    return suffix if (content["decoder"] or {}).get("type") == "ByteLevel" else ""
