"""Stages of a run whose model is a text-only model (`model.text_only`): evaluation, pipeline, and an error for stages
that need pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jobs.common import Job
from jobs.ingest import run_ingest
from jobs.pipeline_report import TextPipelineReport, describe_stages
from jobs.progress import show_elapsed
from jobs.settings_of_version import require_settings_of_version
from jobs.shard import run_shard
from jobs.train import run_train
from pipelines.errors import UserError
from vlm.config import ModelConfig

if TYPE_CHECKING:
    from pipelines.driver.evaluate.texts import TextEvaluationReport
    from pipelines.driver.model_files import ModelFiles


def require_captioner(config: ModelConfig, stage: str) -> None:
    """Check that a model reads pictures.

    Raises:
        UserError: the model is a text-only model, which has no captions.
    """
    if config.text_only:
        raise UserError(
            f"{stage} needs a model that reads pictures",
            where="model.text_only",
            got="true: the model is a decoder that was trained on text alone",
            fix="train a captioner that starts from this decoder: set model.text_only=false and train.start_from to "
            "the run's last checkpoint",
        )


def run_text_evaluate(job: Job, model: ModelFiles) -> TextEvaluationReport:
    """Measure a version of a text-only model on the run's evaluation split, or reuse an evaluation, and store the
    metrics in MLflow and in the version's tags.
    """
    from pipelines.driver.evaluate.texts import evaluate_texts
    from pipelines.tracking.registry import EVALUATION_STEP_TAG, resolve, tag, training_step
    from pipelines.tracking.runs import log_report

    config = model.read_config()
    require_settings_of_version(job, config, f"{model.name}/{model.version}")
    shards = run_shard(job, job.config.data.evaluate_on, config.image)
    with show_elapsed("evaluate"):
        report = evaluate_texts(job.spark, job.platform, model, Path(shards.folder))
    version = resolve(job.platform, job.model_name, model.version)
    step = training_step(job.platform, version)
    labels = {"evaluation": report.scores_hash, EVALUATION_STEP_TAG: str(step)}
    if any(version.tags.get(name) != value for name, value in labels.items()):
        log_report(job.platform, model.run_id, "evaluate", report.values(), step=step)
        tags = {name: f"{value:.6g}" for name, value in report.values().items()}
        tag(job.platform, version, tags | labels)
    reused = ", reused" if report.reused else ""
    job.output.line(
        "evaluate",
        f"{report.model_name} version {report.model_version}, {report.texts:,} {report.split} texts with "
        f"{report.chars:,} characters{reused}",
    )
    for name, metric in report.metrics.items():
        job.output.line("", f"{name:<14} {metric.value:7.3f}  ({metric.low:.3f} to {metric.high:.3f})")
    return report


def run_text_pipeline(job: Job) -> TextPipelineReport:
    """Run the stages of a text-only model: ingest, shard, train and evaluate. Each stage prints its results."""
    from jobs.evaluate import open_model

    ingested = run_ingest(job)
    trained = run_train(job)
    evaluated = run_text_evaluate(job, open_model(job, trained.model_version))
    nothing_new = ingested.nothing_new and not trained.trained and evaluated.reused
    if nothing_new:
        job.output.line("done", "nothing new: this command ingested no row and trained no step")
    return TextPipelineReport(
        **describe_stages(job, ingested, trained),
        texts=ingested.new,
        loss_per_char=evaluated.metrics["loss_per_char"].value,
        metrics=evaluated.values(),
        nothing_new=nothing_new,
        seconds=round(job.output.seconds, 1),
    )
