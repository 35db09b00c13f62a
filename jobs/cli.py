"""The command line app `lakesight`: registers all commands and prints errors.

The exit code is 0 for success, 1 for a failure, and 2 for a user's mistake. On success `main` returns instead of
calling `sys.exit`, because a Databricks wheel task counts any SystemExit as a failure.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

from jobs.ask import ask
from jobs.caption import caption
from jobs.compare import compare
from jobs.config import config
from jobs.decisions import decisions
from jobs.demo import demo
from jobs.doctor import doctor
from jobs.evaluate import evaluate
from jobs.export_weights import export_weights
from jobs.import_weights import import_weights
from jobs.ingest import ingest
from jobs.lineage import lineage
from jobs.maintain import maintain
from jobs.pipeline import pipeline
from jobs.promote import promote
from jobs.quarantine import quarantine
from jobs.review import review
from jobs.rollback import rollback
from jobs.shard import shard
from jobs.show import show
from jobs.train import train
from jobs.ui import ui
from pipelines.errors import LakesightError, UserError

STAGE_COMMANDS = (ingest, quarantine, shard, train, evaluate, compare, promote, rollback, caption, pipeline, maintain)
INTERACTIVE_COMMANDS = (demo, ask, show, lineage, decisions, review, config, doctor, ui)
WEIGHT_COMMANDS = (import_weights, export_weights)

JAVA_PERMISSION_ERRORS = ("(Permission denied)", "(Read-only file system)", "DELTA_CANNOT_CREATE_LOG_PATH")
"""Texts of Java exceptions for a file or folder that is not writable."""


class Interrupted(LakesightError):
    """The user pressed Ctrl-C, or a scheduler sent SIGTERM.

    Committed work is kept, and the same command resumes from the committed work.
    """


class Commands(TyperGroup):
    """Group of commands. The help lists the commands as registered, and Ctrl-C is reported as an error."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command.

        Raises:
            Interrupted: the user pressed Ctrl-C.
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
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _command in (*STAGE_COMMANDS, *INTERACTIVE_COMMANDS, *WEIGHT_COMMANDS):
    app.command()(_command)


def main() -> None:
    """Run the command line app: the entry point of the console script and of Databricks wheel tasks."""
    run(app)


def run(commands: typer.Typer) -> None:
    """Run a command line app. If its command raises an error, print the message and exit with the error's exit code."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
        os.register_at_fork(before=_hold_sigterm, after_in_parent=_release_sigterm, after_in_child=_restore_default)
    try:
        commands()
    except SystemExit as end:
        if end.code:
            raise
    except LakesightError as error:
        _fail(str(error), error.exit_code)
    except Exception as error:  # noqa: BLE001 outermost caller: every error gets a short message
        if file_error := _file_error(error):
            _fail(str(file_error), file_error.exit_code)
        traceback.print_exc()
        _fail(f"\nlakesight failed with {type(error).__name__}: {_first_line(error)}", 1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Interrupt the command as Ctrl-C does. A scheduler's second SIGTERM does not interrupt the cleanup."""
    signal.signal(number, lambda *_: None)  # not SIG_IGN, which child processes would inherit
    raise KeyboardInterrupt


def _hold_sigterm() -> None:
    """Hold SIGTERM back during a fork, because the child would lose a signal that arrives before it is ready."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _release_sigterm() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _restore_default() -> None:
    """Let SIGTERM end a forked child at once, also while the child executes C code."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _release_sigterm()


def _fail(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


def _first_line(error: Exception) -> str:
    """Return the first line of an error message. For a Java exception, return the Java message, not Py4J's message."""
    lines = str(error).strip().splitlines()
    java = [line.removeprefix(": ") for line in lines if line.startswith(": ")]
    return next(iter(java + lines), "no message")


def _file_error(error: Exception) -> UserError | None:
    """Return a short error if the cause of an exception is a full disk or a missing write permission; otherwise None.

    Spark reports these two causes only in the text of a Java exception, so this function also searches the text.
    """
    number = error.errno if isinstance(error, OSError) else None
    got = _first_line(error)
    if number == errno.ENOSPC or "No space left on device" in str(error):
        return UserError("the disk is full", got=got, fix="free disk space and run the same command again")
    where = str(error.filename or "") if isinstance(error, OSError) else ""
    if number in {errno.EACCES, errno.EPERM, errno.EROFS} or any(sign in str(error) for sign in JAVA_PERMISSION_ERRORS):
        return UserError(
            "a file or folder is not writable",
            where=where,
            got=str(error.strerror) if isinstance(error, OSError) else got,
            fix="change its permissions, or set LAKESIGHT_HOME to a writable folder",
        )
    return None
