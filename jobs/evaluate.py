"""`lakesight evaluate`: a model version against the split that no training has seen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.progress import waiting
from jobs.shard import run_shard

if TYPE_CHECKING:
    from pipelines.driver.evaluate import EvaluationReport
    from pipelines.driver.model import ModelFiles

VersionOption = Annotated[str, typer.Option("--version", help="Model version: a number, an alias, or latest.")]
SHOWN = ("exact_match", "cider", "bleu_4", "rouge_l", "blind_gap", "floor_exact_match", "floor_cider")


def evaluate(
    *,
    version: VersionOption = "latest",
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a model version on unseen pictures.

    BLEU, ROUGE-L, CIDEr, exact match and blind gap with intervals, and a gallery of pictures and captions.

    \b
    Example:
      lakesight evaluate --run demo --version champion
    """
    with open_job(run, platform, overrides, as_json) as job:
        job.finish(run_evaluate(job, version), "promote")


def open_model(job: Job, which: str) -> ModelFiles:
    """A model version of this run, with its files on disk.

    Raises:
        UserError: there is no such version; lists what there is.
    """
    from pipelines.driver.model import ModelFiles
    from pipelines.tracking.registry import download, resolve

    version = resolve(job.platform, job.model_name, which)
    folder = download(job.platform, version)
    return ModelFiles(folder=folder, name=version.name, version=version.version, run_id=version.run_id)


def run_evaluate(job: Job, which: str) -> EvaluationReport:
    """The stage: measure a version; its figures go to the table, the gallery, MLflow, and as tags to the version."""
    from pipelines.driver.evaluate import evaluate
    from pipelines.tracking.registry import resolve, tag
    from pipelines.tracking.runs import log_report

    model = open_model(job, which)
    shards = run_shard(job, job.config.data.evaluate_on, model.read_config().image)
    with waiting("evaluate"):
        report = evaluate(job.spark, job.platform, model, Path(shards.folder))
    values = report.values()
    log_report(job.platform, model.run_id, "evaluate", values, [report.gallery, report.gallery_png])
    version = resolve(job.platform, job.model_name, model.version)
    tag(job.platform, version, {name: f"{value:.6g}" for name, value in values.items()})
    job.screen.line(
        "evaluate", f"{report.model_name} version {report.model_version}, {report.pictures:,} {report.split} pictures"
    )
    for name in SHOWN:
        if name in report.metrics:
            metric = report.metrics[name]
            job.screen.line("", f"{name:<18} {metric.value:7.3f}  ({metric.low:.3f} to {metric.high:.3f})")
    job.screen.line("gallery", str(report.gallery))
    return report
