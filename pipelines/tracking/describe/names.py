"""Functions that name a training run by its changed settings, and return the command that repeats the run."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.config import RunConfig, load_run
from vlm.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_NAME_CHARS = 160
SECTIONS = ("model", "data", "train", "gate", "drift", "platform")
NAMED = ("train.steps", "train.seed")
"""Settings that the name of every run contains."""


def run_name(config: RunConfig) -> str:
    """Return a name such as `nano on demo, 400 steps, seed 0, train.optimizer.lr=0.001`.

    The name lists the settings of model, data and training whose values differ from the run's config files. If the name
    would be too long, it ends with the number of settings that are left out.
    """
    name = f"{config.chosen.model} on {config.chosen.data}, {config.train.steps:,} steps, seed {config.train.seed}"
    changes = [
        f"{key}={text}"
        for key, text in changed_settings(config).items()
        if key not in NAMED and key.startswith(("model.", "data.", "train."))
    ]
    for number, change in enumerate(changes):
        if len(name) + len(change) > MAX_NAME_CHARS:
            return f"{name} and {len(changes) - number} more"
        name = f"{name}, {change}"
    return name


def repeat_command(config: RunConfig, command: str = "train") -> str:
    """Return a command line that runs a command with the settings of a run, even if the run's config files have changed
    since the run."""
    words = ["lakesight", command, "--run", config.name]
    if config.chosen.platform != "local":
        words += ["--platform", config.chosen.platform]
    for key, text in changed_settings(config).items():
        words += ["--set", f"{key}={text}"]
    return shlex.join(words)


def changed_settings(config: RunConfig) -> dict[str, str]:
    """Return the settings in which a run differs from its config files, as a dict of keys and values for `--set`.

    If a config file is missing or invalid, log a message and return no settings.
    """
    try:
        files = load_run(config.name, platform=config.chosen.platform)
    except ConfigError as error:
        logger.info("it is not known which settings of run %s differ from the config files: %s", config.name, error)
        return {}
    present, before = (json.loads(each.to_json()) for each in (config, files))
    changes = (change for section in SECTIONS for change in _differences(before[section], present[section], section))
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in changes}


def _differences(before: Mapping[str, Any], present: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """Yield the key and present value of each setting that differs.

    If the `kind` of a section differs, or if a key of the earlier section is missing now, yield the whole section.
    """
    for key, value in present.items():
        old = before.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and _is_same_kind(old, value):
            yield from _differences(old, value, f"{path}.{key}")
        elif value != old:
            yield f"{path}.{key}", value


def _is_same_kind(old: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return old.get("kind") == value.get("kind") and old.keys() <= value.keys()
