"""Log an evaluation to MLflow: the main metrics, tables of all metrics and of rows, an HTML page, and descriptions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.common import Job
from jobs.next_commands import trained_config
from jobs.output import number
from pipelines.config import short_hash
from pipelines.driver.evaluate.gallery import HEADLINES, NAMES
from pipelines.driver.evaluate.metrics import captioned
from pipelines.driver.evaluate.verdict import BASELINES, verdict
from vlm.text.words import words

if TYPE_CHECKING:
    from pipelines.driver.evaluate.run import EvaluationReport
    from pipelines.formats.shards import Shards
    from pipelines.tracking.registry import ModelVersion

LOGGED_METRICS = (
    *("exact_match", "word_f1", "cider", "bleu_4", "rouge_l", "chair_i", "chair_s"),
    *("loss", "blind_gap", "error_share"),
)
"""Metrics that become MLflow metrics and tags of the model version. Unity Catalog limits the number of tags.

All metrics are in the logged table `figures-HASHES.json`. Evaluations with different metrics have different tables."""
LOGGED_ROWS = 1000
"""Maximum number of evaluated rows that are logged to MLflow as a table."""


def record_evaluation(job: Job, report: EvaluationReport, shards: Shards) -> None:
    """Log an evaluation to MLflow, and write its main metrics into the tags of the version. Do nothing if this was done
    before.

    Earlier releases logged evaluations at step 0, and wrote no training step into the tags. MLflow shows the value at
    the largest step, so it would show the metrics of other checkpoints instead of these metrics. An evaluation whose
    tags lack the training step is therefore logged again. If the command evaluates other rows than those of the run
    (`data.shards.where`), the evaluation is always logged, and the tags do not change.
    """
    from pipelines.tracking.registry import EVALUATION_STEP_TAG, resolve, tag, training_step

    version = resolve(job.platform, job.model_name, report.model_version)
    if _is_part(job, version):
        log_evaluation(job, report, shards)
        return
    labels = {"evaluation": report.scores_hash, "tokenisation": report.tokenisation}
    labels[EVALUATION_STEP_TAG] = str(training_step(job.platform, version))
    if report.object_words:
        labels["object_words"] = report.object_words
    if not report.reused or any(version.tags.get(name) != value for name, value in labels.items()):
        log_evaluation(job, report, shards)
        tags = {name: f"{value:.6g}" for name, value in report.values().items() if name in LOGGED_METRICS}
        tag(job.platform, version, tags | labels)


def log_evaluation(job: Job, report: EvaluationReport, shards: Shards) -> None:
    """Log an evaluation to the MLflow run of the training, and update the descriptions of the run and of the version.

    The name of a metric begins with the name of the data split, as in `test_cider`. The step of a metric is the
    training step of the version's checkpoint. MLflow shows the value of the largest step, so the run shows the metrics
    of the checkpoint with the largest step. For a version with other generation settings than its checkpoint, no
    metrics are logged. Each version has its own folder of files and tables. If the command evaluates other rows than
    those of the run (`data.shards.where`), neither metrics nor descriptions are logged, and the files and tables are in
    a subfolder of the version's folder.
    """
    from pipelines.tracking.describe.datasets import shard_input
    from pipelines.tracking.describe.figures import draw_lengths
    from pipelines.tracking.describe.notes import EVALUATION, picture
    from pipelines.tracking.registry import GENERATION_TAG, describe_version, resolve, training_step
    from pipelines.tracking.runs import log_report

    values, scored = report.values(), captioned(report.scores())
    figures = figures_by_column(report)
    # MLflow never changes a logged table, so an evaluation with additional metrics or slices is logged as a separate
    # table.
    computed = short_hash(figures["slice"], figures["metric"], report.tokenisation, report.definitions)
    identity = "-".join(filter(None, (report.scores_hash, report.object_words, computed)))
    lengths = {
        "human": [len(words(reference)) for row in scored for reference in row.references],
        "model": [len(words(row.caption or "")) for row in scored],
    }
    version = resolve(job.platform, job.model_name, report.model_version)
    text = describe(job, report)
    part = _is_part(job, version)
    folder = f"evaluate/version-{version.version}" + (f"/{report.scores_hash}" if part else "")
    shown = picture(job.platform, report.run_id, f"{folder}/gallery.png")
    is_of_run = GENERATION_TAG not in version.tags and not part
    metrics = {f"{report.split}_{name}": values[name] for name in LOGGED_METRICS if name in values and is_of_run}
    log_report(
        job.platform,
        report.run_id,
        folder,
        metrics,
        [report.gallery, report.gallery_png, report.figures_png],
        tables={
            f"figures-{identity}.json": figures,
            f"rows-{report.scores_hash}.json": rows_by_column(report),
        },
        figures={"lengths.png": draw_lengths(lengths)},
        inputs=[shard_input(shards.manifest, report.split)],
        step=training_step(job.platform, version),
        sections={} if part else {f"{EVALUATION}{version.version}": "\n\n".join(filter(None, (text, shown)))},
    )
    if not part:
        describe_version(job.platform, version, {"Evaluation": text})


def _is_part(job: Job, version: ModelVersion) -> bool:
    """Return whether the condition `data.shards.where` of the command differs from that of the version's training."""
    return trained_config(job, version).data.shards.where != job.config.data.shards.where


def describe(job: Job, report: EvaluationReport) -> str:
    """Describe an evaluation in Markdown: the verdict, main metrics of model and baselines, link and command."""
    from pipelines.tracking.describe.notes import code_block, table, version_link

    rows = [
        [NAMES[name], *(_cell(report, key) for key in (name, *(f"{baseline}_{name}" for baseline in BASELINES)))]
        for name in HEADLINES
        if name in report.metrics
    ]
    return "\n\n".join(
        [
            verdict(report.metrics, report.pictures, job.config.gate.min_blind_gap),
            table(["figure", "model (95 % interval)", "best constant", "nearest neighbour"], rows),
            f"Version: {version_link(job.platform, report.model_name, report.model_version)}. "
            f"All figures, the first {LOGGED_ROWS:,} rows, and a selection of the pictures are in the folder "
            f"`evaluate/version-{report.model_version}` of the run's artifacts.",
            code_block(f"{job.command('evaluate')} --version {report.model_version}"),
        ]
    )


def _cell(report: EvaluationReport, name: str) -> str:
    if name not in report.metrics:
        return ""
    metric = report.metrics[name]
    return number(metric.value) + (f" ({number(metric.low)} to {number(metric.high)})" * (metric.low < metric.high))


def figures_by_column(report: EvaluationReport) -> dict[str, list[object]]:
    """Convert all metrics of an evaluation to a dict of columns, with one row for each metric of each
    evaluation slice.
    """
    found = [("all", name, metric) for name, metric in report.metrics.items()]
    found += [(part, name, metric) for part, metrics in report.slices.items() for name, metric in metrics.items()]
    return {
        "slice": [part for part, _, _ in found],
        "metric": [name for _, name, _ in found],
        **{key: [getattr(metric, key) for _, _, metric in found] for key in ("value", "low", "high")},
    }


def rows_by_column(report: EvaluationReport) -> dict[str, list[object]]:
    """Convert the first LOGGED_ROWS rows of an evaluation to a dict of columns for MLflow's `log_table`."""
    names = ("image_id", "prompt", "references", "caption", "neighbour", "f1", "loss", "blind_loss")
    rows = report.scores()[:LOGGED_ROWS]
    return {
        name: [" / ".join(v) if isinstance(v := getattr(row, name), tuple) else v for row in rows] for name in names
    }
