"""Errors whose messages have up to four parts and tell the user how to continue.

The parts say what failed, where it failed, what was found, and what was expected or how to fix the problem. The
class of an error decides the exit code of the command that shows the error: 1 for a failure, 2 for a user error.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from vlm.errors.printable import printable


class LakesightError(Exception):
    """Error with a message that a person can act on.

    Args:
        what: clause that says what failed, such as "the picture cannot be decoded".
        where: file, row, table, rank or config path at which the failure happened.
        got: value or state that was found, or a list of several problems.
        fix: what was expected, or what the user should do next.
    """

    exit_code = 1
    permanent = False
    """Whether the operation would fail again if it was repeated."""

    def __init__(self, what: str, *, where: str = "", got: str | Sequence[str] = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        self.problems = (got,) if isinstance(got, str) else tuple(got)
        super().__init__(what)

    @property
    def got(self) -> str:
        """The value, state or problems that were found, as one text."""
        return "; ".join(self.problems)

    def __str__(self) -> str:
        """Return the message as one text, in which secrets are hidden and control characters are escaped."""
        parts = (("", self.what), ("Where: ", self.where), ("Got: ", self.got), ("Fix: ", self.fix))
        texts = [label + text for label, text in parts if text]
        return printable(" ".join(text if text.endswith("?") else f"{text.rstrip('.')}." for text in texts))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the error with all its attributes, so that another process receives the same error."""
        return _rebuild, (type(self), self.__dict__.copy(), self.args)


def _rebuild(cls: type[LakesightError], state: dict[str, object], args: tuple[object, ...]) -> LakesightError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    error.args = args
    return error


class UserError(LakesightError):
    """Error for a mistake of the user. A command shows the message without a traceback and exits with code 2."""

    exit_code = 2
    permanent = True


class ArgumentError(UserError, ValueError):
    """Error for an argument of a Python function that has a wrong type or value. The message names the argument."""


class ConfigError(UserError):
    """Error for a configuration that cannot be used. The message may list several problems."""


class ImageError(LakesightError):
    """Error for a picture that cannot be used. The attribute `reason` is one of IMAGE_REASONS."""

    def __init__(self, reason: str, detail: str, *, where: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"the picture cannot be used: {reason}", where=where, got=detail)


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
    """Error for a checkpoint that cannot be used, for example because it is incomplete or belongs to another model."""

    permanent = True


def nearest(name: str, valid: Iterable[str], count: int = 1) -> list[str]:
    """Return up to `count` valid names that are similar to a misspelled name.

    Anagrams come first, then names that difflib finds similar. Last come longer names that begin with the misspelled
    name, and shorter names that are the beginning of the misspelled name.
    """
    folded, by_folded = name.casefold(), {each.casefold(): each for each in valid}
    # difflib finds too little similarity between "di" and "id", so search for anagrams too
    anagrams = [each for each in by_folded if sorted(each) == sorted(folded)]
    similar = difflib.get_close_matches(folded, by_folded, n=count, cutoff=0.6)
    # difflib finds too little similarity between "temp" and "temperature", because the lengths differ too much
    long = [each for each in by_folded if min(len(each), len(folded)) > 2]
    shared = [each for each in long if each.startswith(folded) or folded.startswith(each)]
    return [by_folded[match] for match in dict.fromkeys([*anagrams, *similar, *shared])][:count]


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" for a misspelled name, or an empty string if no valid name is similar."""
    return "".join(f", did you mean {match!r}?" for match in nearest(name, valid))
