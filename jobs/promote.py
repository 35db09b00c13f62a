"""`lakesight promote`: make a model version the champion if it passes the gate."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.decisions import record
from jobs.evaluate import CheckpointOption, VersionOption, choose_version, evaluate_version, open_model, open_split
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
        found: dict from the name of each check of the promotion gate to the result of the check.
        tokenisation: rules that split texts into words for the gate's metric. The value is None if the metric uses no
            words or if no check ran.
    """

    model_name: str
    model_version: str
    already: bool
    found: dict[str, str]
    tokenisation: str | None = None


def promote(
    *,
    version: VersionOption = "latest",
    checkpoint: CheckpointOption = None,
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

    \b
    Examples:
      lakesight promote --run demo --version 3
      lakesight promote --run demo --set gate.min_blind_gap=0.3
    """
    with open_job(run, platform, overrides, as_json) as job:
        job.finish(run_promote(job, choose_version(job, version, checkpoint)), "caption")


def advice(config: RunConfig, pictures: int) -> str:
    """Return advice on what to do after the gate has refused a version that was evaluated on `pictures` pictures."""
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
        return f"{few}, run `lakesight ingest --refresh`, and train again. Otherwise, {text}"
    return text


def run_promote(job: Job, which: str) -> PromotionReport:
    """Run the promote stage: check the gate, record the decision, then move the aliases.

    Raises:
        UserError: the model is a text-only model.
        StageFailed: the gate refused the version. The error lists every reason.
    """
    from pipelines.tracking.registry import CHALLENGER, find_champion, promote, resolve, set_alias, tag

    require_captioner(job.config.model, "a promotion")
    register_finished_runs(job)
    champion = find_champion(job.platform, job.model_name)
    version = resolve(job.platform, job.model_name, which)
    label = f"{version.name} version {version.version}"
    _require_own_settings(job, version)
    if champion and champion.version == version.version:
        _record_champion(job, version)
        job.output.line("promote", f"{label} is already the champion")
        return PromotionReport(model_name=version.name, model_version=version.version, already=True, found={})
    version = set_alias(job.platform, version, CHALLENGER)
    verdict = check_gate(job, version, champion)
    tags = {f"gate_{name}": f"{'ok' if c.passed else 'refused'}: {c.found}" for name, c in verdict.checks.items()}
    tag(job.platform, version, tags | {"gate": "refused" if verdict.reasons else "passed"})
    record(
        job,
        version.version,
        "refuse" if verdict.reasons else "promote",
        champion=champion.version if champion else None,
        reasons=verdict.reasons,
        figures=json.dumps(verdict.model_dump()["figures"] | {"tokenisation": verdict.tokenisation}),
    )
    if verdict.reasons:
        raise StageFailed(
            f"the model version is not promoted, for {len(verdict.reasons)} reason{'s' * (len(verdict.reasons) > 1)}",
            where=f"model {label}",
            got=verdict.reasons,
            fix=advice(job.config, verdict.pictures),
        )
    promote(job.platform, version)
    job.output.line("promote", f"{label} is the champion now" + (f", after {champion.version}" if champion else ""))
    for check in verdict.checks.values():
        job.output.line("", check.found)
    found = {name: check.found for name, check in verdict.checks.items()}
    return PromotionReport(
        model_name=version.name,
        model_version=version.version,
        already=False,
        found=found,
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


def _record_champion(job: Job, champion: ModelVersion) -> None:
    """If table `decisions` has a different champion than the registry, record the champion of the registry.

    An earlier promotion or rollback may have been recorded but not carried out, because the command was killed or the
    registry did not answer. The view `champion_captions` would then show captions of a version that is not the
    champion.
    """
    from pipelines.driver.evaluate.decisions import recorded_champion

    if recorded_champion(lambda: job.spark, job.platform, champion.name) != champion.version:
        reason = "this version is the champion in the registry, and the last recorded decision was not carried out"
        record(job, champion.version, "promote", champion=champion.version, reasons=[reason])


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
