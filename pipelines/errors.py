"""Errors of the pipelines, all of the four-part form of `vlm.errors`."""

from __future__ import annotations

from vlm.errors import ConfigError, LakesightError, UserError

__all__ = ["ConfigError", "LakesightError", "StageFailed", "TrainingFailed", "UserError"]


class StageFailed(LakesightError):
    """A stage that ran and did not end well (not the caller's mistake)."""


class TrainingFailed(LakesightError):
    """A training run that did not end green: names the root rank, its host and the cause."""
