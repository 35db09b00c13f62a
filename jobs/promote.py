"""`lakesight promote`: let a model version serve, if it passes the gate."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.evaluate import VersionOption, measured, open_model, open_split
from pipelines.errors import StageFailed
from vlm.config import Config

if TYPE_CHECKING:
    from pipelines.driver.evaluate.promote import Verdict
    from pipelines.tracking.registry import ModelVersion


class Promotion(Config):
    """What became of a promotion that was not refused.

    Attributes:
        already: whether the version was the champion before; then it was not asked again.
        found: what the gate found, by check.
    """

    model_name: str
    model_version: str
    already: bool
    found: dict[str, str]


def promote(
    *,
    version: VersionOption = "latest",
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a model version the champion, if it passes the gate.

    It must load in a fresh process without unpickling, caption with few errors, look at its pictures, say more than the
    best constant caption and the nearest neighbour, and be no worse than the champion on the same pictures. What is not
    evaluated yet is evaluated first. The gate section of the run holds the limits.

    \b
    Examples:
      lakesight promote --run demo --version 3
      lakesight promote --run demo --set gate.min_blind_gap=0.3
    """
    with open_job(run, platform, overrides, as_json) as job:
        job.finish(run_promote(job, version), "caption")


def run_promote(job: Job, which: str) -> Promotion:
    """The stage: ask the gate, write the decision down, then move the aliases.

    Raises:
        StageFailed: the version is refused; every reason is told.
    """
    from pipelines.driver.evaluate.promote import record
    from pipelines.tracking.registry import CHALLENGER, champion_of, promote, resolve, set_alias, tag

    champion = champion_of(job.platform, job.model_name)
    version = resolve(job.platform, job.model_name, which)
    label = f"{version.name} version {version.version}"
    if champion and champion.version == version.version:
        job.screen.line("promote", f"{label} is the champion already")
        return Promotion(model_name=version.name, model_version=version.version, already=True, found={})
    version = set_alias(job.platform, version, CHALLENGER)
    verdict = ask_gate(job, version, champion)
    tags = {f"gate_{name}": f"{'ok' if c.passed else 'refused'}: {c.found}" for name, c in verdict.checks.items()}
    tag(job.platform, version, tags | {"gate": "refused" if verdict.reasons else "passed"})
    record(
        job.spark,
        job.platform,
        model=version.name,
        version=version.version,
        action="refuse" if verdict.reasons else "promote",
        champion=champion.version if champion else None,
        reasons=verdict.reasons,
        figures=json.dumps({name: figure.model_dump() for name, figure in verdict.figures.items()}),
    )
    if verdict.reasons:
        raise StageFailed(
            f"the version is not promoted, for {len(verdict.reasons)} reason{'s' * (len(verdict.reasons) > 1)}",
            where=f"model {label}",
            got="; ".join(verdict.reasons),
            fix="a result, not a fault: look at the evaluation's gallery, train longer or with another seed, give the "
            "decoder more of the picture (vision.select: patches); the limits are the run's gate section",
        )
    promote(job.platform, version)
    job.screen.line("promote", f"{label} is the champion now" + (f", after {champion.version}" if champion else ""))
    for check in verdict.checks.values():
        job.screen.line("", check.found)
    found = {name: check.found for name, check in verdict.checks.items()}
    return Promotion(model_name=version.name, model_version=version.version, already=False, found=found)


def ask_gate(job: Job, version: ModelVersion, champion: ModelVersion | None) -> Verdict:
    """Evaluate the version and the champion where they are not, try the version in a fresh process, and judge."""
    from pipelines.driver.evaluate.promote import judge, trial_pictures
    from pipelines.tracking.smoke_test import try_version

    model = open_model(job, version.version)
    shards = open_split(job, model)
    report = measured(job, model, shards)
    beside = None
    if champion:
        serving = open_model(job, champion.version)
        same = serving.read_config().image == model.read_config().image
        beside = measured(job, serving, shards if same else open_split(job, serving))
    pictures = trial_pictures(job.spark, shards, job.config.gate.trial_pictures)
    return judge(job.config.gate, report, beside, try_version(job.platform, version, pictures))
