"""Plan of an ingest: find out what each input picture adds to `samples`.

The rows of an ingest plan do not contain the pictures. Two ingests of one source may run at the same time. Delta
commits are atomic, but a plan may be out of date when it is committed, because another ingest may have added the same
pictures. An ingest plan therefore records the version of `samples` that the plan is based on. If another ingest has
committed rows of the same source after the recorded version, the write raises `WriteConflict`. The caller then makes a
new plan from the same decoded rows.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import StructType

from pipelines.driver.delta.versions import read_versions
from pipelines.driver.ingest.decode import READ_ORDER, DecodedRows, IngestRequest
from pipelines.driver.ingest.spill import SpillFolder
from pipelines.driver.ingest.table_rows import Stamp, existing_rows, rows_with_keys_of
from pipelines.executor.ingest.merge_texts import MERGED, merge_texts_of_pictures
from pipelines.executor.ingest.spill import POSITION
from pipelines.formats.tables import SAMPLES
from pipelines.platform import Platform

logger = logging.getLogger(__name__)

TEXT = "struct<prompt:string,text:string>"
TEXTS = f"array<{TEXT}>"
FILE = "left(source_row, length(source_row) - length(substring_index(source_row, '#', -1)))"
"""SQL expression for the file part of `source_row`, up to and including the last `#`."""


@dataclass(frozen=True)
class PlanTotals:
    """Row counts and picture counts of an ingest plan.

    Attributes:
        rows_in: number of rows of the input.
        refused: number of rows that executors refused.
        conflicting: number of rows that the plan refuses because a different picture has the same id.
        overfull: number of rows that would give a picture more texts than `data.limits.max_texts`.
        usable: number of rows that are neither refused nor conflicting nor overfull.
        new: number of pictures that are not yet in `samples`.
        updated: number of pictures in `samples` that get an additional text, or one more copy of a text.
        contributing: number of rows that add a new picture, or a text that the row's picture did not have.
    """

    rows_in: int = 0
    refused: int = 0
    conflicting: int = 0
    overfull: int = 0
    usable: int = 0
    new: int = 0
    updated: int = 0
    contributing: int = 0

    @property
    def bad(self) -> int:
        """Number of rows that cannot become samples."""
        return self.refused + self.conflicting + self.overfull


@dataclass(frozen=True)
class IngestPlan:
    """Decoded rows, and what each picture adds to `samples`.

    Attributes:
        request: ingest request that the rows belong to.
        spill: spill folder with the pictures and payloads.
        outcomes: one decoded row per record of the input, as in `DecodedRows`.
        existing: rows that `samples` already has for the source; no rows if the plan replaces the source.
        pictures: planned pictures, one row per picture, from `plan_pictures`.
        totals: row counts and picture counts.
        stamp: values that all written rows have in common, such as the ingest_id.
    """

    request: IngestRequest
    spill: SpillFolder
    outcomes: DataFrame
    existing: DataFrame
    pictures: DataFrame
    totals: PlanTotals
    stamp: Stamp


def plan_ingest(spark: SparkSession, platform: Platform, decoded: DecodedRows) -> IngestPlan:
    """Compare decoded rows with the current rows of their source in `samples`."""
    request = decoded.request
    version = read_versions(spark, platform, request.source).last_change
    stamp = Stamp(request.source, request.ingest_id, datetime.now(UTC), version)
    existing = existing_rows(spark, platform, SAMPLES, request.source)
    existing = existing.limit(0) if request.replace else existing
    max_texts = request.config.limits.max_texts
    usable = decoded.outcomes.filter(F.col("reason").isNull())
    known = rows_with_keys_of(existing, usable, "image_id", decoded.rows_in)
    pictures = decoded.spill.materialize(plan_pictures(decoded.outcomes, known, max_texts), "plan")
    totals = _count(decoded, pictures)
    return IngestPlan(request, decoded.spill, decoded.outcomes, existing, pictures, totals, stamp)


def plan_pictures(outcomes: DataFrame, existing: DataFrame, max_texts: int | None = None) -> DataFrame:
    """Return one row per picture of the input, without the bytes of the picture.

    The columns are image_id, sha256, source_row, split, fingerprint, is_new and the following columns:

    - rows: number of usable input rows of the picture;
    - spilled: POSITION, and the format, width and height of the picture;
    - conflicting: whether the picture is refused, because another picture has the same id;
    - known_split: split of the picture in `samples`, or null;
    - known_texts: texts of the picture in `samples`;
    - new_texts: texts to append to the texts in `samples`;
    - contributing: number of rows that add a text;
    - full: all accepted texts of the picture if the input has more texts than `max_texts` allows, else null.

    The texts are merged by `pipelines.executor.ingest.merge_texts`. They are ordered by file, then by row in the file,
    then by text in the row.

    If two different pictures have the same id and one of them is in `samples`, the picture in `samples` stays and the
    other picture is refused. If neither picture is in `samples`, both pictures are refused, because files have no fixed
    order that decides which picture comes first. If the rows of a picture have several splits, the picture gets the
    first of test, val and train.
    """
    pictures = (
        outcomes.filter(F.col("reason").isNull())
        .groupBy("image_id", "sha256")
        .agg(
            F.count("*").alias("rows"),
            F.min(F.struct(*POSITION.names, "format", "width", "height")).alias("spilled"),
            F.min("source_row").alias("source_row"),
            F.min_by("split", held_out_rank("split")).alias("split"),
            F.min("fingerprint").alias("fingerprint"),
            F.sort_array(F.collect_list(F.struct(F.expr(FILE), READ_ORDER, "texts"))).alias("in_order"),
        )
        .withColumn("pictures_of_id", F.count("*").over(Window.partitionBy("image_id")))
    )
    known = existing.select("image_id", *(F.col(name).alias(f"known_{name}") for name in ("sha256", "split", "texts")))
    joined = pictures.join(known, "image_id", "left").select(
        "image_id",
        "sha256",
        "rows",
        "spilled",
        "source_row",
        "split",
        "fingerprint",
        F.col("known_sha256").isNull().alias("is_new"),
        F.coalesce(F.col("known_sha256") != F.col("sha256"), F.col("pictures_of_id") > 1).alias("conflicting"),
        "known_split",
        F.coalesce("known_texts", F.array().cast(TEXTS)).alias("known_texts"),
        F.col("in_order.texts").cast(f"array<{TEXTS}>").alias("row_texts"),
    )
    schema = StructType([*joined.schema.fields[:-1], *from_arrow_schema(MERGED).fields])
    return joined.mapInArrow(partial(merge_texts_of_pictures, max_texts=max_texts), schema)


def held_out_rank(split: str) -> Column:
    """Return a column of numbers that sort the splits in the order test, val, train."""
    return F.array_position(F.array(F.lit("test"), F.lit("val"), F.lit("train")), F.col(split))


def _count(decoded: DecodedRows, pictures: DataFrame) -> PlanTotals:
    def total(value: str, condition: str) -> Column:
        return F.expr(f"coalesce(sum({value}) FILTER (WHERE {condition}), 0)")

    counts = pictures.agg(
        total("rows", "conflicting").alias("conflicting"),
        total("rows", "NOT conflicting").alias("usable"),
        total("1", "NOT conflicting AND is_new").alias("new"),
        total("1", "NOT conflicting AND NOT is_new AND size(new_texts) > 0").alias("updated"),
        total("contributing", "NOT conflicting").alias("contributing"),
    ).collect()[0]
    totals = counts.asDict()
    if decoded.request.config.limits.max_texts is not None:
        totals["overfull"] = overfull_rows(decoded.outcomes, pictures).count()
        totals["usable"] -= totals["overfull"]
    return PlanTotals(decoded.rows_in, decoded.refused, **totals)


def overfull_rows(outcomes: DataFrame, pictures: DataFrame) -> DataFrame:
    """Return the decoded rows that would give a picture more texts than `data.limits.max_texts`.

    Args:
        outcomes: decoded rows of the source, without pictures and payloads.
        pictures: pictures from `plan_pictures`.
    """
    full = pictures.filter("full IS NOT NULL AND NOT conflicting").select("image_id", "sha256", "full")
    rows = outcomes.filter(F.col("reason").isNull()).join(full, ["image_id", "sha256"])
    return rows.filter("exists(texts, text -> NOT array_contains(full, text))").select(outcomes.columns)


def count_pictures_of_other_splits(pictures: DataFrame) -> int:
    """Count the pictures that stay in the split of an earlier ingest, although the rows of this ingest have another
    split.

    Args:
        pictures: pictures from `plan_pictures`.
    """
    count = pictures.filter("NOT conflicting AND known_split <> split").count()
    if count:
        logger.warning(
            "%d pictures stay in the split of an earlier ingest, although their rows in this ingest have another "
            "split. To apply the splits of the whole input, run `lakesight ingest --refresh`",
            count,
        )
    return count


def count_pictures_across_splits(outcomes: DataFrame) -> int:
    """Count the pictures of the input whose bytes occur in more than one split of the source."""
    pictures = outcomes.filter(F.col("reason").isNull()).groupBy("sha256").agg(F.count_distinct("split").alias("n"))
    across = pictures.filter("n > 1").count()
    if across:
        logger.warning("%d pictures occur, with the same bytes, in more than one split of the source", across)
    return across
