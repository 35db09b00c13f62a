"""`lakesight evaluate`: a model version against the split that no training has seen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.progress import waiting
from jobs.shard import run_shard

if TYPE_CHECKING:
    from pipelines.driver.evaluate.run import EvaluationReport
    from pipelines.driver.model_files import ModelFiles
    from pipelines.formats.shards import Shards

VersionOption = Annotated[str, typer.Option("--version", help="Model version: a number, an alias, or latest.")]
ByOption = Annotated[
    list[str] | None,
    typer.Option("--by", help="Cut slices by this column of samples, by size or by length. Repeatable."),
]
SHOWN = ("exact_match", "word_f1", "cider", "bleu_4", "rouge_l", "meteor", "loss", "blind_gap", "error_share")
TAGGED = ("exact_match", "word_f1", "cider", "bleu_4", "rouge_l", "loss", "blind_gap", "error_share")
"""Figures that a version carries in the registry. Unity Catalog takes few tags."""
LOGGED_ROWS = 1000


def evaluate(
    *,
    version: VersionOption = "latest",
    by: ByOption = None,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a model version on unseen pictures.

    BLEU, ROUGE-L, CIDEr, METEOR where there is Java, exact match, token accuracy and blind gaps, with intervals, by
    slice, beside what the best constant caption and the nearest neighbour score; and a gallery of the worst and best
    rows. What was evaluated before is found.

    \b
    Examples:
      lakesight evaluate --run demo --version champion
      lakesight evaluate --run demo --by format --by source
    """
    from pipelines.driver.evaluate.run import COLUMNS

    with open_job(run, platform, overrides, as_json) as job:
        job.finish(run_evaluate(job, version, columns=tuple(by or COLUMNS), with_meteor=True), "promote")


def open_model(job: Job, which: str) -> ModelFiles:
    """A model version of this run, with its files on disk.

    Raises:
        UserError: there is no such version; lists what there is.
    """
    from pipelines.driver.model_files import ModelFiles
    from pipelines.tracking.registry import download, resolve

    version = resolve(job.platform, job.model_name, which)
    folder = download(job.platform, version)
    return ModelFiles(
        folder=folder,
        name=version.name,
        version=version.version,
        run_id=version.run_id,
        remote=job.platform.remote,
    )


def open_split(job: Job, model: ModelFiles) -> Shards:
    """The split that the run is evaluated on, at a version's resolution."""
    from pipelines.formats.shards import Shards

    return Shards.open(Path(run_shard(job, job.config.data.evaluate_on, model.read_config().image).folder))


def measured(
    job: Job, model: ModelFiles, shards: Shards, columns: tuple[str, ...] | None = None, *, with_meteor: bool = False
) -> EvaluationReport:
    """A version's evaluation, made now or found; its figures are in the table, in MLflow and on the version."""
    from pipelines.driver.evaluate.run import COLUMNS, evaluate
    from pipelines.tracking.registry import resolve, tag
    from pipelines.tracking.runs import log_report

    train = run_shard(job, "train", model.read_config().image)
    with waiting("evaluate"):
        report = evaluate(
            job.spark,
            job.platform,
            model,
            shards.folder,
            Path(train.folder),
            columns=COLUMNS if columns is None else columns,
            with_meteor=with_meteor,
        )
    version = resolve(job.platform, job.model_name, model.version)
    if not report.reused or version.tags.get("evaluation") != report.scores_hash:
        values = report.values()
        log_report(
            job.platform,
            model.run_id,
            "evaluate",
            values,
            [report.gallery, report.gallery_png, report.figures_png],
            tables={f"rows-{report.scores_hash}.json": logged_rows(report)},
        )
        tags = {name: f"{values[name]:.6g}" for name in TAGGED if name in values}
        tag(job.platform, version, tags | {"evaluation": report.scores_hash})
    return report


def logged_rows(report: EvaluationReport) -> dict[str, list[object]]:
    """Rows as columns of a table for MLflow."""
    names = ("image_id", "prompt", "references", "caption", "neighbour", "f1", "loss", "blind_loss")
    rows = report.scores()[:LOGGED_ROWS]
    return {
        name: [" / ".join(v) if isinstance(v := getattr(row, name), tuple) else v for row in rows] for name in names
    }


def run_evaluate(
    job: Job, which: str, *, columns: tuple[str, ...] | None = None, with_meteor: bool = False
) -> EvaluationReport:
    """The stage: measure a version, and say what it is worth."""
    model = open_model(job, which)
    report = measured(job, model, open_split(job, model), columns, with_meteor=with_meteor)
    found = ", found again" if report.reused else ""
    job.screen.line(
        "evaluate",
        f"{report.model_name} version {report.model_version}, {report.pictures:,} {report.split} pictures{found}",
    )
    for name in SHOWN:
        if name in report.metrics:
            metric = report.metrics[name]
            floors = "  ".join(
                f"{baseline} {report.metrics[key].value:.3f}"
                for baseline in ("constant", "neighbour")
                if (key := f"{baseline}_{name}") in report.metrics
            )
            job.screen.line("", f"{name:<12} {metric.value:7.3f}  ({metric.low:.3f} to {metric.high:.3f})  {floors}")
    job.screen.line("gallery", str(report.gallery))
    return report
