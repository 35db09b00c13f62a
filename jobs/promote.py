"""`lakesight promote`: make a model version the champion if it passes the gate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.decisions import digest_of, record, record_champion
from jobs.endpoint import print_served_version
from jobs.evaluate import CheckpointOption, VersionOption, choose_version, evaluate_version, open_model, open_split
from jobs.job_run import JobRunOption
from jobs.next_commands import caption_source
from jobs.progress import show_elapsed
from jobs.settings_of_version import changes_model, require_settings_of_version
from jobs.text_model import require_captioner
from jobs.train import register_finished_runs
from pipelines.errors import StageFailed
from vlm.config import Config

if TYPE_CHECKING:
    from pipelines.config import RunConfig
    from pipelines.driver.evaluate.gate import GateResult
    from pipelines.tracking.registry import ModelVersion


class PromotionReport(Config):
    """Report of `lakesight promote` for a version that was not refused.

    Attributes:
        already: whether the version was already the champion; no check of the gate runs for the current champion.
        rolled_back: whether the version was not promoted because a rollback has replaced it. In this case, no check of
            the gate ran.
        found: dict from the name of each check of the promotion gate to the result of the check.
        tokenisation: rules that split texts into words for the gate's metric. The value is None if the metric uses no
            words or if no check ran.
    """

    model_name: str
    model_version: str
    already: bool
    rolled_back: bool = False
    found: dict[str, str]
    tokenisation: str | None = None


def promote(
    *,
    version: VersionOption = "latest",
    checkpoint: CheckpointOption = None,
    job_run: JobRunOption = None,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a version the champion if it passes the gate.

    The version must load in a fresh process without unpickling, caption with few errors, and use its pictures (blind
    gap). Its captions must be better than the best constant caption and the nearest neighbour's caption, and no worse
    than the champion's captions of the same pictures. Versions without an evaluation are evaluated before the checks.
    The run's gate section sets the limits. With --checkpoint, the command registers and checks any checkpoint that the
    training has kept.

    To promote a version that a rollback has replaced, give its number with --version, or its training step with
    --checkpoint. Without these options, the command prints a message and ends without an error, so that a scheduled job
    does not undo the rollback.

    \b
    Examples:
      lakesight promote --run demo --version 3
      lakesight promote --run demo --set gate.min_blind_gap=0.3
    """
    with open_job(run, platform, overrides, as_json, uses_version=True) as job:
        which = choose_version(job, version, checkpoint, job_run)
        report = run_promote(job, which, by_number=version.isdecimal() or checkpoint is not None)
        if not report.rolled_back:
            print_served_version(job, report.model_version)
        job.output.report(report)
        job.output.next(caption_source(job))


def advice(config: RunConfig, version: str, pictures: int) -> str:
    """Return advice on what to do after the gate has refused a version that was evaluated on `pictures` pictures.

    The last sentence says how to use the version all the same, because `ask` uses the champion by default.
    """
    use = f"To use the version all the same, run `lakesight ask PICTURE --version {version}`"
    text = (
        "look at the captions in the gallery of `lakesight evaluate`. Train longer, use another seed, or give the "
        "decoder more picture features (vision.select: patches). The limits are in section gate of the run"
    )
    split = config.data.evaluate_on
    if pictures < config.gate.min_pictures and split != "train":
        few = f"the split {split} has too few pictures ({pictures}) to judge a model: "
        if config.data.split.kind == "hash":
            few += "raise data.split.val and data.split.test in the run's YAML file"
        else:
            few += "give it more rows"
        text = f"{few}, run `lakesight ingest --refresh`, and train again. Otherwise, {text}"
    return f"{text}. {use}"


def run_promote(job: Job, which: str, *, by_number: bool = False) -> PromotionReport:
    """Run the promote stage: check the gate, record the decision, then move the aliases.

    Args:
        job: running command.
        which: version to promote (a version number, an alias, or `latest`).
        by_number: whether a person has chosen this version by its number or its checkpoint. If False, a version that a
            rollback has replaced is not promoted.

    Raises:
        UserError: the model is text-only, there is no such version, or an override changes a setting of the model.
        StageFailed: the gate refused the version (the error lists all reasons), or the champion changed meanwhile.
    """
    from pipelines.tracking.aliases import CHALLENGER, find_champion, promote
    from pipelines.tracking.registry import resolve, set_alias, tag

    require_captioner(job.config.model, "a promotion")
    register_finished_runs(job)
    champion = find_champion(job.platform, job.model_name)
    version = resolve(job.platform, job.model_name, which)
    label = f"{version.name} version {version.version}"
    _require_own_settings(job, version)
    if champion and champion.version == version.version:
        record_champion(job, version)
        job.output.line("promote", f"{label} is already the champion")
        return PromotionReport(model_name=version.name, model_version=version.version, already=True, found={})
    if not by_number and (rollback := _find_rollback(job, version)):
        return _keep_rollback(job, version, champion, rollback)
    version = set_alias(job.platform, version, CHALLENGER)
    verdict = check_gate(job, version, champion)
    _require_same_champion(job, champion)
    tags = {f"gate_{name}": f"{'ok' if c.passed else 'refused'}: {c.found}" for name, c in verdict.checks.items()}
    tag(job.platform, version, tags | {"gate": "refused" if verdict.reasons else "passed"})
    record(
        job,
        version.version,
        "refuse" if verdict.reasons else "promote",
        champion=champion,
        reasons=verdict.reasons,
        figures=json.dumps(verdict.model_dump()["figures"] | {"tokenisation": verdict.tokenisation}),
    )
    if verdict.reasons:
        raise StageFailed(
            f"the model version is not promoted, for {len(verdict.reasons)} reason{'s' * (len(verdict.reasons) > 1)}",
            where=f"model {label}",
            got=verdict.reasons,
            fix=advice(job.config, version.version, verdict.pictures),
        )
    promote(job.platform, version)
    job.output.line("promote", f"{label} is the champion now" + (f", after {champion.version}" if champion else ""))
    for check in verdict.checks.values():
        job.output.line("", check.found)
    return PromotionReport(
        model_name=version.name,
        model_version=version.version,
        already=False,
        found={name: check.found for name, check in verdict.checks.items()},
        tokenisation=verdict.tokenisation,
    )


def _require_own_settings(job: Job, version: ModelVersion) -> None:
    """Check that no override changes a setting of the version's model. Without overrides, nothing is downloaded.

    Raises:
        UserError: an override changes a setting of the model.
    """
    if changes_model(job):
        model = open_model(job, version.version)
        require_settings_of_version(job, model.read_config(), f"{model.name}/{model.version}")


def _keep_rollback(
    job: Job, version: ModelVersion, champion: ModelVersion | None, rollback: Mapping[str, Any]
) -> PromotionReport:
    """Print that a version is not promoted, because a rollback has replaced it. Return the report."""
    job.output.line(
        "promote",
        f"{version.name} version {version.version} is not promoted, because {rollback['decided_by']} rolled back from "
        f"this version on {rollback['decided_at']:%Y-%m-%d %H:%M} UTC"
        + (f"; version {champion.version} stays the champion" if champion else ""),
    )
    job.output.line("", f"to promote the version again, run `{job.command('promote')} --version {version.version}`")
    return PromotionReport(
        model_name=version.name, model_version=version.version, already=False, rolled_back=True, found={}
    )


def _require_same_champion(job: Job, compared: ModelVersion | None) -> None:
    """Raise StageFailed if another command has changed the champion while the gate compared the version with it."""
    from pipelines.tracking.aliases import find_champion

    champion = find_champion(job.platform, job.model_name)
    if (champion and (champion.version, champion.run_id)) != (compared and (compared.version, compared.run_id)):
        raise StageFailed(
            "another command has changed the champion while the gate ran",
            where=f"model {job.model_name}",
            got=f"the gate compared with {f'version {compared.version}' if compared else 'no champion'}; now "
            f"{f'version {champion.version}' if champion else 'no version'} is the champion",
            fix=f"run `{job.command('promote')}` again: finished evaluations are kept",
        )


def _find_rollback(job: Job, version: ModelVersion) -> dict[str, Any] | None:
    """Return the row of the rollback that has replaced a version, or None if the version may be promoted."""
    from pipelines.driver.evaluate.decisions import find_rollback

    return find_rollback(
        lambda: job.spark, job.platform, model=version.name, version=version.version, digest=digest_of(job, version)
    )


def check_gate(job: Job, version: ModelVersion, champion: ModelVersion | None) -> GateResult:
    """Evaluate the version and the champion, smoke-test the version in a fresh process, and apply the gate."""
    from pipelines.driver.delta.tables import ensure_tables
    from pipelines.driver.evaluate.gate import apply_gate, read_trial_pictures
    from pipelines.tracking.smoke_test import smoke_test_version

    model = open_model(job, version.version)
    shards = open_split(job, model)
    report = evaluate_version(job, model, shards)
    champion_report = None
    if champion:
        champion_model = open_model(job, champion.version)
        same_size = champion_model.read_config().image == model.read_config().image
        champion_shards = shards if same_size else open_split(job, champion_model)
        champion_report = evaluate_version(job, champion_model, champion_shards)
    ensure_tables(job.spark, job.platform)
    pictures = read_trial_pictures(job.spark, shards, job.config.gate.trial_pictures)
    with show_elapsed("smoke test"):
        trial = smoke_test_version(job.platform, version, pictures)
    return apply_gate(job.config.gate, report, champion_report, trial)
