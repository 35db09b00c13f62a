"""`lakesight promote`: let a model version serve, if it looks at its pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.evaluate import VersionOption

if TYPE_CHECKING:
    from pipelines.tracking.registry import ModelVersion


def promote(
    *,
    version: VersionOption = "latest",
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a model version the champion. A version that does not look at its pictures is refused.

    \b
    Example:
      lakesight promote --run demo --version 3
    """
    with open_job(run, platform, overrides, as_json) as job:
        job.finish(run_promote(job, version), "caption")


def run_promote(job: Job, which: str) -> ModelVersion:
    """The stage: ask the gate, then move the alias."""
    from pipelines.driver.promote import require_sighted
    from pipelines.tracking.registry import promote, resolve

    version = resolve(job.platform, job.model_name, which)
    gap = require_sighted(version.name, version.version, version.tags)
    champion = promote(job.platform, version)
    was = "is the champion already" if champion == version else "is the champion now"
    job.screen.line("promote", f"{champion.name} version {champion.version} {was}: blind gap {gap:.2f} nats per token")
    return champion
