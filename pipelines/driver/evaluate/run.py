"""How good is a model version? Executors caption a split and score it, the driver turns the scores into metrics.

What comes back to the driver is text and numbers, a few hundred bytes a picture; pictures come back as thumbnails, and
only those the gallery shows. Everything is kept in one folder a version and split, and `report.json` is written last: a
second evaluation reads it and does nothing else, one that asks for more figures starts from the scores, and no model
runs twice.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pyspark.sql import DataFrame, SparkSession

from pipelines.driver.delta.retry import retry_on_conflict
from pipelines.driver.delta.settings import bounded_batches
from pipelines.driver.delta.tables import add_columns, ensure_tables
from pipelines.driver.evaluate.bootstrap import Interval, measure, slices
from pipelines.driver.evaluate.gallery import (
    GalleryRow,
    ModelCaption,
    select_rows,
    write_figures,
    write_html,
    write_png,
)
from pipelines.driver.evaluate.metrics import ScoredRow, captioned, has_java, meteor
from pipelines.driver.evaluate.scores import SCORES, evaluation_folder, read_scores, score, scores_hash
from pipelines.driver.model_files import ModelFiles
from pipelines.errors import StageFailed, UserError
from pipelines.executor.thumbnail import with_thumbnails
from pipelines.formats.run_folder import read_json, write_json
from pipelines.formats.shards import ShardRequest, Shards
from pipelines.formats.tables import EVALUATIONS
from pipelines.platform import Platform
from vlm.config import Config
from vlm.text.words import words

logger = logging.getLogger(__name__)

COLUMNS = ("format", "size", "length")
"""What slices are cut by: columns of `samples`, the longer side, the words of the first reference."""
SLICED = ("exact_match", "word_f1", "rouge_l", "cider", "loss", "token_accuracy", "blind_gap")
REPORT = "report.json"


class EvaluationReport(Config):
    """What a model version is worth on a split.

    Attributes:
        source: name of the data config.
        dataset_version: of `samples`, that last changed the source.
        scores_hash: equal for equal scores.
        pictures: of the split.
        left_out: picture-prompt pairs whose prompt leaves no room for a caption: `error_share` alone knows them.
        metrics: of the whole split, those of the baselines (constant_*, neighbour_*) too.
        columns: what the slices are cut by.
        slices: metrics of a part of the split, by `column=value`.
        folder: the scores, the report and the pages.
        gallery: page of worst and best rows.
        gallery_png: a picture of some rows.
        figures_png: a picture of the figures.
        reused: whether everything was there already.
    """

    model_name: str
    model_version: str
    run_id: str
    source: str
    split: str
    dataset_version: int
    scores_hash: str
    pictures: int
    left_out: int
    metrics: dict[str, Interval]
    columns: tuple[str, ...]
    slices: dict[str, dict[str, Interval]]
    folder: Path
    gallery: Path
    gallery_png: Path
    figures_png: Path
    reused: bool
    seconds: float

    def values(self) -> dict[str, float]:
        """Metrics without their intervals."""
        return {name: interval.value for name, interval in self.metrics.items()}

    def scores(self) -> list[ScoredRow]:
        """The rows."""
        return read_scores(self.folder / SCORES)


def evaluate(
    spark: SparkSession,
    platform: Platform,
    model: ModelFiles,
    shards_folder: Path,
    train_folder: Path,
    *,
    columns: Sequence[str] = COLUMNS,
    with_meteor: bool = False,
) -> EvaluationReport:
    """Measure a model version on the split that a shard folder holds.

    Writes table `evaluations` and the gallery. The metrics are those of `bootstrap.measure`.

    Args:
        spark: the session.
        platform: where.
        model: the version.
        shards_folder: the split.
        train_folder: the split that a nearest neighbour may copy from.
        columns: what slices are cut by.
        with_meteor: METEOR too, where there is Java: it takes seconds to start.

    Raises:
        UserError: the split is empty, or the folders do not hold what they should, or there is no such column.
        StageFailed: no prompt of the split leaves room for a caption, or an executor failed.
    """
    started = time.monotonic()
    model.read_config()
    shards, train = Shards.open(shards_folder), Shards.open(train_folder)
    folder = evaluation_folder(platform, model, shards, train)
    wanted = Wanted(tuple(columns), with_meteor and has_java())
    if (folder / REPORT).exists():
        found = read_json(folder / REPORT, EvaluationReport).model_copy(update=_files(folder) | {"reused": True})
        if wanted.within(found):
            return found
        wanted = wanted.beside(found)
    ensure_tables(spark, platform)
    add_columns(spark, platform, EVALUATIONS)
    report, rows = _evaluate(spark, model, (shards, train), folder, wanted)
    report = report.model_copy(update={"seconds": time.monotonic() - started})
    retry_on_conflict(partial(_merge, spark, platform, report), where=platform.table(EVALUATIONS.name))
    _write_pages(report, rows)
    write_json(folder / REPORT, report)
    return report


class Wanted(NamedTuple):
    """Which figures: what slices are cut by, and whether METEOR."""

    columns: tuple[str, ...]
    meteor: bool

    def within(self, report: EvaluationReport) -> bool:
        """Whether a report has them."""
        return set(self.columns) <= set(report.columns) and self.meteor <= ("meteor" in report.metrics)

    def beside(self, report: EvaluationReport) -> Wanted:
        """These and those that a report has."""
        columns = tuple(dict.fromkeys((*report.columns, *self.columns)))
        return Wanted(columns, self.meteor or "meteor" in report.metrics)


def _files(folder: Path) -> dict[str, Path]:
    """The paths of a report."""
    pages = {"gallery": "gallery.html", "gallery_png": "gallery.png", "figures_png": "figures.png"}
    return {"folder": folder} | {field: folder / name for field, name in pages.items()}


def _evaluate(
    spark: SparkSession, model: ModelFiles, splits: tuple[Shards, Shards], folder: Path, wanted: Wanted
) -> tuple[EvaluationReport, list[GalleryRow]]:
    """The figures on the first split, and its rows to show; a nearest neighbour copies from the second."""
    shards, train = splits
    request = shards.manifest.request
    if len(shards) == 0:
        raise UserError(
            "there is nothing to evaluate on",
            where=str(shards.folder),
            got=f"no picture of {request.source} is in split {request.split}",
            fix="set data.evaluate_on to another split, or give data.split.test a larger share",
        )
    samples = spark.read.option("versionAsOf", request.table_version).table(request.table)
    known = _check_columns(samples, request, wanted.columns)
    scored = score(spark, model, shards, train, folder)
    good = captioned(scored)
    if not good:
        raise StageFailed(
            "no caption can be made",
            where=f"{request.source}, split {request.split}",
            got="every prompt is too long for the model's context",
            fix="raise model.decoder.context, or lower model.generation.max_new_tokens, and train again",
        )
    report = EvaluationReport(
        model_name=model.name,
        model_version=model.version,
        run_id=model.run_id,
        source=request.source,
        split=request.split,
        dataset_version=request.table_version,
        scores_hash=scores_hash(model, shards, train),
        pictures=len(shards),
        left_out=len(scored) - len(good),
        metrics=measure(scored, further={"meteor": meteor(good)} if wanted.meteor else None),
        columns=wanted.columns,
        slices=slices(scored, _column_values(samples, good, wanted.columns, known), names=SLICED),
        reused=False,
        seconds=0.0,
        **_files(folder),
    )
    return report, _gallery_rows(samples, good)


# ------------------------------------------------------------------------------------------------ the table


def _rows(report: EvaluationReport) -> Iterator[dict[str, object]]:
    """Rows of table `evaluations`."""
    parts: list[tuple[str | None, Mapping[str, Interval]]] = [(None, report.metrics), *report.slices.items()]
    shared = {name: getattr(report, name) for name in EVALUATIONS.names if name in EvaluationReport.model_fields}
    for part, metrics in parts:
        for name, metric in metrics.items():
            yield shared | {"slice": part, "metric": name, "n": report.pictures} | metric.model_dump()


def _merge(spark: SparkSession, platform: Platform, report: EvaluationReport) -> None:
    """Write rows; one that is in the table already with the same numbers stays as it is."""
    now = datetime.now(UTC)
    rows = [tuple((row | {"evaluated_at": now})[name] for name in EVALUATIONS.names) for row in _rows(report)]
    new = spark.createDataFrame(rows, EVALUATIONS.ddl())
    keys = " AND ".join(f"t.{key} <=> s.{key}" for key in EVALUATIONS.key)
    differs = " OR ".join(f"t.{name} <> s.{name}" for name in ("value", "low", "high", "n"))
    spark.sql(
        f"MERGE INTO {platform.table(EVALUATIONS.name)} t USING {{new}} s ON {keys} "
        f"WHEN MATCHED AND ({differs}) THEN UPDATE SET * WHEN NOT MATCHED THEN INSERT *",
        new=new,
    )


# ------------------------------------------------------------------------------------------------ samples


def _check_columns(samples: DataFrame, request: ShardRequest, columns: Sequence[str]) -> list[str]:
    """Those that are columns of the table."""
    own = {"size": {"width", "height"}, "length": set()}
    missing = [name for name in columns if not own.get(name, {name}) <= set(samples.columns)]
    if missing:
        raise UserError(
            "slices cannot be cut by a column that is not there",
            where=request.table,
            got=", ".join(missing),
            fix=f"there are: {', '.join([*samples.columns, *own])}",
        )
    return [name for name in columns if name not in own]


def _column_values(
    samples: DataFrame, scored: Sequence[ScoredRow], columns: Sequence[str], known: Sequence[str]
) -> dict[str, dict[str, object]]:
    """By column, the value of each picture."""
    values: dict[str, dict[str, object]] = {name: {} for name in columns}
    wanted = [*known, *(["width", "height"] if "size" in columns else [])]
    if wanted:
        ids = samples.sparkSession.createDataFrame([(item.image_id,) for item in scored], "image_id STRING")
        for row in samples.join(ids.distinct(), "image_id", "left_semi").select("image_id", *set(wanted)).collect():
            for name in known:
                values[name][row["image_id"]] = row[name]
            if "size" in columns:
                values["size"][row["image_id"]] = max(row["width"], row["height"])
    if "length" in columns:
        values["length"] = {item.image_id: len(words(item.references[0])) for item in scored}
    return values


def read_thumbnails(samples: DataFrame, image_ids: Sequence[str]) -> dict[str, bytes | None]:
    """Read pictures of `samples` and return their thumbnails by image_id."""
    wanted = samples.where(samples.image_id.isin(list(image_ids))).select("image_id", "image")
    with bounded_batches(samples.sparkSession):
        thumbnails = partial(with_thumbnails, column="image", max_pixels=sys.maxsize)  # ingest has applied its limit
        rows = wanted.mapInArrow(thumbnails, "image_id string, thumbnail binary").collect()
    return {row["image_id"]: row["thumbnail"] and bytes(row["thumbnail"]) for row in rows}


def _gallery_rows(samples: DataFrame, scored: Sequence[ScoredRow]) -> list[GalleryRow]:
    """Return the worst rows, the best rows and a sample, with thumbnails."""
    shown = select_rows(scored)
    thumbnails = read_thumbnails(samples, [item.image_id for item, _ in shown])
    return [
        GalleryRow(
            image_id=item.image_id,
            thumbnail=thumbnails[item.image_id],
            prompt=item.prompt,
            human=" / ".join(item.references),
            captions=(ModelCaption("Model", item.caption or "", item.exact, item.f1),),
            groups=groups,
        )
        for item, groups in shown
    ]


def _write_pages(report: EvaluationReport, rows: Sequence[GalleryRow]) -> None:
    """Write the HTML gallery, the PNG gallery of the sample, and the bar chart of the metrics."""
    title = f"{report.model_name} version {report.model_version} on {report.source} ({report.split})"
    about = (
        f"{report.pictures} pictures, table version {report.dataset_version}; ranges are 95 % bootstrap intervals. "
        "Shown are the worst and the best rows by word F1, and a sample that is neither."
    )
    write_html(report.gallery, title, about, report.metrics, rows, slices=report.slices)
    write_png(report.gallery_png, title, [row for row in rows if "sample" in row.groups])
    write_figures(report.figures_png, title, report.metrics, report.slices)
