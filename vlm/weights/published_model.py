"""Loading of a whole published model, with a config that is derived from the files of the model's folder.

`import_weights` compares a folder with a config that a person has written. This module uses the config fields of the
family to derive a new config. A value that cannot be derived gets our default value. The import then compares the
folder with the derived config, and fails if a value differs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlm.config import JsonTextConfig, ModelConfig
from vlm.config.problems import problem_text
from vlm.errors import CheckpointError, ConfigError
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer
from vlm.weights.config_fields import UNKNOWN, merge_settings, sides_of
from vlm.weights.family import Family
from vlm.weights.files import WeightFiles, read_other_settings, read_settings
from vlm.weights.generation_keys import read_generation
from vlm.weights.load import find_family, import_weights, size_problems
from vlm.weights.picture_keys import DEFAULT_SIDE, PREPROCESSOR, read_pictures
from vlm.weights.special_tokens import NAMES, check_special_tokens, read_tokenizer, token_text

log = logging.getLogger(__name__)

PATH = re.compile(r"[a-z_]+(\.[a-z_]+)+")
"""Pattern of a path that names a single config value. If a config field has any other path, the field compares a
computed value."""
OTHER_SOURCES = {
    "image.size": "vision_config.image_size in config.json",
    "text.vocab_size": "text_config.vocab_size in config.json",
    "decoder.context": "text_config.max_position_embeddings in config.json",
    "generation.max_new_tokens": "max_new_tokens in generation_config.json or config.json",
    **{f"text.{key}": f"{key}_token in tokenizer_config.json" for key in ("bos", "eos", "pad")},
}
"""Dict from the path of a value in our config to the keys of published files that determine the value. The dict
contains only values without a config field."""
DEFAULT_CONTEXT = 8192
"""Value that transformers assumes for `max_position_embeddings`."""


def is_published(folder: Path) -> bool:
    """Return True if the config.json of a folder comes from another library, and False for a Lakesight checkpoint.

    Raises:
        CheckpointError: config.json is missing, cannot be read, or is not a JSON object.
    """
    return "vision" not in read_settings(folder)


def load_published(folder: Path) -> tuple[VisionLanguageModel, Tokenizer]:
    """Load a folder with a whole model of another library, such as PaliGemma. The loaded model is in evaluation mode.

    Raises:
        CheckpointError: the folder has no whole model of a known family, or its files do not fit together.
        ConfigError: the tokenizer is missing or does not fit the config.
    """
    config = derive_config(folder)
    assert config.text.kind == "json"
    tokenizer = _read_tokenizer(config.text, folder)
    check_special_tokens(folder, tokenizer)
    model, _ = import_weights(config, tokenizer.vocab_size, {"model": folder})
    return model, tokenizer


def _read_tokenizer(config: JsonTextConfig, folder: Path) -> Tokenizer:
    try:
        return read_tokenizer(config, folder, "model")
    except ConfigError as error:
        tokens = [f"{key}_token {getattr(config, key)!r}" for key in ("bos", "eos", "pad")]
        raise ConfigError(
            "the tokenizer of the published model cannot be used",
            where=str(folder / "tokenizer.json"),
            got=f"{error.got}; config.json has vocab_size {config.vocab_size}, and {' or '.join(NAMES)} has "
            + ", ".join(tokens),
            fix="download tokenizer.json and the other JSON files of the same model and version",
        ) from None


def derive_config(folder: Path) -> ModelConfig:
    """Derive the config of our model from the JSON files of a folder with a whole published model.

    Raises:
        CheckpointError: the folder has no whole model of a known family, its files do not fit together, or its values
            are not supported.
    """
    settings = read_settings(folder)
    family = find_family(settings, folder, "model")
    if problems := size_problems(family, settings, WeightFiles(folder)):
        raise CheckpointError(
            "the config of the weights does not fit the weight files",
            where=str(folder),
            got=problems,
            fix="download config.json and the weight files of the same model and version",
        )
    values: dict[str, Any] = {}
    for path, value in family.known_values(settings).items():
        if PATH.fullmatch(path) and value is not UNKNOWN:
            merge_settings(values, _nested(path, value))
    text = settings.get("text_config") or {}
    merge_settings(values, {"decoder": {"context": text.get("max_position_embeddings", DEFAULT_CONTEXT)}})
    vision = settings.get("vision_config") or {}
    pictures = read_pictures(folder, family, settings)
    if pictures is None or not pictures.values:
        log.warning("%s has no %s, so pictures are preprocessed with the default settings", folder, PREPROCESSOR)
    values |= {
        "image": {"size": sides_of(vision.get("image_size", DEFAULT_SIDE))[0], **(pictures.values if pictures else {})},
        "text": _text(text, folder),
        "generation": read_generation(folder).model_dump(),
    }
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        raise CheckpointError(
            "the published model has settings that Lakesight does not support",
            where=str(folder),
            got=_describe_problems(error, family),
            fix="describe the model in conf/model/NAME.yml, and import it with `lakesight import-weights`",
        ) from None


def _describe_problems(error: ValidationError, family: Family) -> list[str]:
    """Return one sentence for each invalid value, with the keys of the published files that determine the value."""
    keys: dict[str, str] = dict(OTHER_SOURCES)
    for field in family.fields:
        if field.path and field.keys:
            others = f"{keys[field.path]}, " if field.path in keys else ""
            keys[field.path] = f"{others}{field.keys} in config.json"
    sentences = []
    for problem in error.errors():
        place, message = [str(part) for part in problem["loc"]], problem_text(problem)
        at_place = max((path for path in keys if _contains(place, path)), key=len, default=None)
        named = [key for path, key in keys.items() if path in message or path == at_place]
        source = f" ({'; '.join(named)})" if named else ""
        sentences.append(f"{'.'.join(place)}: {message}{source}" if place else f"{message}{source}")
    return sentences


def _contains(place: list[str], path: str) -> bool:
    """Return True if a pydantic error is in the value at the dotted path, or in a part of this value.

    The place also contains the `kind` of a section: for `text.vocab_size`, the place is `text.json.vocab_size`.
    """
    parts = iter(place)
    return all(name in parts for name in path.split("."))


def _nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return dict(value)


def _text(text_config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    tokens = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}
    for file in NAMES:
        named = read_other_settings(folder / file)
        tokens |= {key: token for key in tokens if (token := token_text(named, f"{key}_token", folder / file))}
    return {"kind": "json", "vocab_size": text_config.get("vocab_size"), **tokens}
