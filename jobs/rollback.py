"""`lakesight rollback`: back to the champion before this one."""

from __future__ import annotations

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job


def rollback(
    *,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let the former champion serve again.

    Doing it twice swaps them back.

    \b
    Example:
      lakesight rollback --run demo
    """
    with open_job(run, platform, overrides, as_json) as job:
        champion = run_rollback(job)
        job.screen.line("rollback", f"{job.model_name} version {champion} is the champion again")
        job.finish({"model_name": job.model_name, "model_version": champion}, "caption")


def run_rollback(job: Job) -> str:
    """The stage: write the decision down, then move the aliases; returns the version that serves now.

    Raises:
        UserError: there is no former champion.
    """
    from pipelines.driver.evaluate.promote import record
    from pipelines.tracking.registry import CHAMPION, make_move, plan_rollback, resolve

    move = plan_rollback(job.platform, job.model_name)
    if move is not None:
        record(
            job.spark,
            job.platform,
            model=job.model_name,
            version=move.champion,
            action="rollback",
            champion=move.previous,
        )
        make_move(job.platform, job.model_name, move)
    return resolve(job.platform, job.model_name, CHAMPION).version
