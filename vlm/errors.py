"""Errors whose message says how to continue, in four parts.

The parts are: what failed, where, what was got, and what was expected or how to fix it. The class decides the exit code
of the command that shows the error: 1 for a failure, 2 for a mistake of the user.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LakesightError(Exception):
    """Error with a message that a person can act on.

    Args:
        what: what failed, as a clause ("the picture cannot be decoded").
        where: the file, row, table, rank or config path it happened at.
        got: the value or state that was found.
        fix: what was expected, or what to do next.
    """

    exit_code = 1
    permanent = False
    """True if a retry without a change would fail in the same way."""

    def __init__(self, what: str, *, where: str = "", got: str = "", fix: str = "") -> None:
        self.what, self.where, self.got, self.fix = what, where, got, fix
        parts = [what, where and f"Where: {where}", got and f"Got: {got}", fix and f"Fix: {fix}"]
        super().__init__(". ".join(part.rstrip(".") for part in parts if part) + ".")

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle with all attributes, so that an error crosses processes unchanged."""
        return _rebuild, (type(self), self.__dict__.copy(), self.args)


def _rebuild(cls: type[LakesightError], state: dict[str, object], args: tuple[object, ...]) -> LakesightError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    error.args = args
    return error


class UserError(LakesightError):
    """Mistake of the user: exit code 2, one paragraph, no traceback."""

    exit_code = 2
    permanent = True


class ConfigError(UserError):
    """Configuration that cannot be used. The message lists every problem."""


class ImageError(LakesightError):
    """Picture that cannot be used. `reason` is one of IMAGE_REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"the picture cannot be used: {reason}", got=detail)


IMAGE_REASONS = (
    "missing_field",
    "bad_base64",
    "not_an_image",
    "truncated_image",
    "unsupported_format",
    "too_large",
    "too_small",
)


class CheckpointError(LakesightError):
    """Checkpoint that is missing, incomplete or of another model."""

    permanent = True


def nearest(name: str, valid: Iterable[str], count: int = 1) -> list[str]:
    """Return the valid names most similar to a misspelled one, the most similar first; none if none is similar."""
    return difflib.get_close_matches(name, list(valid), n=count, cutoff=0.4)


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" for a misspelled name, or nothing if no valid name is similar."""
    return "".join(f", did you mean {match!r}?" for match in nearest(name, valid))
