"""Command-line options that several commands have, and class `Job`: the config, platform and output of a running
command.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli import WEIGHT_COMMANDS
from jobs.generation_options import GENERATION_COMMANDS, is_generation
from jobs.output import CommandOutput, reserved_stdout
from pipelines.config import RunConfig, available, load_run
from pipelines.errors import LakesightError, UserError
from pipelines.formats.format_version import check_home
from pipelines.platform import Platform, jvm_failure, open_platform, stop_session
from vlm.config import Precision
from vlm.errors.printable import PrintableFormatter

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def _complete_run(incomplete: str) -> list[str]:
    """Return the run names that begin with a text, for completion in the shell."""
    return [name for name in available("run") if name.startswith(incomplete)]


RunOption = Annotated[
    str,
    typer.Option(
        "--run",
        help="Name of a run, which is a file name in conf/run/ without .yml.",
        metavar="NAME",
        autocompletion=_complete_run,
    ),
]
PlatformOption = Annotated[
    str, typer.Option("--platform", help="Platform to run on: local or databricks.", metavar="NAME")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one setting, for example train.steps=500. Repeatable.", metavar="KEY=VALUE"),
]
PrecisionOption = Annotated[
    Precision, typer.Option("--precision", help="Number format of the weights; int8 and int4 need lakesight[quantize].")
]
PromptOption = Annotated[
    str, typer.Option("--prompt", help="Question about the picture. Default: ask for a caption.", metavar="TEXT")
]
WhereOption = Annotated[
    str, typer.Option("--where", help="SQL condition that selects rows. Default: all rows.", metavar="SQL")
]
ImageRootOption = Annotated[
    str | None,
    typer.Option(
        "--image-root",
        help="Folder or URL of the picture files, if the picture column has paths or URLs.",
        metavar="FOLDER",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as one JSON object on stdout.")]

WITHOUT_RUN = ("demo", *WEIGHT_COMMANDS)
"""Commands that have no option --run."""
MIN_FREE_BYTES = 256 * 2**20
"""Minimum free disk space for a command to start, in bytes. Commands check the disk space themselves, because Spark's
own errors about a full disk are unclear.
"""


def refuse_options(given: Mapping[str, object], reason: str) -> None:
    """Refuse options that a command would ignore.

    Args:
        given: dict from the name of each option to its value; None, False, an empty list and an empty tuple mean that
            the option was not given.
        reason: why the options have no effect.

    Raises:
        UserError: an option was given.
    """
    names = " and ".join(option for option, value in given.items() if value not in (None, False, [], ()))
    if names:
        raise UserError(f"{names} would have no effect", got=reason, fix=f"leave {names} out")


def is_hidden(override: str) -> bool:
    """Return whether an override must not be printed, because it sets Spark settings, which may be secrets."""
    return override.strip().startswith("platform.spark.conf")


@dataclass
class Job:
    """Running command, with its resolved run config, its platform and its output."""

    config: RunConfig
    platform: Platform
    overrides: tuple[str, ...]
    output: CommandOutput
    uses_version: bool = False
    """Whether the command decodes with a trained model. If True, the overrides `model.generation.*` do not change the
    config of the run, because the run's model may have another context length or other settings than the trained model.
    """
    shown: set[str] = field(default_factory=set)
    """Shard folders whose paths were printed. A path is printed once, even if several stages use the folder."""

    @cached_property
    def spark(self) -> SparkSession:
        """The Spark session, which is started on first use."""
        return self.platform.open_spark()

    @property
    def source(self) -> str:
        """Name of the data config. The rows that this run ingests have this name in column `source` of their table."""
        return self.config.chosen.data

    @property
    def model_name(self) -> str:
        """Full name under which the run's model is registered."""
        return self.platform.model_name(self.config.name)

    def command(self, name: str) -> str:
        """Return the command line that runs command `name` on the same run with the same overrides.

        The command line leaves out two kinds of overrides: hidden settings (`is_hidden`), and generation settings that
        command `name` would refuse.
        """
        return f"lakesight {name} {self._options(name)}"

    def _options(self, name: str) -> str:
        # The gate of `promote` uses the generation settings that are stored with the version.
        follows_generation = name in GENERATION_COMMANDS and name != "promote"
        words = ["--run", self.config.name]
        if self.config.chosen.platform != "local":
            words += ["--platform", self.config.chosen.platform]
        for override in self.overrides:
            is_refused = is_generation(override) and not follows_generation
            if not is_refused and not is_hidden(override):
                words += ["--set", override]
        return shlex.join(words)

    def add_run(self, text: str) -> str:
        """Add this run and its overrides to the commands in an error message, such as "run `lakesight ingest` first".

        People copy commands from error messages, but the functions that raise errors do not know the options of the
        running command. Three kinds of commands are not changed: commands in WITHOUT_RUN, commands that already have
        the option --run, and all commands for the run demo without overrides.
        """

        def complete(found: re.Match[str]) -> str:
            options = self._options(found["name"])
            named = found["name"] in WITHOUT_RUN or "--run" in found["rest"] or options == "--run demo"
            return found[0] if named else f"`lakesight {found['name']}{found['rest']} {options}`"

        return re.sub(r"`lakesight (?P<name>[a-z-]+)(?P<rest>[^`]*)`", complete, text)

    def override(self, setting: str) -> None:
        """Add one override `key=value` and resolve the run config again."""
        self.overrides = (*self.overrides, setting)
        self.config = _load(self.config.name, self.config.chosen.platform, self.overrides, self.uses_version)

    def finish(self, report: object, next_command: str) -> None:
        """Print the report if the user asked for JSON. Then print the command to run next."""
        self.output.report(report)
        self.output.next(self.command(next_command))

    def stop(self) -> None:
        """Stop the Spark session if this command has opened one on a laptop. A Databricks session keeps running."""
        if self._has_local_spark():
            stop_session(self.spark)

    def failure_of_spark(self) -> LakesightError | None:
        """Return the error for a local Spark session whose JVM has ended, or None if no JVM has ended."""
        return jvm_failure(self.platform.root) if self._has_local_spark() else None

    def _has_local_spark(self) -> bool:
        return "spark" in self.__dict__ and self.platform.kind == "local"


@contextmanager
def open_output(*, as_json: bool) -> Iterator[CommandOutput]:
    """Yield a `CommandOutput`, with which a command prints to the real stdout. Logs go to stderr while the block
    runs."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, force=True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(PrintableFormatter("%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S"))
    for package in ("vlm", "pipelines", "jobs"):
        logging.getLogger(package).setLevel(logging.INFO)
    with reserved_stdout() as out:
        yield CommandOutput(out, as_json=as_json)


@contextmanager
def open_job(
    run: str,
    platform: str,
    overrides: Sequence[str] | None,
    as_json: bool,
    *,
    needs_space: bool = True,
    uses_version: bool = False,
) -> Iterator[Job]:
    """Resolve a run config and open its platform. If the block opens a Spark session on a laptop, the session ends with
    the block.

    Args:
        run: name of the run.
        platform: name of the platform.
        overrides: overrides `key=value` of settings.
        as_json: whether the command prints its report as JSON.
        needs_space: whether the block writes more than a few kilobytes. If False, the block runs even if the disk is
            full. On a full disk, people need the commands that remove files, show the state or roll back.

    Raises:
        UserError: the config is invalid, the platform cannot be opened, a newer release of Lakesight wrote the home
            folder, or the disk is almost full.
    """
    with open_output(as_json=as_json) as output:
        given = tuple(overrides or ())
        config = _load(run, platform, given, uses_version)
        job = Job(config, open_platform(config.platform), given, output, uses_version)
        check_home(job.platform.root)
        if needs_space:
            _check_free_space(job.platform)
        try:
            yield job
        except Exception as error:
            if ended := job.failure_of_spark():
                raise ended from error
            if isinstance(error, LakesightError):
                error.fix = job.add_run(error.fix)
            raise
        finally:
            job.stop()


def _load(run: str, platform: str, overrides: Sequence[str], uses_version: bool) -> RunConfig:
    applied = [each for each in overrides if not (uses_version and is_generation(each))]
    return load_run(run, platform=platform, overrides=applied)


def open_notebook(run: str, workspace: Sequence[str], overrides: Sequence[str]) -> Job:
    """Return a job for the cells of a notebook. The job prints to the notebook, and its Spark session is not stopped.

    Args:
        run: name of the run.
        workspace: overrides for resources of a workspace, such as `platform.catalog=main`. These overrides apply only
            on a Databricks cluster.
        overrides: other overrides.

    Raises:
        UserError: the config is invalid, the platform cannot be opened, or a newer release of Lakesight wrote the home
            folder.
    """
    on_databricks = "DATABRICKS_RUNTIME_VERSION" in os.environ
    chosen = (*workspace, *overrides) if on_databricks else tuple(overrides)
    config = load_run(run, platform="databricks" if on_databricks else "local", overrides=chosen)
    job = Job(config, open_platform(config.platform), chosen, CommandOutput(sys.stdout, as_json=False))
    check_home(job.platform.root)
    return job


def _check_free_space(platform: Platform) -> None:
    if platform.kind != "local":
        return
    free = shutil.disk_usage(platform.root).free
    if free < MIN_FREE_BYTES:
        raise UserError(
            "there is too little free disk space",
            where=str(platform.root),
            got=f"{free / 2**20:.0f} MB free",
            fix=f"free at least {MIN_FREE_BYTES / 2**20:.0f} MB, for example with `lakesight maintain --keep 3 "
            "--remove`, or set LAKESIGHT_HOME to a folder on another disk",
        )
