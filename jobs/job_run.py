"""Record of the model version that the task `train` of a job run has trained or found.

The tasks `evaluate` and `promote` of the job run read this record. They do not use the latest version, because other
commands may register newer versions of the same model while the job runs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from jobs.common import Job
from pipelines.errors import UserError
from vlm.files import atomic_write

JobRunOption = Annotated[
    str | None,
    typer.Option(
        "--job-run", help="Use the version that `train` with the same --job-run has trained or found.", metavar="ID"
    ),
]
RecordOption = Annotated[
    str | None,
    typer.Option(
        "--job-run",
        help="Record the version under this id, for evaluate and promote with the same --job-run.",
        metavar="ID",
    ),
]
VALID_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
"""Pattern of an id, which is part of the name of a file."""


def check_job_run(job_run: str, *, registers: bool = True) -> None:
    """Check the option --job-run.

    Args:
        job_run: value of the option.
        registers: whether the command registers a model version.

    Raises:
        UserError: the id is not valid, or the command registers no version.
    """
    if not VALID_ID.fullmatch(job_run):
        raise UserError(
            "the id of a job run is not valid",
            where="--job-run",
            got=repr(job_run),
            fix="use at most 128 letters, digits, hyphens and underscores",
        )
    if not registers:
        raise UserError(
            "the command registers no model version that could be recorded",
            where="--job-run",
            got=f"{job_run} together with --no-launch or --replay-step",
            fix="leave --job-run out",
        )


def record_trained_version(job: Job, job_run: str, version: str) -> None:
    """Record the number of the version that a job run has trained or found."""
    with atomic_write(_file(job, job_run)) as temporary:
        temporary.write_text(f"{version}\n", encoding="utf-8")


def read_trained_version(job: Job, job_run: str, version: str) -> str:
    """Return the number of the version that `train` has recorded for a job run.

    Args:
        job: running command.
        job_run: value of the option --job-run.
        version: value of the option --version, which must be the default.

    Raises:
        UserError: the id is not valid, no version was recorded, or --version chooses a version too.
    """
    check_job_run(job_run)
    if version != "latest":
        raise UserError(
            "two options choose a model version",
            where="--version and --job-run",
            got=f"{version} and {job_run}",
            fix="leave one of the two options out",
        )
    file = _file(job, job_run)
    if not file.is_file():
        raise UserError(
            "no model version was recorded for the job run",
            where=str(file),
            got="no such file",
            fix=f"run `{job.command('train')} --job-run {job_run}` first",
        )
    return file.read_text(encoding="utf-8").strip()


def _file(job: Job, job_run: str) -> Path:
    """Return the path of the file with the version number."""
    return job.platform.folder("runs") / f"{job.config.name}.trained-{job_run}"
