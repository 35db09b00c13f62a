"""Errors of the pipelines, whose messages say what failed, where, what was found, and how to fix the problem."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlm.errors import ConfigError, LakesightError, UserError

if TYPE_CHECKING:
    from vlm.config import Config

__all__ = ["ConfigError", "FailedWithReport", "LakesightError", "StageFailed", "TrainingFailed", "UserError"]


class StageFailed(LakesightError):
    """Error for a stage whose failure was not caused by a mistake of the user."""


class FailedWithReport(StageFailed):
    """Error for a stage that has done all its work, and then fails because of the result.

    A command prints `report`, the report of the stage, before the command fails.
    """

    report: Config


class TrainingFailed(LakesightError):
    """Error for a training run that failed. The message names the rank at fault, its host and the cause, if known."""
