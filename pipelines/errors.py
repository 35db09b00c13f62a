"""Errors of the pipelines, whose messages say what failed, where, what was found, and how to fix the problem."""

from __future__ import annotations

from vlm.errors import ConfigError, LakesightError, UserError

__all__ = ["ConfigError", "LakesightError", "StageFailed", "TrainingFailed", "UserError"]


class StageFailed(LakesightError):
    """Error for a stage whose failure was not caused by a mistake of the user."""


class TrainingFailed(LakesightError):
    """Error for a training run that failed. The message names the rank that failed first, its host, and the cause."""
