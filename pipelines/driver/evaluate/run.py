"""Evaluation of a model version: executors caption and score a split, and the driver computes metrics from the scores.

The driver receives a few hundred bytes of text and numbers per picture, and thumbnails of the pictures in the gallery.
Each pair of a model version and a split has its own folder, in which `report.json` is the last file to be written. A
repeated evaluation reads `report.json` instead of computing the report. If a later evaluation requests further metrics,
it computes these metrics from the stored scores, without running the model again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from pydantic import Field
from pyspark.sql import DataFrame, SparkSession

from pipelines.driver.delta.tables import ensure_tables
from pipelines.driver.delta.thumbnails import read_thumbnails
from pipelines.driver.delta.versions import rows_of_source
from pipelines.driver.evaluate.bootstrap import Interval, measure, slice_metrics, slices_of
from pipelines.driver.evaluate.coco import has_java, java_metrics
from pipelines.driver.evaluate.gallery import (
    ABOUT_ATTENTION,
    GalleryRow,
    ModelCaption,
    headline_bars,
    select_rows,
    slice_tables,
    write_figures,
    write_html,
    write_png,
)
from pipelines.driver.evaluate.hallucination import ObjectWords, hallucination_metrics
from pipelines.driver.evaluate.metrics import Metric, ScoredRow, captioned, describe_words
from pipelines.driver.evaluate.scores import (
    ATTENTION_ROWS,
    SCORES,
    draw_attention,
    evaluation_folder,
    read_scores,
    score_split,
    scores_hash,
)
from pipelines.driver.evaluate.table import merge_report
from pipelines.driver.evaluate.verdict import verdict
from pipelines.driver.model_files import ModelFiles
from pipelines.errors import StageFailed, UserError
from pipelines.formats.run_folder import read_json, write_json
from pipelines.formats.shards import ShardRequest, Shards
from pipelines.pages.page import Gallery, Page, WordPicture
from pipelines.platform import Platform
from vlm.config import Config, GenerationConfig
from vlm.text.words import TOKENISATION, words

logger = logging.getLogger(__name__)

COLUMNS = ("format", "size", "length")
"""Default columns by which slices are made. `size` is the longer side in pixels, and `length` is the mean number of
words of the references."""
SLICE_METRICS = ("exact_match", "word_f1", "rouge_l", "cider", "loss", "token_accuracy", "blind_gap")
REPORT = "report.json"
DEFINITIONS: int = 2
"""Version number of the metric definitions. A report with an older version number is computed again from the stored
scores.

Version 2 computes METEOR over the whole corpus, and chooses a constant caption for each metric separately.
"""


class EvaluationReport(Config):
    """Report on the evaluation of a model version on a split.

    Attributes:
        source: name of the source, which is the name of its data config.
        dataset_version: version of `samples` that last changed the source.
        model_digest: digest of the model's files; empty in a report that Lakesight 0.1.0 wrote.
        scores_hash: hash of everything that determines the scores, such as model files and pictures
            (`scores.scores_hash`).
        pictures: number of pictures of the split.
        left_out: number of rows whose prompt leaves no room for a caption; only `error_share` counts these rows.
        tokenisation: name of the rules that split texts into words; empty in a report of an earlier Lakesight version.
            A report of an earlier Lakesight version is computed again from the stored scores.
        definitions: version number of the metric definitions; 1 in reports of earlier versions of Lakesight.
        settings: generation settings of the captions; null if the captions were generated with the model version's own
            settings at temperature 0. A report whose `settings` are not null is not merged into table `evaluations`.
        object_words: hash of the word list with which `chair_i` and `chair_s` were computed, or empty if these metrics
            were not computed.
        metrics: metrics of the whole split, including the metrics of the baselines (constant_*, neighbour_*).
        columns: names of the columns whose values define the evaluation slices.
        slices: a dict from the name of a slice (`column=value`) to the metrics of the slice.
        slice_rows: a dict from the name of a slice to its number of rows; empty in a report of an earlier version.
        folder: folder of the scores, the report and the pages.
        gallery: HTML page that shows the worst rows, the best rows and a sample of all other rows.
        gallery_png: PNG file that shows the sample of the rows.
        figures_png: PNG file with a bar chart of the metrics.
        reused: whether the whole report was read from an earlier evaluation.
        seconds: duration of the evaluation that computed the report, in seconds.
    """

    model_name: str
    model_version: str
    run_id: str
    model_digest: str = ""
    source: str
    split: str
    dataset_version: int
    scores_hash: str
    pictures: int
    left_out: int
    tokenisation: str = ""
    definitions: int = 1
    settings: GenerationConfig | None = None
    object_words: str = ""
    metrics: dict[str, Interval]
    columns: tuple[str, ...]
    slices: dict[str, dict[str, Interval]]
    slice_rows: dict[str, int] = Field(default_factory=dict)
    folder: Path
    gallery: Path
    gallery_png: Path
    figures_png: Path
    reused: bool
    seconds: float

    def values(self) -> dict[str, float]:
        """Return the values of the metrics, without the intervals."""
        return {name: interval.value for name, interval in self.metrics.items()}

    def scores(self) -> list[ScoredRow]:
        """Read the scores of all rows."""
        return read_scores(self.folder / SCORES)


def evaluate(
    spark: SparkSession,
    platform: Platform,
    model: ModelFiles,
    shards_folder: Path,
    train_folder: Path,
    *,
    columns: Sequence[str] = COLUMNS,
    with_java: bool = False,
    objects: ObjectWords | None = None,
) -> EvaluationReport:
    """Compute the metrics of a model version on a split, and write them to table `evaluations` and to the gallery.

    Args:
        spark: Spark session.
        platform: platform that stores the tables and reports.
        model: model version to evaluate, with the folder of its files.
        shards_folder: shard folder of the split.
        train_folder: shard folder of the training split, for the nearest-neighbour baseline.
        columns: names of the columns whose values define the evaluation slices.
        with_java: whether to compute METEOR and COCO's figures. METEOR and COCO's figures need Java, and are left out
            if Java is not installed. Java takes seconds to start.
        objects: word list for the metrics of object hallucination, or None to leave out these metrics.

    Raises:
        UserError: the split is empty, a folder contains no model or no shards, or a column does not exist.
        StageFailed: no prompt of the split leaves room for a caption, or an executor failed.
    """
    started = time.monotonic()
    model.read_config()
    shards, train = Shards.open(shards_folder), Shards.open(train_folder)
    folder = _find_folder(platform, model, shards, train)
    requested = RequestedMetrics(tuple(columns), with_java and has_java(), objects)
    if (folder / REPORT).exists():
        found = read_json(folder / REPORT, EvaluationReport).model_copy(update=_report_paths(folder) | {"reused": True})
        if requested.included_in(found) and all(path.exists() for path in _report_paths(folder).values()):
            merge_report(spark, platform, found, shards)
            return found
        requested = requested.merged_with(found)
    ensure_tables(spark, platform)
    report, rows = _evaluate(spark, model, (shards, train), folder, requested)
    report = report.model_copy(update={"seconds": time.monotonic() - started})
    merge_report(spark, platform, report, shards)
    _write_pages(report, rows)
    write_json(folder / REPORT, report)
    return report


def _find_folder(platform: Platform, model: ModelFiles, shards: Shards, train: Shards) -> Path:
    """Return the folder of an evaluation.

    Lakesight 0.1.0 did not store the digest of an evaluated model. If a report has no digest, this function stores the
    digest of the model in the report. With this digest, the report is not used for a model with different files, even
    if both models come from the same MLflow run.
    """
    folder = evaluation_folder(platform, model, shards, train)
    earlier = evaluation_folder(platform, model.model_copy(update={"digest": ""}), shards, train)
    if folder == earlier or folder.exists() or not (earlier / REPORT).exists():
        return folder
    report = read_json(earlier / REPORT, EvaluationReport)
    if not report.model_digest:
        write_json(earlier / REPORT, report.model_copy(update={"model_digest": model.digest}))
    return earlier if report.model_digest in {"", model.digest} else folder


class RequestedMetrics(NamedTuple):
    """Optional parts of an evaluation: columns of slices, metrics that need Java, and the word list for CHAIR."""

    columns: tuple[str, ...]
    java: bool
    objects: ObjectWords | None

    def functions(self, scored: Sequence[ScoredRow]) -> dict[str, Metric]:
        """Return the requested optional metrics of the whole split, as functions of the weights of the rows."""
        found = java_metrics(captioned(scored)) if self.java else {}
        return found | (hallucination_metrics(scored, self.objects) if self.objects else {})

    def included_in(self, report: EvaluationReport) -> bool:
        """Return whether a report has all requested optional metrics, computed with the current metric definitions."""
        has_metrics = set(self.columns) <= set(report.columns) and self.java <= ("meteor" in report.metrics)
        has_metrics &= self.objects is None or self.objects.digest() == report.object_words
        return has_metrics and (report.tokenisation, report.definitions) == (TOKENISATION, DEFINITIONS)

    def merged_with(self, report: EvaluationReport) -> RequestedMetrics:
        """Add a report's optional metrics, except those that need a word list, to the requested optional metrics."""
        columns = tuple(dict.fromkeys((*report.columns, *self.columns)))
        return RequestedMetrics(columns, self.java or ("meteor" in report.metrics and has_java()), self.objects)


def _report_paths(folder: Path) -> dict[str, Path]:
    """Return a dict from the name of a field of the report, such as 'gallery', to the path in this field."""
    pages = {"gallery": "gallery.html", "gallery_png": "gallery.png", "figures_png": "figures.png"}
    return {"folder": folder} | {field: folder / name for field, name in pages.items()}


def _evaluate(
    spark: SparkSession, model: ModelFiles, splits: tuple[Shards, Shards], folder: Path, requested: RequestedMetrics
) -> tuple[EvaluationReport, list[GalleryRow]]:
    """Compute the report and the rows of the gallery. `splits` are the evaluated split and the training split."""
    shards, train = splits
    request = shards.manifest.request
    if len(shards) == 0:
        raise UserError(
            "the split to evaluate on is empty",
            where=str(shards.folder),
            got=f"no picture of {request.source} is in split {request.split}",
            fix="set data.evaluate_on to another split, or give data.split.test a larger share",
        )
    table_columns = _check_columns(spark.table(request.table), request, requested.columns)
    scored = score_split(spark, model, shards, train, folder)
    with_caption = captioned(scored)
    if not with_caption:
        raise StageFailed(
            "no row of the split can be captioned",
            where=f"{request.source}, split {request.split}",
            got="every prompt is too long for the model's context",
            fix="raise model.decoder.context, or lower model.generation.max_new_tokens, and train again",
        )
    samples = rows_of_source(spark, request.table, request.source)
    values = _column_values(samples, with_caption, requested.columns, table_columns)
    slices = slices_of(values)
    report = EvaluationReport(
        model_name=model.name,
        model_version=model.version,
        run_id=model.run_id,
        model_digest=model.digest,
        source=request.source,
        split=request.split,
        dataset_version=request.table_version,
        scores_hash=scores_hash(model, shards, train),
        pictures=len(shards),
        left_out=len(scored) - len(with_caption),
        tokenisation=TOKENISATION,
        definitions=DEFINITIONS,
        settings=model.settings,
        object_words=requested.objects.digest() if requested.objects else "",
        metrics=measure(scored, further=requested.functions(scored)),
        columns=requested.columns,
        slices=slice_metrics(scored, values, names=SLICE_METRICS),
        slice_rows={name: int(inside.sum()) for name, inside in slices.items()},
        reused=False,
        seconds=0.0,
        **_report_paths(folder),
    )
    names = {
        item.key: tuple(name for name, inside in slices.items() if inside[row]) for row, item in enumerate(with_caption)
    }
    shown = select_rows(with_caption)
    worst = [item for item, groups in shown if "worst" in groups][:ATTENTION_ROWS]
    return report, _gallery_rows(samples, shown, names, draw_attention(spark, model, shards, worst, folder))


# ------------------------------------------------------------------------------------------------ samples


def _check_columns(samples: DataFrame, request: ShardRequest, columns: Sequence[str]) -> list[str]:
    """Check the columns by which slices are made, and return the names of the columns that are not computed.

    Raises:
        UserError: a name is neither a column of table `samples` nor a computed column.
    """
    computed = {"size": {"width", "height"}, "length": set()}
    missing = [name for name in columns if not computed.get(name, {name}) <= set(samples.columns)]
    if missing:
        raise UserError(
            "an evaluation slice needs a column that the table does not have",
            where=request.table,
            got=", ".join(missing),
            fix=f"choose from these columns with --by: {', '.join([*samples.columns, *computed])}",
        )
    return [name for name in columns if name not in computed]


def _column_values(
    samples: DataFrame, scored: Sequence[ScoredRow], columns: Sequence[str], table_columns: Sequence[str]
) -> dict[str, list[object]]:
    """Return the values by which slices are made: a dict from column name to a list with a value for each row."""
    pictures: dict[str, dict[str, object]] = {}
    needed = [*table_columns, *(["width", "height"] if "size" in columns else [])]
    if needed:
        ids = samples.sparkSession.createDataFrame([(item.image_id,) for item in scored], "image_id STRING")
        for row in samples.join(ids.distinct(), "image_id", "left_semi").select("image_id", *set(needed)).collect():
            pictures[row["image_id"]] = {name: row[name] for name in needed}
            if "size" in columns:
                pictures[row["image_id"]]["size"] = max(row["width"], row["height"])
    return {
        name: reference_lengths(scored)
        if name == "length"
        else [pictures.get(item.image_id, {}).get(name) for item in scored]
        for name in columns
    }


def reference_lengths(scored: Sequence[ScoredRow]) -> list[object]:
    """Return the rounded mean number of words of the references of each row. Rows of one picture may differ."""
    return [round(fmean(len(words(reference)) for reference in item.references)) for item in scored]


def _gallery_rows(
    samples: DataFrame,
    shown: Sequence[tuple[ScoredRow, tuple[str, ...]]],
    slices: Mapping[tuple[str, str], tuple[str, ...]],
    attention: Mapping[tuple[str, str], tuple[WordPicture, ...]],
) -> list[GalleryRow]:
    """Return the rows that the gallery shows, with their thumbnails.

    `slices` maps a row's key to the names of its slices. `attention` maps a row's key to its attention pictures.
    """
    thumbnails = read_thumbnails(samples, [item.image_id for item, _ in shown])
    return [
        GalleryRow(
            image_id=item.image_id,
            thumbnail=thumbnails.get(item.image_id),
            prompt=item.prompt,
            human=" / ".join(dict.fromkeys(item.references)),
            captions=(ModelCaption.of_row("Model", item),),
            groups=(*groups, *slices[item.key]),
            attention=attention.get(item.key, ()),
        )
        for item, groups in shown
    ]


def _write_pages(report: EvaluationReport, rows: Sequence[GalleryRow]) -> None:
    """Write the HTML gallery, the PNG gallery of the sample, and the bar chart of the metrics."""
    title = f"{report.model_name} version {report.model_version} on {report.source} ({report.split})"
    about = (
        f"{report.pictures} pictures, table version {report.dataset_version}. {_describe_settings(report)}"
        "Intervals are 95 % bootstrap intervals. "
        f"Texts are split into words by {describe_words(report.metrics)}. "
        "The page shows the worst and the best rows by word F1, and a sample of all other rows."
    )
    if any(row.attention for row in rows):
        about += f" {ABOUT_ATTENTION}"
    page = Page(
        title,
        about,
        tables=slice_tables(report.slices, report.slice_rows),
        galleries=[Gallery("", [row.card() for row in rows])],
        verdict=verdict(report.metrics, report.pictures),
        bars=headline_bars(report.metrics),
    )
    write_html(report.gallery, page, report.metrics)
    write_png(report.gallery_png, title, [row for row in rows if "sample" in row.groups])
    write_figures(report.figures_png, title, report.metrics, report.slices)


def _describe_settings(report: EvaluationReport) -> str:
    """Return a sentence with the generation settings, or an empty string for the model version's own settings."""
    if report.settings is None:
        return ""
    return f"Settings: {', '.join(f'{name} {value}' for name, value in report.settings)}. "
