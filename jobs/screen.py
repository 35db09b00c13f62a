"""What a command says, and where: its report on stdout, everything else on stderr.

Spark's JVM, torchrun and libraries write to the process's own stdout (file descriptor 1), so redirecting `sys.stdout`
alone would not keep a JSON report clean: the descriptor is redirected too, for as long as a command runs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

from pydantic_core import to_json


class Screen:
    """Prints aligned lines for people or, with `as_json`, one JSON object for scripts.

    Args:
        out: the real stdout.
        as_json: print the report as JSON on `out`, and the lines for people on stderr.
    """

    def __init__(self, out: TextIO, *, as_json: bool) -> None:
        self._out = out
        self._as_json = as_json
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the command began."""
        return time.monotonic() - self._started

    def line(self, label: str, text: str) -> None:
        """One line for people: a label in a column of its own, and what happened."""
        self.text(f"{label:<12}{text}")

    def text(self, text: str, end: str = "\n") -> None:
        """Text for people, as it is."""
        print(text, end=end, file=sys.stderr if self._as_json else self._out, flush=True)

    def report(self, report: object) -> None:
        """The command's report, where scripts asked for it: a pydantic model, or a mapping with some in it."""
        if self._as_json:
            print(to_json(report, by_alias=True, inf_nan_mode="null").decode(), file=self._out, flush=True)


@contextmanager
def reserved_stdout() -> Iterator[TextIO]:
    """Yield the real stdout; meanwhile whatever else is printed, by this process or a child, goes to stderr."""
    real = sys.stdout
    real.flush()
    try:
        real.fileno()
    except OSError:  # a notebook's or a test's stdout is no file: then children do not inherit it either
        with redirect_stdout(sys.stderr):
            yield real
        return
    saved = os.dup(real.fileno())
    try:
        os.dup2(sys.stderr.fileno(), real.fileno())
        with os.fdopen(os.dup(saved), "w", encoding="utf-8") as out, redirect_stdout(sys.stderr):
            yield out
    finally:
        os.dup2(saved, real.fileno())
        os.close(saved)
