"""Errors that say how to go on: every message has the same four parts.

What failed, where, what was got, and what was expected or how to fix it. The class carries the exit code of the
command that shows it: 1 something failed, 2 the caller's mistake.
"""

from __future__ import annotations


class LakesightError(Exception):
    """An error a person can act on.

    Args:
        what: what failed, as a clause ("the picture cannot be decoded").
        where: the file, row, table, rank or config path it happened at.
        got: the value or state that was met.
        fix: what was expected, or the next thing to do.
    """

    exit_code = 1
    lasting = False
    """Whether trying again without a change would end the same."""

    def __init__(self, what: str, *, where: str = "", got: str = "", fix: str = "") -> None:
        self.what, self.where, self.got, self.fix = what, where, got, fix
        parts = [what, where and f"Where: {where}", got and f"Got: {got}", fix and f"Fix: {fix}"]
        super().__init__(". ".join(part.rstrip(".") for part in parts if part) + ".")

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the trip between processes, keyword arguments and all."""
        return _rebuild, (type(self), self.__dict__.copy(), self.args)


def _rebuild(cls: type[LakesightError], state: dict[str, object], args: tuple[object, ...]) -> LakesightError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    error.args = args
    return error


class UserError(LakesightError):
    """The caller's mistake: exit code 2, one paragraph, no traceback."""

    exit_code = 2
    lasting = True


class ConfigError(UserError):
    """A configuration that cannot be used; lists every problem at once."""


class ImageError(LakesightError):
    """A picture that cannot be used. `reason` is one of IMAGE_REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"the picture cannot be used: {reason}", got=detail)


IMAGE_REASONS = ("not_an_image", "truncated_image", "unsupported_format", "too_large", "too_small")


class CheckpointError(LakesightError):
    """A checkpoint that is missing, incomplete or of another model."""

    lasting = True
