"""Commands that a finished command suggests as the next step.

A suggested command uses the platform of the finished command. If the suggested command needs a version or pictures, it
uses those of the finished command. If no command is suitable, a function that returns a list returns an empty list.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from jobs.common import Job, is_hidden
from pipelines.errors import LakesightError

if TYPE_CHECKING:
    from pipelines.config import GateConfig, RunConfig
    from pipelines.driver.evaluate.bootstrap import Interval
    from pipelines.driver.evaluate.compare import Comparison
    from pipelines.driver.evaluate.run import EvaluationReport
    from pipelines.tracking.registry import ModelVersion

logger = logging.getLogger(__name__)


def evaluate_version(job: Job, version: str) -> str:
    """Return the command that evaluates a version."""
    return f"{job.command('evaluate')} --version {version}"


def ask_text_model(job: Job, version: str) -> str:
    """Return the command with which a text-only model continues a text. Such a model has no champion, so the command
    names a version."""
    return f"{job.command('ask')} --version {version} --prompt TEXT"


def caption_source(job: Job, version: str | None = None) -> str:
    """Return the command that captions the run's own pictures with a version, or with the champion.

    Table `samples` also contains the pictures of other runs, for which the model was not trained.
    """
    words = [] if version is None else ["--version", version]
    words += ["--where", f"source = '{job.source}'"]
    return f"{job.command('caption')} {shlex.join(words)}"


def show_captions(job: Job) -> list[str]:
    """Return the command that shows the newest captions of the run's model, or an empty list if a catalog manages the
    tables, because `show` cannot read these tables."""
    if job.platform.tables is None:
        return []
    newest = ["--where", f"model_name = '{job.model_name}'", "--order", "captioned_at DESC", "--gallery"]
    return [shlex.join(["lakesight", "show", "generated_captions", *newest, *_platform_options(job)])]


def after_review(job: Job, verdicts: Collection[str]) -> list[str]:
    """Return the commands for reviewed captions, given all verdicts.

    The command `show` is left out if there are no verdicts, or if a catalog manages the tables, because `show` cannot
    read these tables. The command `ingest` is left out if no caption is good or corrected, because only such captions
    become training data.
    """
    options = _platform_options(job)
    commands = []
    if verdicts and job.platform.tables is not None:
        commands.append(shlex.join(["lakesight", "show", "verdicts", *options]))
    if {"good", "corrected"} & set(verdicts):
        if job.platform.kind == "databricks":
            options += ["--set", f"data.source.table={job.platform.table('verdicts')}"]
        commands.append(shlex.join(["lakesight", "ingest", "--run", "reviewed", *options]))
    return commands


def show_quarantine(job: Job) -> str:
    """Return the command that shows the refused rows with their pictures."""
    return shlex.join(["lakesight", "quarantine", "--gallery", *_platform_options(job)])


def caption_table(job: Job, table: str) -> str:
    """Return the command that captions a table, given its name or path. For any table except `samples`, the user must
    replace the word COLUMN by the names of the columns.
    """
    if table == "samples":
        return caption_source(job)
    words = ["--table", table, "--id-column", "COLUMN", "--image-column", "COLUMN"]
    return f"{job.command('caption')} {shlex.join(words)}"


def show_runs(job: Job) -> list[str]:
    """Return the command that serves the MLflow UI, or an empty list if a tracking server serves the pages of
    MLflow."""
    if not job.platform.tracking_uri.startswith("sqlite"):
        return []
    return [shlex.join(["lakesight", "ui", *_platform_options(job)])]


def after_evaluation(job: Job, report: EvaluationReport) -> list[str]:
    """Return the commands for an evaluated version.

    If the version was measured with other generation settings than its own, or if the version is the champion, the next
    command is `caption`. If the gate would certainly refuse the version, the next command is that of `train_longer`.
    In all other cases, the next command is `promote`.
    """
    if report.settings is not None:
        return [caption_source(job, report.model_version)]
    found = _find_versions(job, report.model_version)
    if not found:
        return []
    if "champion" in found[0].aliases:
        return [caption_source(job)]
    if is_refused(job.config.gate, report.metrics):
        return train_longer(job, found[0])
    return [promote_version(job, report.model_version)]


def promote_version(job: Job, version: str) -> str:
    """Return the command that promotes a version."""
    return f"{job.command('promote')} --version {version}"


def is_refused(gate: GateConfig, metrics: Mapping[str, Interval]) -> bool:
    """Return whether the whole confidence interval of the gate's metric is below the value of one of its baselines."""
    metric = metrics.get(gate.metric)
    baselines = [metrics[key] for name in gate.baselines if (key := f"{name}_{gate.metric}") in metrics]
    return metric is not None and any(metric.high < baseline.value for baseline in baselines)


def after_comparison(job: Job, report: Comparison) -> list[str]:
    """Return the commands for two compared versions.

    Version `other` is the winner if it is clearly better; in all other cases, version `one` is the winner. The next
    command promotes the winner. If the winner is already the champion, the next command repeats the training of the
    loser with more steps.
    """
    names = (report.one, report.other)
    found = _find_versions(job, *(names[::-1] if report.differences[report.metric].high < 0 else names))
    if not found:
        return []
    winner, loser = found
    return train_longer(job, loser) if "champion" in winner.aliases else [promote_version(job, winner.version)]


def _find_versions(job: Job, *numbers: str) -> list[ModelVersion]:
    """Look up versions of the run's model. If the registry cannot be read, log a warning and return no version.

    The finished command may not have needed the registry, so an outage must not make the command fail at its end.
    """
    from pipelines.tracking.registry import resolve

    try:
        return [resolve(job.platform, job.model_name, number) for number in numbers]
    except LakesightError as error:
        logger.warning("no next command is suggested, because the registry cannot be read: %s", error)
        return []


def train_longer(job: Job, version: ModelVersion) -> list[str]:
    """Return the command that repeats the training of a version with twice the number of steps.

    A run with training stages defines its steps in the stages. For such a run, return the result of `show_runs`.
    """
    from pipelines.tracking.describe.names import repeat_command

    config = trained_config(job, version)
    if config.train.stages:
        return show_runs(job)
    longer = config.train.model_copy(update={"steps": 2 * config.train.steps})
    return [repeat_command(config.model_copy(update={"train": longer}))]


def trained_config(job: Job, version: ModelVersion) -> RunConfig:
    """Return the config with which a version was trained, or the config of this command if the version was trained in
    another home folder, or if run.json cannot be read."""
    from pipelines.formats.run_folder import RunFolder

    run = RunFolder(job.platform.folder("runs") / version.tags.get("run", "unknown"))
    try:
        return run.read_run().config if run.run_file.exists() else job.config
    except (LakesightError, OSError) as error:
        logger.warning("the settings of this command are used instead of those of the training: %s", error)
        return job.config


def _platform_options(job: Job) -> list[str]:
    """Return the options that select the platform, for commands that need no other setting of the run."""
    chosen = job.config.chosen.platform
    words = [] if chosen == "local" else ["--platform", chosen]
    for override in job.overrides:
        if override.strip().startswith("platform.") and not is_hidden(override):
            words += ["--set", override]
    return words
