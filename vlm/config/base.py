"""What every config is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Probability = Annotated[float, Field(ge=0, lt=1)]


class Config(BaseModel):
    """Base of every config: frozen, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def why_unreadable(error: OSError | ValueError) -> str:
    """Why a file does not hold a config, in a line: at most three of its problems, each with its place."""
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {error}"
    problems = [(".".join(map(str, problem["loc"])), problem["msg"]) for problem in error.errors()[:3]]
    first = [f"{place}: {message}" if place else message for place, message in problems]
    more = error.error_count() - len(first)
    return "; ".join(first) + (f"; and {more} more" if more else "")
