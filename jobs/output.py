"""Output of a command: stdout contains only what the command itself prints; all other output goes to stderr.

Spark's JVM, torchrun and libraries write directly to file descriptor 1. While a command runs, both `sys.stdout` and
file descriptor 1 are redirected to stderr, so that a JSON report on stdout stays valid.

Tables, file names and the answers of models may contain control characters, with which they could change the terminal.
Class `CommandOutput` therefore escapes the control characters in everything that it prints.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

import typer
from pydantic_core import to_json

from pipelines.errors import FailedWithReport, LakesightError
from vlm.errors.printable import escape_controls, escape_controls_in_json, on_one_line, printable

STDOUT = 1
"""File descriptor of stdout."""
LABEL_WIDTH = 12
TEXT_WIDTH = 80
"""Maximum width of printed lists, in characters."""
ROUNDING_ERROR = 1e-9
"""Numbers whose absolute value is below this limit are printed as 0."""


def number(value: float, *, signed: bool = False) -> str:
    """Format a number for people, such as `0.123` or `12,346`.

    The text has three significant digits, but always all digits before the decimal point, and at most nine digits after
    the decimal point. It has neither an exponent nor zeros at the end. A rounding error becomes `0`.
    """
    if abs(value) < ROUNDING_ERROR:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if math.isfinite(value) else 0
    text = f"{value:{'+' * signed},.{min(digits, 9)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def has_colours(stream: TextIO) -> bool:
    """Return whether a stream is a terminal whose user wants colours (see https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def format_error(error: LakesightError, width: int, *, colours: bool) -> str:
    """Format an error for a terminal: one line for each part and each problem. Wrap long lines between words.

    A command between backquotes stays in one line, so that it can be copied.
    """
    parts = {"error": (error.what,), "where": (error.where,), "got": error.problems, "fix": (error.fix,)}
    lines = []
    for label, texts in parts.items():
        marked = typer.style(f"{label:<7}", fg="red" if label == "error" else None, bold=True) if colours else None
        head = marked or f"{label:<7}"
        for text in filter(None, texts):
            shown = printable(text)
            item = f"- {shown}" if len(texts) > 1 else shown
            for line in _wrap(item, width - 7, "  " if len(texts) > 1 else ""):
                lines.append(f"{head}{line}".rstrip())
                head = " " * 7
    return "\n".join(lines)


def _wrap(text: str, width: int, indent: str) -> list[str]:
    """Break a text into lines of at most `width` characters, or 20 if `width` is smaller. Neither words nor commands in
    backquotes are broken, so a line with a long word may be longer."""
    kept = re.sub(r"`[^`\n]*`", lambda found: found[0].replace(" ", "\0"), text)
    lines = []
    for number, line in enumerate(kept.splitlines() or [""]):
        first = indent if number else ""
        whole = textwrap.TextWrapper(max(width, 20), first, indent, break_long_words=False, break_on_hyphens=False)
        lines += whole.wrap(line) or [""]
    return [line.replace("\0", " ") for line in lines]


class CommandOutput:
    """Printer for the lines that people read and for the report of a command.

    Args:
        out: real stdout of the process.
        as_json: if True, the report is printed to `out` as JSON, and the lines go to stderr. If False, the lines go to
            `out`.
    """

    def __init__(self, out: TextIO, *, as_json: bool) -> None:
        self._out = out
        self._as_json = as_json
        self._stream = sys.stderr if as_json else out
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the command began."""
        return time.monotonic() - self._started

    def line(self, label: str, text: str, *, mark: str = "", colour: str | None = None) -> None:
        """Print a label in a column of fixed width, then a coloured mark, then a text.

        On a terminal, a long text is broken between words.
        """
        heads: list[tuple[str, dict[str, Any]]] = [(f"{label:<{LABEL_WIDTH}}", {"bold": True}), (mark, {"fg": colour})]
        self._print_hanging([(head, style) for head, style in heads if head], text)

    def hanging(self, head: str, text: str) -> None:
        """Print the beginning of a line, then a text. On a terminal, break the text and indent its lines."""
        self._print_hanging([(head, {})], text)

    def _print_hanging(self, heads: Sequence[tuple[str, dict[str, Any]]], text: str) -> None:
        heads, text = [(on_one_line(head), style) for head, style in heads], on_one_line(text)
        start = "".join(self._styled(head, **style) for head, style in heads)
        width = sum(len(head) for head, _ in heads)
        columns = shutil.get_terminal_size().columns
        for line in _wrap(text, columns - width, "") if self._stream.isatty() else [text]:
            self._print(start + line)
            start = " " * width

    def _styled(self, text: str, **style: Any) -> str:
        """Return a text in a style (arguments of `typer.style`) if the output has colours, else the text itself."""
        return typer.style(text, **style) if text.strip() and has_colours(self._stream) else text

    def next(self, *commands: str) -> None:
        """Print the commands that the user can run next, each on a separate line. Without commands, print nothing."""
        for number, command in enumerate(commands):
            label = "or" if number else "next"
            self._print(self._styled(f"{label:<{LABEL_WIDTH}}", bold=True) + escape_controls(command))

    def items(self, label: str, items: Sequence[str]) -> None:
        """Print a list for people: a label, then the items separated by commas, in lines of at most 80 columns."""
        lines, last = [], ""
        for count, item in enumerate(map(on_one_line, items), 1):
            part = item + ("," if count < len(items) else "")
            if last and LABEL_WIDTH + len(last) + len(part) >= TEXT_WIDTH:
                lines.append(last)
                last = part
            else:
                last = f"{last} {part}".lstrip()
        for line in [*lines, last]:
            self.line(label, line)
            label = ""

    def text(self, text: str, end: str = "\n") -> None:
        """Print a text for people, without a label. The text may have several lines."""
        self._print(escape_controls(text), end)

    def _print(self, text: str, end: str = "\n") -> None:
        """Print a text whose only control characters are the styles of this class, line feeds and tabs."""
        print(text, end=end, file=self._stream, flush=True)

    def report(self, report: object) -> None:
        """Print the command's report (a pydantic model, or a dict of values and models) as JSON if `as_json` is set."""
        if self._as_json:
            text = to_json(report, by_alias=True, inf_nan_mode="null").decode()
            print(escape_controls_in_json(text), file=self._out, flush=True)

    @contextmanager
    def report_of_failure(self) -> Iterator[None]:
        """Print the report of a stage if the stage has done all its work in the block, but fails because of the
        result."""
        try:
            yield
        except FailedWithReport as error:
            self.report(error.report)
            raise


@contextmanager
def reserved_stdout() -> Iterator[TextIO]:
    """Yield the real stdout. During the block, all other output of this process and its children goes to stderr.

    In a notebook and in a task of a Databricks job, `sys.stdout` sends texts to the page of the notebook or task. Such
    a stream may have the file descriptor of a log file, into which the report must not be written. In this case, only
    the output of Python code is redirected.
    """
    real = sys.stdout
    real.flush()
    if not _is_process_stdout(real):
        with redirect_stdout(sys.stderr):
            yield real
        return
    saved = os.dup(STDOUT)
    try:
        os.dup2(sys.stderr.fileno(), STDOUT)
        with os.fdopen(os.dup(saved), "w", encoding="utf-8") as out, redirect_stdout(sys.stderr):
            yield out
    finally:
        os.dup2(saved, STDOUT)
        os.close(saved)


def _is_process_stdout(stream: TextIO) -> bool:
    """Return whether a stream writes to file descriptor 1, which children inherit."""
    try:
        return stream.fileno() == STDOUT
    except (OSError, AttributeError):  # in a notebook or a test, stdout may have no file descriptor
        return False


def first_line(error: Exception) -> str:
    """Return the first line of an error message. For a Java exception, return the Java message, not Py4J's message."""
    lines = str(error).strip().splitlines()
    java = [line.removeprefix(": ") for line in lines if line.startswith(": ")]
    return next(iter(java + lines), "no message")
