"""Errors of the pipelines, which have the four-part messages of `vlm.errors`."""

from __future__ import annotations

from vlm.errors import ConfigError, LakesightError, UserError

__all__ = ["ConfigError", "LakesightError", "StageFailed", "TrainingFailed", "UserError"]


class StageFailed(LakesightError):
    """Failure of a stage that is not a mistake of the user."""


class TrainingFailed(LakesightError):
    """Failure of a training run. The message names the rank that failed first, the host of this rank, and the cause."""
