"""The command line app `lakesight`, which registers all commands and prints errors.

The exit code is 0 for success, 1 for a failure, and 2 for a user's mistake. On success `main` returns instead of
calling `sys.exit`, because a Databricks wheel task counts any SystemExit as a failure.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from jobs.generation_options import GENERATION_COMMANDS, without_generation_settings
from pipelines.errors import LakesightError, UserError
from vlm.errors.printable import printable

STAGE_COMMANDS = {
    "ingest": "Read new and changed pictures into table samples.",
    "quarantine": "Show quarantined rows, or process them again.",
    "shard": "Write training shards from table samples.",
    "train": "Train on distributed ranks and register the model.",
    "evaluate": "Measure a model version on unseen pictures.",
    "compare": "Compare two model versions on the same rows.",
    "promote": "Make a version the champion if it passes the gate.",
    "rollback": "Make the previous champion the champion again.",
    "endpoint": "Serve the champion at an endpoint of the workspace.",
    "caption": "Caption new and changed pictures of a table.",
    "pipeline": "Run every stage, from pictures to captions.",
    "maintain": "Compact and vacuum all tables, or remove old folders.",
    "migrate": "Bring tables and home folder to the format of this release.",
}
INTERACTIVE_COMMANDS = {
    "demo": "Run every stage on generated pictures.",
    "ask": "Caption a picture, or ask a question about pictures.",
    "serve": "Serve a model version over REST until Ctrl-C.",
    "show": "Show rows and pictures of a table.",
    "lineage": "Show how a picture's captions were made.",
    "decisions": "List promotions, refusals and rollbacks of a model.",
    "review": "Judge captions on a local web page.",
    "config": "Print a resolved run config, or list the models.",
    "doctor": "Check this machine or workspace and print fixes.",
    "ui": "Serve the MLflow UI until Ctrl-C.",
}
WEIGHT_COMMANDS = {
    "import-weights": "Make a checkpoint from published weights.",
    "export-weights": "Write a checkpoint in the format of another library.",
}
COMMANDS = STAGE_COMMANDS | INTERACTIVE_COMMANDS | WEIGHT_COMMANDS
"""Dict from each command to the first line of its help. The module of a command is imported only if the command is
used.
"""

OPTIONS = "--options="
DISK_FULL = re.compile("No space left on device")
NOT_WRITABLE = re.compile(
    r"\(Permission denied\)|Permission denied \(os error|Read-only file system|DELTA_CANNOT_CREATE_LOG_PATH"
)
"""Pattern that finds the messages with which Java and Rust libraries report a file or folder that is not writable."""


class Interrupted(LakesightError):
    """Error for a command that Ctrl-C or a scheduler's SIGTERM has interrupted.

    Work that the command has committed is kept. If the user runs the same command again, the command continues from
    this work.
    """


class JobCommand(TyperCommand):
    """Command that accepts additional options in a single argument, `--options=TEXT`.

    A Databricks job passes each job parameter as one argument. Without `--options`, a person who starts a job could set
    only those options that have their own job parameter.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Replace each `--options=TEXT` by the options in its text, and parse the arguments.

        Raises:
            UserError: a quotation mark in the text is not closed.
        """
        return super().parse_args(ctx, [word for argument in args for word in _expand(argument)])


def _expand(argument: str) -> list[str]:
    if not argument.startswith(OPTIONS):
        return [argument]
    try:
        return shlex.split(argument.removeprefix(OPTIONS))
    except ValueError as error:
        raise UserError(
            "the options cannot be read",
            got=f"{argument} ({error})",
            fix="write the options as in a shell, for example --options='--retry-errors --max-error-share 0.1'",
        ) from None


class LazyCommands(Mapping[str, Any]):
    """Mapping from the name of a command to the command.

    The module of a command is imported when the command is looked up.
    """

    def __getitem__(self, name: str) -> Any:
        """Import the module of a command, and return the command."""
        if name not in COMMANDS:
            raise KeyError(name)
        function = name.replace("-", "_")
        single = typer.Typer(rich_markup_mode=None, add_completion=False)
        command = getattr(importlib.import_module(f"jobs.{function}"), function)
        if name not in GENERATION_COMMANDS:
            command = without_generation_settings(name, command)
        single.command(name, cls=JobCommand)(command)
        return get_command(single)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the commands, in the order of the help."""
        return iter(COMMANDS)

    def __len__(self) -> int:
        """Return the number of commands."""
        return len(COMMANDS)


class Commands(TyperGroup):
    """Group of all commands. It prints its help without importing a command, and reports Ctrl-C as an error."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings | {"commands": settings.get("commands") or LazyCommands()})

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands, in the order of the help."""
        return list(self.commands)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of the commands, with complete descriptions."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command.

        Raises:
            Interrupted: the user pressed Ctrl-C, or the process received SIGTERM.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted; run the same command again to resume") from None


app = typer.Typer(
    cls=Commands,
    help="Train your own vision-language model on your own lakehouse.",
    epilog="Start with: lakesight demo",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lakesight {importlib.metadata.version('lakesight')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line app: the entry point of the console script and of Databricks wheel tasks."""
    run(app)


def run(commands: typer.Typer) -> None:
    """Run a command line app. If a command raises an error, print the message and exit with the error's exit code."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
        os.register_at_fork(before=_hold_sigterm, after_in_parent=_release_sigterm, after_in_child=_restore_default)
    try:
        commands()
    except SystemExit as end:
        if end.code:
            raise
    except LakesightError as error:
        _fail(error)
    except Exception as error:  # noqa: BLE001 outermost caller: every error gets a short message
        if file_error := _file_error(error):
            _fail(file_error)
        from jobs.output import first_line

        message = f"{traceback.format_exc()}\n\nlakesight failed with {type(error).__name__}: {first_line(error)}"
        print(printable(message), file=sys.stderr)
        sys.exit(1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Interrupt the command as Ctrl-C does. A second SIGTERM is ignored, so that it does not interrupt the cleanup."""
    signal.signal(number, lambda *_: None)  # not SIG_IGN, which child processes would inherit
    raise KeyboardInterrupt


def _hold_sigterm() -> None:
    """Block SIGTERM during a fork, because a child would lose a signal that arrives before the child is ready."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _release_sigterm() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _restore_default() -> None:
    """Let SIGTERM end a forked child process immediately, even while the child executes C code."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _release_sigterm()


def _fail(error: LakesightError) -> None:
    """Print an error and exit. On a terminal, each part of the error has its own line."""
    if sys.stderr.isatty():
        from jobs.output import format_error, has_colours

        width = shutil.get_terminal_size().columns
        print(format_error(error, width, colours=has_colours(sys.stderr)), file=sys.stderr)
    else:
        print(error, file=sys.stderr)
    sys.exit(error.exit_code)


def _file_error(error: Exception) -> UserError | None:
    """Return a short error if the cause of an exception is a full disk or a missing write permission; otherwise None.

    Libraries in Java and Rust report a full disk or a missing permission only in the text of their error, so this
    function also searches the text.
    """
    number, where = (error.errno, str(error.filename or "")) if isinstance(error, OSError) else (None, "")
    if number == errno.ENOSPC or DISK_FULL.search(str(error)):
        got, fix = _line_with(DISK_FULL, error), "free disk space and run the same command again"
        return UserError("the disk is full", where=where, got=got, fix=fix)
    if number in {errno.EACCES, errno.EPERM, errno.EROFS} or NOT_WRITABLE.search(str(error)):
        return UserError(
            "a file or folder is not writable",
            where=where,
            got=os.strerror(number) if number else _line_with(NOT_WRITABLE, error),
            fix="change the permissions, or set LAKESIGHT_HOME to a writable folder",
        )
    return None


def _line_with(pattern: re.Pattern[str], error: Exception) -> str:
    """In an error message, find and return the first line that contains a pattern. If no line contains the pattern,
    return the first line of the message."""
    from jobs.output import first_line

    found = next((line for line in str(error).splitlines() if pattern.search(line)), first_line(error))
    # remove the red arrow that delta-rs draws before each cause
    return re.sub("\x1b\\[[0-9]*m|\N{DOWNWARDS ARROW WITH TIP RIGHTWARDS}", "", found).removeprefix(": ").strip()
