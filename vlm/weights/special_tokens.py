"""Functions that compare the start and end tokens of a published model with the tokenizer of our model.

Several files of a folder can contain start and end tokens: config.json, generation_config.json, tokenizer_config.json
and special_tokens_map.json. If a file disagrees with the model's tokenizer, an import refuses the folder, because
answers would begin or end with a different token than in the other library.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm import text
from vlm.config import JsonTextConfig
from vlm.errors import CheckpointError
from vlm.text.base import Tokenizer
from vlm.weights.family import Part
from vlm.weights.files import read_other_settings, read_settings
from vlm.weights.generation_keys import GENERATION
from vlm.weights.load import find_family

NAMES = ("tokenizer_config.json", "special_tokens_map.json")


def read_tokenizer(config: JsonTextConfig, folder: Path, part: Part) -> Tokenizer:
    """Read the tokenizer file at `config.path`, or by default the `tokenizer.json` of a published folder.

    `part` is the part of the model that gets its weights from this folder: the whole model or the decoder.

    Raises:
        CheckpointError: the folder's config.json cannot be read or belongs to no known family.
        ConfigError: the tokenizer is missing or does not fit the config.
    """
    family = find_family(read_settings(folder), folder, part)
    path = config.path or str(folder / "tokenizer.json")
    changes = {"path": path, "newline_after_empty_prompt": family.newline_after_empty_prompt}
    return text.learn(config.model_copy(update=changes), ())


def check_special_tokens(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Compare the start and end tokens of a folder with a tokenizer. Return each compared key with the name of its
    file.

    Raises:
        CheckpointError: the start or end token in a file of the folder is not the tokenizer's start or end token.
    """
    found = list(_named_tokens(folder, json.loads(tokenizer.to_json())))
    ours = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    wrong = {key[:3] for _, key, value in found if not _equal(value, ours[key[:3]])}
    different = [f"{key} in {file} is {value!r}" for file, key, value in found if key[:3] in wrong]
    if different:
        raise CheckpointError(
            "the start or end tokens in the folder differ from those of the model's tokenizer",
            where=str(folder),
            got=f"{'; '.join(different)}; the model has bos {ours['bos']} and eos {ours['eos']}",
            fix="set text.bos and text.eos of the model config, or make the files of the folder agree: a model has one "
            "start token and one end token",
        )
    return [f"{file}: {key}" for file, key, _ in found]


def _named_tokens(folder: Path, tokenizer: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield the file, the key and the value of each start and end token. If the value is a text, yield the id of the
    token instead.
    """
    config = read_settings(folder)
    sections = {"": config, "text_config.": config.get("text_config") or {}}
    for section, settings in sections.items():
        yield from _ids("config.json", settings, section)
    yield from _ids(GENERATION, read_other_settings(folder / GENERATION))
    if tokenizer["kind"] != "json":
        return
    ids = _token_ids(tokenizer["tokenizer"])
    for name in NAMES:
        settings = read_other_settings(folder / name)
        for key in ("bos_token", "eos_token"):
            token = token_text(settings, key, folder / name)
            if token is not None:
                yield name, key, ids.get(token, token)


def token_text(settings: Mapping[str, Any], key: str, file: Path) -> str | None:
    """Return the text of a special token that a file stores as a string or an object. Return None if the file has no
    value for the key.

    Args:
        settings: content of the file.
        key: key of the token.
        file: path of the file, for the error message.

    Raises:
        CheckpointError: the token is neither a text nor an object with a text `content`.
    """
    token = settings.get(key)
    if token is None:
        return None
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str):
        raise CheckpointError(
            "a special token in the folder is not a text",
            where=str(file),
            got=f"{key} in {file.name} is {token!r}",
            fix="download the file again: a token is a text, or an object whose key content has the text",
        )
    return text


def _ids(file: str, settings: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, str, Any]]:
    for key in ("bos_token_id", "eos_token_id"):
        if settings.get(key) is not None:
            yield file, key if not section else f"{key} of {section.rstrip('.')}", settings[key]


def _token_ids(content: Mapping[str, Any]) -> dict[str, int]:
    vocab = content["model"].get("vocab") or {}
    pairs = vocab.items() if isinstance(vocab, Mapping) else ((entry[0], id_) for id_, entry in enumerate(vocab))
    return {**dict(pairs), **{token["content"]: token["id"] for token in content.get("added_tokens") or ()}}


def _equal(value: Any, ours: int) -> bool:
    """Return True if a value is our token id, or a list that contains only our token id."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(type(each) is int and each == ours for each in values)
