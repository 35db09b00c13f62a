"""What every config is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

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


def differences(there: Mapping[str, Any], here: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Each value that two nested mappings do not share, as `a.b is 1 there, 2 in the run`."""
    for key in dict.fromkeys((*there, *here)):
        one, other = there.get(key), here.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from differences(one, other, f"{path}{key}.")
        elif one != other:
            yield f"{path}{key} is {one!r} there, {other!r} in the run"
