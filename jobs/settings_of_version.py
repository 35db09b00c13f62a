"""Overrides of model settings in commands that use a registered version or a checkpoint.

Training has fixed the settings of a version. Only its decoding settings (`model.generation`) can be changed afterwards.
An override is followed or refused, and never ignored.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from jobs.common import Job
from pipelines.errors import UserError
from vlm.config import GenerationConfig, ModelConfig

GENERATION = "model.generation"
TRAIN_AGAIN = "it is fixed by training: train a run with this setting"


def decoding_settings(job: Job, fixed: ModelConfig, name: str) -> GenerationConfig:
    """Return the decoding settings of a model, changed by the overrides `model.generation.*` of the command.

    Args:
        job: the running command with its overrides.
        fixed: config of the version or checkpoint.
        name: name of the version or checkpoint, for the error message.

    Raises:
        UserError: an override changes a setting that training has fixed, or the decoding settings exclude each other.
    """
    settings, chosen = fixed.generation.model_dump(), job.config.model.generation.model_dump()
    for key in _different_keys(job, fixed):
        section, _, field = key.removeprefix("model.").partition(".")
        if section != "generation":
            raise _refused(key, name, TRAIN_AGAIN)
        settings |= {field: chosen[field]} if field else chosen
    try:
        return GenerationConfig.model_validate(settings)
    except ValidationError as error:
        raise UserError(
            "the decoding settings cannot be combined with those of the model",
            where=name,
            got="; ".join(problem["msg"] for problem in error.errors()),
            fix=f"also override the other setting with --set {GENERATION}.SETTING=VALUE",
        ) from None


def require_settings_of_version(job: Job, fixed: ModelConfig, name: str) -> None:
    """Check that no override changes a setting of the model, because an evaluation measures the version as it is.

    Raises:
        UserError: an override changes a setting of the model.
    """
    for key in _different_keys(job, fixed):
        followed = "`lakesight caption` and `lakesight ask` follow it; an evaluation does not"
        raise _refused(key, name, followed if key.startswith(GENERATION) else TRAIN_AGAIN)


def _different_keys(job: Job, fixed: ModelConfig) -> list[str]:
    """Return the keys of overrides of model settings whose value differs from the value of the version."""
    keys = [override.partition("=")[0].strip() for override in job.overrides]
    chosen, own = {"model": job.config.model.model_dump()}, {"model": fixed.model_dump()}
    return [key for key in keys if key.partition(".")[0] == "model" and _value_at(chosen, key) != _value_at(own, key)]


def _value_at(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def _refused(key: str, name: str, fix: str) -> UserError:
    return UserError("the command cannot change this setting of the model", where=name, got=f"--set {key}=...", fix=fix)
