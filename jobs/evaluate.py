"""`lakesight evaluate`: measure a model version on the run's evaluation split (`data.evaluate_on`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from jobs.generation_options import with_generation_options
from jobs.job_run import JobRunOption, read_trained_version
from jobs.next_commands import after_evaluation, ask_text_model
from jobs.progress import show_elapsed
from jobs.settings_of_version import with_overrides
from jobs.shard import run_shard
from jobs.text_model import require_captioner, run_text_evaluate
from jobs.train import register_checkpoint, register_finished_runs
from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.config import RunConfig
    from pipelines.driver.evaluate.hallucination import ObjectWords
    from pipelines.driver.evaluate.run import EvaluationReport
    from pipelines.driver.model_files import ModelFiles
    from pipelines.formats.shards import Shards
    from pipelines.tracking.home_store.copied_version import CopiedVersion

VersionOption = Annotated[
    str, typer.Option("--version", help="Model version: a number, an alias, or latest.", metavar="VERSION")
]
CheckpointOption = Annotated[
    int | None,
    typer.Option(
        "--checkpoint",
        min=1,
        help="Register the checkpoint of this training step, if it is not registered yet, and use its version.",
        metavar="STEP",
    ),
]
ByOption = Annotated[
    list[str] | None,
    typer.Option(
        "--by",
        help="Also report metrics for groups of rows: by a column of samples, by size (pictures) or by length (texts). "
        "Repeatable.",
        metavar="COLUMN",
    ),
]
SHOWN_METRICS = (
    *("exact_match", "word_f1", "cider", "bleu_4", "rouge_l", "meteor"),
    *("coco_cider", "coco_bleu_4", "coco_rouge_l", "coco_meteor", "chair_i", "chair_s", "loss"),
    *("blind_gap", "error_share"),
)


@with_generation_options
def evaluate(
    *,
    version: VersionOption = "latest",
    checkpoint: CheckpointOption = None,
    job_run: JobRunOption = None,
    by: ByOption = None,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a model version on unseen pictures.

    The command computes BLEU, ROUGE-L, CIDEr, exact match, token accuracy and blind gap, each with a confidence
    interval, for all rows and for groups of rows (--by). With Java, the command also computes METEOR and the figures of
    COCO's evaluation (coco_*), which papers quote. With data.object_words, the command also computes how often captions
    mention objects that no human text of the picture mentions (chair_i and chair_s). The command also measures two
    baselines: the best constant caption and the nearest neighbour's caption. The command writes an HTML page of the
    worst and best captions. An existing evaluation is reused. With --checkpoint, the command measures any checkpoint
    that the training has kept.

    For a text-only model, the command computes the loss per character, bits per character, perplexity and token
    accuracy.

    A version is measured with its own generation settings at temperature 0. If options change these settings, the
    command only writes the report and its page. Table evaluations, MLflow and the gate then keep the figures that were
    measured with the version's own settings.

    \b
    Examples:
      lakesight evaluate --run demo --version champion
      lakesight evaluate --run demo --num-beams 4
      lakesight evaluate --run demo --checkpoint 1200
      lakesight evaluate --run demo --by format --by source
    """
    from pipelines.driver.evaluate.run import COLUMNS

    with open_job(run, platform, overrides, as_json, uses_version=True) as job:
        which = choose_version(job, version, checkpoint, job_run)
        if job.config.model.text_only:
            _refuse_columns(by)
            measured = run_text_evaluate(job, open_model(job, which))
            job.output.report(measured)
            job.output.next(ask_text_model(job, measured.model_version))
            return
        report = run_evaluate(job, which, columns=tuple(by or COLUMNS), with_java=True, follow=True)
        job.output.report(report)
        job.output.next(*after_evaluation(job, report))


def _refuse_columns(by: list[str] | None) -> None:
    if by:
        raise UserError(
            "a text-only model cannot be evaluated for groups of rows",
            where="--by",
            got=", ".join(by),
            fix="leave --by out: the columns of table samples describe pictures",
        )


def choose_version(job: Job, version: str, checkpoint: int | None, job_run: str | None) -> str:
    """Return the version that the options of a command choose: `version`, or the version that `train` has recorded for
    a job run. If `checkpoint` is a step, return a version of the checkpoint at this step of the same training run.

    Raises:
        UserError: the options choose two versions, no version was recorded for the job run, or the checkpoint or the
            version of its training run does not exist.
    """
    if job_run is not None:
        version = read_trained_version(job, job_run, version)
    return version if checkpoint is None else register_checkpoint(job, version, checkpoint)


def open_model(job: Job, which: str) -> ModelFiles:
    """Find a version of the run's model in the registry, and download the version's files if there is no local copy.

    The function first registers the finished training runs that have no model version yet (`register_finished_runs`).

    Raises:
        UserError: the model has no version `which`. The error lists the existing versions.
    """
    from pipelines.driver.model_files import ModelFiles
    from pipelines.tracking.home_store.copied_version import find_copied_version

    register_finished_runs(job)
    version = find_copied_version(job.platform, job.model_name, which) or _download(job, which)
    return ModelFiles(
        folder=version.folder,
        digest=version.digest,
        name=job.model_name,
        version=version.number,
        run_id=version.run_id,
        remote=job.platform.remote,
    )


def _download(job: Job, which: str) -> CopiedVersion:
    """Find a version of the run's model with MLflow, and download the version's files if there is no local copy."""
    from pipelines.tracking.download import download
    from pipelines.tracking.home_store.copied_version import CopiedVersion
    from pipelines.tracking.registry import resolve

    version = resolve(job.platform, job.model_name, which)
    downloaded = download(job.platform, version)
    return CopiedVersion(version.version, version.run_id, downloaded.folder, downloaded.digest)


def open_split(job: Job, model: ModelFiles) -> Shards:
    """Open the shards of the run's evaluation split at the model's image size; write the shards if they are missing.

    Raises:
        UserError: the model is a text-only model.
    """
    from pipelines.formats.shards import Shards

    config = model.read_config()
    require_captioner(config, "an evaluation of captions")
    return Shards.open(Path(run_shard(job, job.config.data.evaluate_on, config.image).folder))


def open_object_words(config: RunConfig) -> ObjectWords | None:
    """Read the word list of objects from `data.object_words`, or return None if the run's config has no word list.

    Raises:
        UserError: the word list cannot be used.
    """
    from pipelines.driver.evaluate.hallucination import read_object_words

    return None if config.data.object_words is None else read_object_words(Path(config.data.object_words))


def evaluate_version(
    job: Job, model: ModelFiles, shards: Shards, columns: tuple[str, ...] | None = None, *, with_java: bool = False
) -> EvaluationReport:
    """Evaluate a version or reuse an evaluation, and store the metrics in MLflow and in the version's tags.

    If the generation settings differ from the version's own settings, the metrics are written neither to MLflow nor to
    the version's tags.
    """
    from jobs.log_evaluation import record_evaluation
    from pipelines.driver.evaluate.run import COLUMNS, evaluate

    objects = open_object_words(job.config)
    train = run_shard(job, "train", model.read_config().image)
    with show_elapsed("evaluate"):
        report = evaluate(
            job.spark,
            job.platform,
            model,
            shards.folder,
            Path(train.folder),
            columns=COLUMNS if columns is None else columns,
            with_java=with_java,
            objects=objects,
        )
    if report.settings:
        return report
    record_evaluation(job, report, shards)
    return report


def run_evaluate(
    job: Job, which: str, *, columns: tuple[str, ...] | None = None, with_java: bool = False, follow: bool = False
) -> EvaluationReport:
    """Run the evaluate stage: evaluate a version, then print the version's metrics and the baselines.

    If `follow` is True, the captions are generated with the command's generation settings instead of the version's.
    """
    from pipelines.driver.evaluate.metrics import describe_words

    model = open_model(job, which)
    if follow:
        model = with_overrides(job, model)
    report = evaluate_version(job, model, open_split(job, model), columns, with_java=with_java)
    reused = ", reused" if report.reused else ""
    job.output.line(
        "evaluate",
        f"{report.model_name} version {report.model_version}, {report.pictures:,} {report.split} pictures{reused}",
    )
    if report.settings:
        job.output.line("settings", ", ".join(f"{name} {value}" for name, value in report.settings))
    for name in SHOWN_METRICS:
        if name in report.metrics:
            metric = report.metrics[name]
            baselines = "  ".join(
                f"{baseline} {report.metrics[key].value:z.3f}"
                for baseline in ("constant", "neighbour")
                if (key := f"{baseline}_{name}") in report.metrics
            )
            job.output.line(
                "", f"{name:<12} {metric.value:z7.3f}  ({metric.low:z.3f} to {metric.high:z.3f})  {baselines}"
            )
    job.output.line("", f"texts are split into words by {describe_words(report.metrics)}")
    job.output.line("gallery", str(report.gallery))
    return report
