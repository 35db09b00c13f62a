"""Loading of a whole published model, with a config that is derived from the files of the model's folder.

`import_weights` compares a folder with a config that a person has written. This module uses the config fields of the
family to derive a new config. The import then compares the folder with the derived config, so that a value that cannot
be derived is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlm.config import ModelConfig, read_error_message
from vlm.errors import CheckpointError
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer
from vlm.weights.config_fields import UNKNOWN, merge_settings
from vlm.weights.files import read_other_settings, read_settings
from vlm.weights.generation_keys import read_generation
from vlm.weights.load import find_family, import_weights
from vlm.weights.picture_keys import DEFAULT_SIDE, read_pictures
from vlm.weights.special_tokens import NAMES, check_special_tokens, read_tokenizer, token_text

PATH = re.compile(r"[a-z_]+(\.[a-z_]+)+")
"""Pattern of a path that names a single config value. A config field with any other path compares a computed value."""
DEFAULT_CONTEXT = 8192
"""Value that transformers assumes for `max_position_embeddings`."""


def is_published(folder: Path) -> bool:
    """Return True if the config.json of a folder comes from another library, and False for a Lakesight checkpoint."""
    return "vision" not in read_settings(folder)


def load_published(folder: Path) -> tuple[VisionLanguageModel, Tokenizer]:
    """Load a folder with a whole model of another library, such as PaliGemma. The loaded model is in evaluation mode.

    Raises:
        CheckpointError: the folder has no whole model of a known family, or its files do not fit together.
        ConfigError: the tokenizer is missing or does not fit the config.
    """
    config = derive_config(folder)
    assert config.text.kind == "json"
    tokenizer = read_tokenizer(config.text, folder, "model")
    check_special_tokens(folder, tokenizer)
    model, _ = import_weights(config, tokenizer.vocab_size, {"model": folder})
    return model, tokenizer


def derive_config(folder: Path) -> ModelConfig:
    """Derive the config of our model from the JSON files of a folder with a whole published model.

    Raises:
        CheckpointError: the folder has no whole model of a known family, or its values are not supported.
    """
    settings = read_settings(folder)
    family = find_family(settings, folder, "model")
    values: dict[str, Any] = {}
    for path, value in family.known_values(settings).items():
        if PATH.fullmatch(path) and value is not UNKNOWN:
            merge_settings(values, _nested(path, value))
    text = settings.get("text_config") or {}
    merge_settings(values, {"decoder": {"context": text.get("max_position_embeddings", DEFAULT_CONTEXT)}})
    vision = settings.get("vision_config") or {}
    pictures = read_pictures(folder, family, settings)
    values |= {
        "image": {"size": vision.get("image_size", DEFAULT_SIDE), **(pictures.values if pictures else {})},
        "text": _text(text, folder),
        "generation": read_generation(folder).model_dump(),
    }
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        raise CheckpointError(
            "the published model has settings that Lakesight does not support",
            where=str(folder),
            got=read_error_message(error),
            fix="describe the model in conf/model/NAME.yml, and import it with `lakesight import-weights`",
        ) from None


def _nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return dict(value)


def _text(text_config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    tokens = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}
    for named in (read_other_settings(folder / file) for file in NAMES):
        tokens |= {key: token for key in tokens if (token := token_text(named, f"{key}_token"))}
    return {"kind": "json", "vocab_size": text_config.get("vocab_size"), **tokens}
