"""The plan of an ingest: what each picture that came brings, in narrow rows; no picture is in it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from pipelines.executor.ingest.spill import PLACE

logger = logging.getLogger(__name__)

TEXTS = "array<struct<prompt:string,text:string>>"
BROUGHT = """
    aggregate(
        array_sort(came),
        named_struct('seen', known, 'rows', 0),
        (so_far, texts) -> named_struct(
            'seen', array_union(so_far.seen, texts),
            'rows', so_far.rows + IF(size(array_except(texts, so_far.seen)) > 0, 1, 0)
        ),
        so_far -> so_far.rows
    )
"""
"""Rows that brought a text which neither `samples` nor a row before them has; in order of their texts, so that the
count depends on the rows alone."""


def plan_of(outcomes: DataFrame, known: DataFrame) -> DataFrame:
    """One narrow row a picture that came: what it is, what of it is new, and whether it fights over its id.

    Columns: image_id, sha256, rows, place (of one of its rows: PLACE, format, width and height), source_row, split,
    fingerprint, fresh (texts that `samples` lacks), brought (rows that brought some of them), is_new, conflicting.

    Two pictures with one id: the one that `samples` has stays; if it has neither, neither is taken, because which came
    first depends on the order files are read in. A picture given to two splits is held out: test before val before
    train.
    """
    pictures = (
        outcomes.filter(F.col("reason").isNull())
        .groupBy("image_id", "sha256")
        .agg(
            F.count("*").alias("rows"),
            F.min(F.struct(*PLACE.names, "format", "width", "height")).alias("place"),
            F.min("source_row").alias("source_row"),
            F.min_by("split", held_out_first("split")).alias("split"),
            F.min("fingerprint").alias("fingerprint"),
            F.collect_list("texts").alias("came"),
        )
        .withColumn("claims", F.count("*").over(Window.partitionBy("image_id")))
    )
    there = known.select("image_id", F.col("sha256").alias("known_sha256"), F.col("texts").alias("known_texts"))
    joined = pictures.join(there, "image_id", "left").withColumns(
        {"known": F.coalesce("known_texts", F.array().cast(TEXTS)), "came": F.col("came").cast(f"array<{TEXTS}>")}
    )
    return joined.select(
        "image_id",
        "sha256",
        "rows",
        "place",
        "source_row",
        "split",
        "fingerprint",
        F.array_except(F.flatten("came"), "known").alias("fresh"),
        F.expr(BROUGHT).alias("brought"),
        F.col("known_sha256").isNull().alias("is_new"),
        F.coalesce(F.col("known_sha256") != F.col("sha256"), F.col("claims") > 1).alias("conflicting"),
    )


def held_out_first(split: str) -> Column:
    """A number that sorts splits: test, val, train."""
    return F.array_position(F.array(F.lit("test"), F.lit("val"), F.lit("train")), F.col(split))


@dataclass(frozen=True)
class Totals:
    """Numbers of rows (in; refused by an executor; of pictures that fight over an id; usable) and what is new.

    `new` counts pictures that `samples` lacks, `updated` those that get a further text, `brought` the rows that brought
    either.
    """

    rows_in: int = 0
    refused: int = 0
    conflicting: int = 0
    usable: int = 0
    new: int = 0
    updated: int = 0
    brought: int = 0

    @property
    def bad(self) -> int:
        """Rows that cannot be samples."""
        return self.refused + self.conflicting


class Counted(NamedTuple):
    """Rows that came, and how many of them an executor refused."""

    rows_in: int
    refused: int


def counted(outcomes: DataFrame) -> Counted:
    """Count what came."""
    row = outcomes.agg(F.count("*").alias("rows_in"), F.count("reason").alias("refused")).collect()[0]
    return Counted(**row.asDict())


def totals_of(came: Counted, plan: DataFrame) -> Totals:
    """Count what of that which came is new."""

    def total(what: str, where: str) -> Column:
        return F.expr(f"coalesce(sum({what}) FILTER (WHERE {where}), 0)")

    planned = plan.agg(
        total("rows", "conflicting").alias("conflicting"),
        total("rows", "NOT conflicting").alias("usable"),
        total("1", "NOT conflicting AND is_new").alias("new"),
        total("1", "NOT conflicting AND NOT is_new AND size(fresh) > 0").alias("updated"),
        total("brought", "NOT conflicting").alias("brought"),
    ).collect()[0]
    return Totals(**came._asdict(), **planned.asDict())


def pictures_across_splits(outcomes: DataFrame) -> int:
    """Pictures of the input with the same bytes in two splits, where the source gives the splits."""
    pictures = outcomes.filter(F.col("reason").isNull()).groupBy("sha256").agg(F.count_distinct("split").alias("n"))
    across = pictures.filter("n > 1").count()
    if across:
        logger.warning("%d pictures have the same bytes in two splits: the source says so", across)
    return across
