"""`lakesight rollback`: back to the champion before this one."""

from __future__ import annotations

from jobs.common import JsonOption, PlatformOption, RunOption, SetOption, open_job


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
        from pipelines.tracking.registry import rollback

        champion = rollback(job.platform, job.model_name)
        job.screen.line("rollback", f"{champion.name} version {champion.version} is the champion again")
        job.finish(champion, "caption")
