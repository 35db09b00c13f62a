"""The `lakesight` command: what each word calls, and how an error reaches a person.

Exit codes: 0 good, 1 failed, 2 the user's mistake. A good end returns instead of calling sys.exit, because a Databricks
wheel task takes any SystemExit for a failure.
"""

from __future__ import annotations

import errno
import sys
import traceback
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

STAGES = (ingest, quarantine, shard, train, evaluate, compare, promote, rollback, caption, pipeline, maintain)
FOR_PEOPLE = (demo, ask, show, lineage, decisions, review, config, doctor, ui)
FOR_WEIGHTS = (import_weights, export_weights)

JAVA_MAY_NOT_WRITE = ("(Permission denied)", "(Read-only file system)", "DELTA_CANNOT_CREATE_LOG_PATH")


class Interrupted(LakesightError):
    """Ctrl-C. What was committed stays, and the same command goes on from there."""


class Commands(TyperGroup):
    """Lists commands in the order of a day's work, and turns Ctrl-C into an error that says how to go on."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
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
for _command in (*STAGES, *FOR_PEOPLE, *FOR_WEIGHTS):
    app.command()(_command)


def main() -> None:
    """Run the command line: what the console script and a Databricks wheel task call."""
    run(app)


def run(commands: typer.Typer) -> None:
    """Run commands, and end the process as their exit code says unless they end well."""
    try:
        commands()
    except SystemExit as end:
        if end.code:
            raise
    except LakesightError as error:
        _fail(str(error), error.exit_code)
    except Exception as error:  # noqa: BLE001 the outermost caller: whatever it is, say it shortly and show where
        if trouble := _trouble_with_files(error):
            _fail(str(trouble), trouble.exit_code)
        traceback.print_exc()
        _fail(f"\nlakesight failed with {type(error).__name__}: {_first_line(error)}", 1)


def _fail(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


def _first_line(error: Exception) -> str:
    """What an error says; of a Java exception what Java says, not that a call failed."""
    lines = str(error).strip().splitlines()
    java = [line.removeprefix(": ") for line in lines if line.startswith(": ")]
    return next(iter(java + lines), "no message")


def _trouble_with_files(error: Exception) -> UserError | None:
    """A full disk or a folder that may not be written, also where Spark reports it as the text of a Java exception."""
    number = error.errno if isinstance(error, OSError) else None
    got = _first_line(error)
    if number == errno.ENOSPC or "No space left on device" in str(error):
        return UserError("the disk is full", got=got, fix="free some room and run the same command again")
    where = str(error.filename or "") if isinstance(error, OSError) else ""
    if number in {errno.EACCES, errno.EPERM, errno.EROFS} or any(sign in str(error) for sign in JAVA_MAY_NOT_WRITE):
        return UserError(
            "a file or folder may not be written",
            where=where,
            got=str(error.strerror) if isinstance(error, OSError) else got,
            fix="change its permissions, or set LAKESIGHT_HOME to a folder you may write to",
        )
    return None
