"""Reading of model configs that are given as a name, a file, a mapping or an object."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlm.config.base import read_error_message
from vlm.config.model import ModelConfig
from vlm.config.yaml_file import YamlProblem, read_mapping
from vlm.errors import ArgumentError, ConfigError, did_you_mean

MAX_SHOWN = 255
"""Largest number of characters of a name or path that an error message shows."""
OWN_MODELS = Path("conf/model")
"""Folder with the user's own model configs, relative to the working directory."""
NAME = re.compile(r"[A-Za-z0-9][\w-]*")
"""Pattern of the name of a model, which is the name of the model's YAML file without `.yml`."""


def read_model_config(config: ModelConfig | Mapping[str, Any] | str | Path) -> ModelConfig:
    """Return a model config that is given as a `ModelConfig`, as a mapping, as a name or as the path of a YAML file.

    A text without a suffix is the name of a model, unless a file of this name exists. A model in `conf/model/` of the
    working directory takes precedence over a model of the same name that ships with Lakesight.

    Raises:
        ArgumentError: the config is not a `ModelConfig`, a mapping, a text or a path.
        ConfigError: no model has this name, the file cannot be read, or the config is invalid.
    """
    if isinstance(config, ModelConfig):
        return config
    if not isinstance(config, Mapping | str | Path):
        raise ArgumentError(
            "the argument `config` cannot be used",
            got=type(config).__name__,
            fix="pass a vlm.ModelConfig, a dict with the same keys, the name of a model, or the path of a YAML file",
        )
    where = "model config" if isinstance(config, Mapping) else _shorten(config)
    try:
        settings = config if isinstance(config, Mapping) else read_mapping(_find_file(config))
        return ModelConfig.model_validate(settings)
    except (YamlProblem, ValidationError) as error:
        got = read_error_message(error, ModelConfig) if isinstance(error, ValidationError) else str(error)
        raise ConfigError(
            "the model config cannot be used",
            where=where,
            got=got,
            fix="correct the config: docs/models.md lists the keys and their values",
        ) from None


def _find_file(config: str | Path) -> Path:
    """Return the path of the YAML file of a model.

    Raises:
        ConfigError: the file does not exist.
    """
    try:
        if isinstance(config, str) and NAME.fullmatch(config) and not Path(config).is_file():
            for folder in (OWN_MODELS, shipped_models()):
                if (folder / f"{config}.yml").is_file():
                    return folder / f"{config}.yml"
        if Path(config).exists():
            return Path(config)
    except OSError:  # such as a text that is too long for a name: `read_mapping` reports the error
        return Path(config)
    names = sorted(path.stem for path in shipped_models().glob("*.yml"))
    raise ConfigError(
        "the model config cannot be used",
        where=_shorten(config),
        got=f"no such file or model{did_you_mean(str(config), names)}",
        fix=f"pass the path of an existing YAML file, or the name of a model that ships: {', '.join(names)}",
    )


def _shorten(config: str | Path) -> str:
    """Return the name or path of a config for an error message. The text may be a whole YAML file, by mistake."""
    return str(config).partition("\n")[0][:MAX_SHOWN]


def shipped_models() -> Path:
    """Return the folder with the YAML files of the models that ship with Lakesight.

    In an installed package the folder is next to this module, and in a checkout the folder is `conf/model/`.
    """
    installed = Path(__file__).parent / "models"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "conf" / "model"
