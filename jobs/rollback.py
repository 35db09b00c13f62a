"""`lakesight rollback`: make the previous champion the champion again."""

from __future__ import annotations

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.decisions import record
from jobs.endpoint import print_served_version
from jobs.next_commands import caption_source


def rollback(
    *,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the previous champion the champion again.

    The aliases champion and previous are exchanged, so a second rollback undoes the first rollback.

    \b
    Example:
      lakesight rollback --run demo
    """
    with open_job(run, platform, overrides, as_json, needs_space=False) as job:
        champion = run_rollback(job)
        job.output.line("rollback", f"{job.model_name} version {champion} is the champion again")
        print_served_version(job, champion)
        job.output.report({"model_name": job.model_name, "model_version": champion})
        job.output.next(caption_source(job))


def run_rollback(job: Job) -> str:
    """Record the rollback, swap the two aliases, and return the version of the new champion.

    If an interrupted rollback was completed instead (see `plan_rollback`), nothing is recorded or swapped again.

    Raises:
        UserError: the model has no previous champion.
    """
    from pipelines.tracking.aliases import find_champion, move_aliases, plan_rollback
    from pipelines.tracking.registry import CHAMPION, resolve

    move = plan_rollback(job.platform, job.model_name)
    if move is not None:
        record(job, move.champion, "rollback", champion=find_champion(job.platform, job.model_name))
        move_aliases(job.platform, job.model_name, move)
    return resolve(job.platform, job.model_name, CHAMPION).version
