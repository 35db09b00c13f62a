"""What commands share: the common options, and the job they open from them."""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.screen import Screen, reserved_stdout
from pipelines.config import RunConfig, load_run
from pipelines.errors import UserError
from pipelines.platform import Platform, open_platform
from vlm.config import Precision

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

RunOption = Annotated[str, typer.Option("--run", help="Which run: a file of conf/run/.", metavar="NAME")]
PlatformOption = Annotated[str, typer.Option("--platform", help="Where: local or databricks.", metavar="NAME")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Override one value of the run, such as train.steps=500. Repeatable.", metavar="KEY=VALUE"
    ),
]
PrecisionOption = Annotated[
    Precision, typer.Option("--precision", help="What the model computes in; int8 and int4 need lakesight[quantize].")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as one JSON object on stdout.")]

MIN_FREE_BYTES = 256 * 2**20
"""Free room below which no command starts: a full disk in the middle leaves a mess that Spark explains badly."""


@dataclass
class Job:
    """One command at work: the resolved run, where it runs, and what to print with."""

    config: RunConfig
    platform: Platform
    overrides: tuple[str, ...]
    screen: Screen

    @cached_property
    def spark(self) -> SparkSession:
        """The Spark session, started on first use."""
        return self.platform.open_spark()

    @property
    def source(self) -> str:
        """Name of the data config: what rows of `samples` carry as their source."""
        return self.config.chosen.data

    @property
    def model_name(self) -> str:
        """The registered model that this run's versions belong to."""
        return self.platform.model_name(self.config.name)

    def command(self, name: str) -> str:
        """A further command on the same run, as the user would type it."""
        words = ["lakesight", name, "--run", self.config.name]
        if self.platform.kind != "local":
            words += ["--platform", self.platform.kind]
        for override in self.overrides:
            words += ["--set", override]
        return shlex.join(words)

    def override(self, setting: str) -> None:
        """Resolve the run anew with one more `a.b=c`."""
        self.overrides = (*self.overrides, setting)
        self.config = load_run(self.config.name, platform=self.config.chosen.platform, overrides=self.overrides)

    def finish(self, report: object, next_command: str) -> None:
        """End a command: its report for scripts, and for people what one would do next."""
        self.screen.report(report)
        self.screen.line("next", self.command(next_command))

    def stop(self) -> None:
        """End a session this command started: a local one is ours, a workspace's is not."""
        if "spark" in self.__dict__ and self.platform.kind == "local":
            self.spark.stop()


@contextmanager
def open_screen(*, as_json: bool) -> Iterator[Screen]:
    """Logs to stderr and a screen on the real stdout, for as long as a command runs."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for room in ("vlm", "pipelines", "jobs"):
        logging.getLogger(room).setLevel(logging.INFO)
    with reserved_stdout() as out:
        yield Screen(out, as_json=as_json)


@contextmanager
def open_job(run: str, platform: str, overrides: Sequence[str] | None, as_json: bool) -> Iterator[Job]:
    """Resolve a run and open its platform; the session, if one was started, ends with the block.

    Raises:
        UserError: the configuration or the platform cannot be used.
    """
    with open_screen(as_json=as_json) as screen:
        config = load_run(run, platform=platform, overrides=tuple(overrides or ()))
        job = Job(config, open_platform(config.platform), tuple(overrides or ()), screen)
        _check_room(job.platform)
        try:
            yield job
        finally:
            job.stop()


def _check_room(platform: Platform) -> None:
    if platform.kind != "local":
        return
    free = shutil.disk_usage(platform.root).free
    if free < MIN_FREE_BYTES:
        raise UserError(
            "there is too little room on the disk",
            where=str(platform.root),
            got=f"{free / 2**20:.0f} MB free",
            fix=f"free at least {MIN_FREE_BYTES / 2**20:.0f} MB, or set LAKESIGHT_HOME to a folder on another disk",
        )
