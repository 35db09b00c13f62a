"""Run folders whose ranks another program starts: `--no-launch` writes the folder, `--finish` registers the model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import Job
from pipelines.errors import UserError
from vlm.config import Config
from vlm.files import atomic_write

if TYPE_CHECKING:
    from pipelines.formats.run_folder import RunFolder

PREPARED = ".prepared"
"""Suffix of the file in which `train --no-launch` stores the path of the run folder that it has written last."""
LaunchOption = Annotated[
    bool,
    typer.Option("--launch/--no-launch", help="Train, or (with --no-launch) only write the run folder for torchrun."),
]
FinishOption = Annotated[
    bool,
    typer.Option(
        "--finish", help="Do not train: register the model of the run folder that --no-launch has written last."
    ),
]
PreparedAsOption = Annotated[
    str | None,
    typer.Option(
        "--prepared-as",
        help="Name of the file runs/NAME.prepared with the path of the run folder. Default: the name of the run.",
        metavar="NAME",
    ),
]


class PreparedReport(Config):
    """Report of `lakesight train --no-launch`: a run folder for ranks that the user starts."""

    run_folder: str
    ranks: int
    """Number of ranks to start, from the setting platform.ranks."""


def check_options(*, launch: bool, finish: bool, prepared_as: str | None, replay_step: int | None) -> None:
    """Check that the options of `train` do not contradict each other.

    Raises:
        UserError: two options replace the training, or --prepared-as was given although no option replaces the
            training.
    """
    given = [
        name
        for name, is_given in (
            ("--no-launch", not launch),
            ("--finish", finish),
            ("--replay-step", replay_step is not None),
        )
        if is_given
    ]
    if len(given) > 1:
        raise UserError(
            "the options of train contradict each other",
            where=" and ".join(given),
            got="each of these options replaces the training",
            fix="give only one of these options",
        )
    if prepared_as is not None and not given:
        raise UserError(
            "train writes no file for ranks that another program starts",
            where="--prepared-as",
            got=prepared_as,
            fix="add --no-launch or --finish, or leave --prepared-as out",
        )


def announce_prepared(job: Job, run: RunFolder, prepared_as: str | None) -> None:
    """Write the path of a run folder to the file from which another program reads it, and print the next commands."""
    folder, ranks = run.path, job.config.platform.ranks
    with atomic_write(_record(job, prepared_as)) as temporary:
        temporary.write_text(f"{folder}\n", encoding="utf-8")
    job.output.report(PreparedReport(run_folder=str(folder), ranks=ranks))
    job.output.line("prepared", f"{folder}, for {ranks} ranks")
    # Without PYTHONSAFEPATH, a folder `pipelines` in the working folder would be imported instead of this package.
    torchrun = f"torchrun --nproc-per-node {ranks} -m pipelines.worker.main --run-dir {shlex.quote(str(folder))}"
    job.output.line("next", f"PYTHONSAFEPATH=1 {torchrun}")
    job.output.line("then", job.command("train"))


def read_finished(job: Job, prepared_as: str | None) -> RunFolder:
    """Return the run folder that `--no-launch` has written last, after its ranks have finished.

    Raises:
        UserError: no run folder was written, or the folder belongs to another run, or its ranks have not finished.
    """
    from pipelines.driver.train.run_folders import finished_result
    from pipelines.formats.run_folder import RunFolder

    record = _record(job, prepared_as)
    if not record.is_file():
        raise UserError(
            "no run folder was prepared",
            where=str(record),
            got="no such file",
            fix=f"run `{job.command('train')} --no-launch` first, and start its ranks",
        )
    run = RunFolder(Path(record.read_text(encoding="utf-8").strip()))
    if (name := run.read_run().config.name) != job.config.name:
        raise UserError(
            "the prepared run folder belongs to another run",
            where=str(run.path),
            got=f"run {name}",
            fix=f"give --run {name}, or prepare the run {job.config.name} with --no-launch",
        )
    if finished_result(run) is None:
        raise UserError(
            "the ranks of the prepared run folder have not finished",
            where=str(run.path),
            got="no result of the ranks",
            fix="start the ranks of this folder with torchrun, and run the command again when they have finished",
        )
    return run


def _record(job: Job, prepared_as: str | None) -> Path:
    return job.platform.folder("runs") / f"{prepared_as or job.config.name}{PREPARED}"
