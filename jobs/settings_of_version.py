"""Check and apply overrides of model settings in commands that use a registered version or a checkpoint.

Training fixes all settings of a version except the generation settings (`model.generation`), which a command can
override. A command refuses an override that it cannot apply, instead of ignoring it.
"""

from __future__ import annotations

import logging
import shlex
from typing import Any

from jobs.common import Job
from jobs.generation_options import GENERATION, is_generation
from pipelines.config import model_overrides
from pipelines.driver.model_files import ModelFiles
from pipelines.errors import UserError
from vlm.config import GenerationConfig, ModelConfig
from vlm.config.model import settings_without_effect

logger = logging.getLogger(__name__)


def decoding_settings(job: Job, fixed: ModelConfig, name: str) -> GenerationConfig:
    """Return the generation settings of a model, changed by the overrides `model.generation.*` of the command.

    If a changed setting has no effect together with the other settings, a warning names the setting.

    Args:
        job: the running command with its overrides.
        fixed: model config with which the version or checkpoint was trained.
        name: name of the version or checkpoint, for the error message.

    Raises:
        UserError: an override changes a setting that training has fixed, a value is invalid or does not fit the model,
            or the settings exclude each other.
    """
    for key in _different_keys(job, fixed):
        raise _refused(job, key, name, "only training sets it")
    settings = fixed.generation.changed(_generation_changes(job), where=name)
    fixed.with_generation(settings, where=name)
    for sentence in settings_without_effect(settings, fixed.generation):
        logger.warning("%s", sentence)
    return settings


def with_overrides(job: Job, model: ModelFiles) -> ModelFiles:
    """Return the version with the settings for a measurement: its own generation settings, changed by the overrides.

    Without overrides, a version is measured at temperature 0. If the overrides do not set the temperature, it stays 0,
    so that only the overridden settings differ from the measurement without overrides.

    Raises:
        UserError: an override changes a setting that training has fixed, or the settings exclude each other.
    """
    fixed = model.read_config()
    evaluated = fixed.generation.changed({"temperature": 0.0})
    measured = fixed.model_copy(update={"generation": evaluated})
    settings = decoding_settings(job, measured, f"{model.name}/{model.version}")
    return model.model_copy(update={"settings": settings}) if settings != evaluated else model


def require_settings_of_version(job: Job, fixed: ModelConfig, name: str) -> None:
    """Check that no override changes a setting of the model, because the promotion gate uses the version's own
    settings.

    Raises:
        UserError: an override changes a setting of the model.
    """
    for key in _different_keys(job, fixed):
        raise _refused(job, key, name, "only training sets it")
    chosen = fixed.generation.changed(_generation_changes(job), where=name)
    if chosen != fixed.generation:
        given = [key for key in _keys(job) if is_generation(key)]
        differing = _keys_that_differ(given, fixed, fixed.model_copy(update={"generation": chosen}))
        followed = (
            "only `lakesight evaluate`, `caption`, `ask` and `serve` use this setting; the gate uses the version's own "
            "settings"
        )
        raise _refused(job, (differing or given)[0], name, followed)


def changes_model(job: Job) -> bool:
    """Return whether the command has an override `model.*`."""
    return any(key.partition(".")[0] == "model" for key in _keys(job))


def _keys(job: Job) -> list[str]:
    return [override.partition("=")[0].strip() for override in job.overrides]


def _generation_changes(job: Job) -> dict[str, Any]:
    changes = model_overrides(job.overrides).get("generation", {})
    if not isinstance(changes, dict):
        raise UserError(
            "the generation settings cannot be used",
            got=f"--set {GENERATION}={changes}",
            fix=f"set one setting, such as --set {GENERATION}.max_new_tokens=20",
        )
    return changes


def _different_keys(job: Job, fixed: ModelConfig) -> list[str]:
    """Return the keys of the overrides `model.*` whose value differs from the version's own value. Keys of generation
    settings are left out.
    """
    keys = [key for key in _keys(job) if key.partition(".")[0] == "model" and not is_generation(key)]
    return _keys_that_differ(keys, fixed, job.config.model)


def _keys_that_differ(keys: list[str], fixed: ModelConfig, chosen: ModelConfig) -> list[str]:
    """Return those of the keys `model.*` whose values in the two configs differ."""
    own, other = {"model": fixed.model_dump()}, {"model": chosen.model_dump()}
    return [key for key in keys if _value_at(other, key) != _value_at(own, key)]


def _value_at(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def _refused(job: Job, key: str, name: str, reason: str) -> UserError:
    given = [each for each in job.overrides if each.partition("=")[0].strip() == key][-1]  # the last override wins
    return UserError(
        "this command cannot change this setting of a trained model",
        where=name,
        got=f"--set {given}",
        fix=f"{reason}: train a version with `lakesight train --run {job.config.name} --set {shlex.quote(given)}`",
    )
