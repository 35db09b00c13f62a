"""Removal of pictures from `samples`, if the source table has deleted or changed the rows of the pictures.

A picture is removed only if the rows show that its source row is gone or different. A picture stays if it merely cannot
be read at the moment. If the share of refused rows exceeds `data.limits.max_bad_share`, pictures without a usable row
stay too.
"""

from __future__ import annotations

import logging

from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from pipelines.driver.ingest.decode import DecodedRows
from pipelines.driver.ingest.plan import held_out_rank
from pipelines.driver.ingest.sources.source import Covered
from pipelines.driver.ingest.table_rows import merge_into, rows_of_source
from pipelines.errors import UserError
from pipelines.formats.tables import QUARANTINE, SAMPLES
from pipelines.platform import Platform

logger = logging.getLogger(__name__)

UNREADABLE = "unreadable_file"
KEPT_REASONS = ("decode_timeout", "decoder_crash", UNREADABLE)
"""Quarantine reasons that depend on the machine or on a picture server. For these reasons, an ingest may refuse a row
that an earlier ingest has accepted."""
KEY = ("image_id", "sha256")


def count_unusable(decoded: DecodedRows) -> int:
    """Count the rows that cannot be used, or that the ingest plan may refuse because of their id.

    The plan refuses rows with equal ids and different pictures. If `samples` has one of these pictures, the plan
    accepts the rows of this picture.
    """
    usable = decoded.outcomes.filter(F.col("reason").isNull())
    conflicting = _conflicting_ids(usable).agg(F.sum("rows")).head()
    return decoded.refused + int((conflicting and conflicting[0]) or 0)


def _conflicting_ids(usable: DataFrame) -> DataFrame:
    """Return the ids that belong to several pictures (image_id), and the number of their rows (rows)."""
    ids = usable.groupBy("image_id").agg(F.count_distinct("sha256").alias("pictures"), F.count("*").alias("rows"))
    return ids.filter("pictures > 1").select("image_id", "rows")


def has_no_usable_row(
    spark: SparkSession, platform: Platform, decoded: DecodedRows, covered: Covered, unusable: int
) -> bool:
    """Return true if no row of the source table can be used. Every picture of the table would then be removed.

    If only changed rows of the table were read, no changed row may be usable, and the changed rows must cover all
    pictures of the table.

    Args:
        spark: Spark session.
        platform: platform with the table `samples`.
        decoded: decoded rows of the source.
        covered: pictures whose rows the source has read.
        unusable: number of rows that cannot be used (`count_unusable`).
    """
    if unusable < decoded.rows_in:
        return False
    if covered.image_ids is None:
        return True
    samples = rows_of_source(spark, platform, SAMPLES.name, decoded.request.source)
    return Covered(covered.file).select(samples).join(covered.image_ids, "image_id", "left_anti").isEmpty()


def require_no_pictures(spark: SparkSession, platform: Platform, decoded: DecodedRows, covered: Covered) -> None:
    """Check that `samples` has no picture of a table that has no usable row.

    Raises:
        UserError: `samples` has pictures of the table.
    """
    source, config = decoded.request.source, decoded.request.config
    if covered.select(rows_of_source(spark, platform, SAMPLES.name, source)).isEmpty():
        return
    table = platform.table(SAMPLES.name)
    if decoded.rows_in:
        got = f"all {decoded.rows_in} rows are bad, or have ids that belong to several pictures"
        fix = "inspect the refused rows with `lakesight quarantine`, and check data.source.columns"
    else:
        got = "0 rows"
        fix = (
            "check the job that fills the table, and data.source.filter. If the table is meant to be empty, remove the "
            f"pictures of earlier ingests: delete the rows of table {table} whose source is '{source}'"
        )
    raise UserError(
        "not one row of the table could be used, so the pictures of earlier ingests were kept",
        where=config.source.where,
        got=got,
        fix=fix,
    )


def remove_gone(platform: Platform, decoded: DecodedRows, covered: Covered, unusable: int) -> int:
    """Delete the pictures in `covered` that the source no longer has, according to the decoded rows. Return the number
    of deleted pictures.

    If a text or the split of a picture has changed, the picture is deleted too. The ingest plan then adds the picture
    again, with the current texts and the current split. The same commit changes the column `near_of` of pictures that
    resemble a deleted picture.

    Args:
        platform: platform with the table `samples`.
        decoded: decoded rows of the source.
        covered: pictures whose rows the source has read.
        unusable: number of rows that cannot be used (`count_unusable`).
    """
    request, table = decoded.request, platform.table(SAMPLES.name)
    config, spark = request.config, decoded.outcomes.sparkSession
    unreadable = decoded.outcomes.filter(F.col("reason") == UNREADABLE)
    unknown_ids = config.source.record_columns.id is None and not unreadable.isEmpty()
    if unknown_ids:
        logger.warning(
            "some pictures of %s cannot be read now. Without an id column, ingest cannot find these pictures in table "
            "samples, and therefore removes no picture without a usable row",
            request.source,
        )
    everything = rows_of_source(spark, platform, SAMPLES.name, request.source)
    quarantine = rows_of_source(spark, platform, QUARANTINE.name, request.source)
    too_many = unusable > config.limits.max_bad_share * decoded.rows_in
    if too_many:
        logger.warning(
            "the share of refused rows exceeds data.limits.max_bad_share, so pictures without a usable row stay"
        )
    gone = gone_pictures(
        decoded.outcomes,
        covered.select(everything),
        quarantine,
        follow_splits=config.split.kind == "column",
        keep_absent=too_many or unknown_ids,
        keep_subsets=unknown_ids,
    )
    gone = decoded.spill.materialize(gone, "gone")
    if gone.isEmpty():
        return 0
    relinked = relinked_pictures(everything, gone)
    updates = decoded.spill.materialize(gone.unionByName(relinked, allowMissingColumns=True), "removed")
    counts = merge_into(
        table,
        updates,
        "image_id",
        request.source,
        # If another ingest has changed a picture after `gone_pictures` found the picture, the conditions keep the
        # picture.
        "WHEN MATCHED AND target.sha256 = updates.sha256 AND array_contains(target.texts, updates.text) THEN DELETE",
        "WHEN MATCHED AND target.near_of = updates.gone_id THEN UPDATE SET near_of = updates.near_of",
    )
    assert counts is not None
    logger.info("removed %d pictures whose source rows were deleted or changed", counts["num_deleted_rows"])
    return int(counts["num_deleted_rows"])


def gone_pictures(
    outcomes: DataFrame,
    samples: DataFrame,
    quarantine: DataFrame,
    *,
    follow_splits: bool = False,
    keep_absent: bool = False,
    keep_subsets: bool = False,
) -> DataFrame:
    """Find the pictures in `samples` with a text that no usable row of the same picture (image_id and sha256) has.

    For each picture found, return the image_id, the sha256 and one of its texts. Two kinds of refused rows keep their
    pictures: rows whose reason depends on the machine or on a server (KEPT_REASONS), and rows that `lakesight
    quarantine replay` has added to `samples`. A picture with a usable row also stays if its id belongs to several
    pictures, because the plan would refuse all these pictures.

    Args:
        outcomes: decoded rows of the source, without pictures and payloads.
        samples: rows of `samples` to compare with the decoded rows.
        quarantine: rows of the table `quarantine` that belong to the source.
        follow_splits: whether a picture is found too if the split of its usable rows differs from its split in
            `samples`.
        keep_absent: if true, a picture stays if it has no usable row, or if one of its rows was refused for any reason.
        keep_subsets: if true, a picture stays if `samples` has all texts of its usable rows. The other texts of the
            picture may belong to rows whose pictures cannot be read now.
    """
    usable = outcomes.filter(F.col("reason").isNull())
    current = usable.select(*KEY, F.explode("texts").alias("text"))
    known = samples.select(*KEY, F.explode("texts").alias("text"))
    missing = known.join(current, [*KEY, "text"], "left_anti")
    if keep_subsets:
        changed = current.join(known, [*KEY, "text"], "left_anti").select(*KEY).distinct()
        missing = missing.join(changed, list(KEY), "left_semi")
    if follow_splits:
        splits = usable.groupBy(*KEY).agg(F.min_by("split", held_out_rank("split")).alias("present_split"))
        moved = samples.join(splits, list(KEY)).filter("split <> present_split")
        missing = missing.unionAll(moved.select(*KEY, F.col("texts")[0].alias("text")))
    if keep_absent:
        missing = missing.join(usable.select("image_id").distinct(), "image_id", "left_semi")
    refused = outcomes.filter(F.col("claimed_id").isNotNull())
    replayed = quarantine.filter("replayed_at IS NOT NULL").select("source_row")
    kept = refused if keep_absent else refused.filter(F.col("reason").isin(*KEPT_REASONS))
    kept = kept.unionByName(refused.join(replayed, "source_row", "left_semi"))
    kept_ids = kept.select(F.col("claimed_id").alias("image_id"))
    gone = missing.groupBy(*KEY).agg(F.min("text").alias("text")).join(kept_ids, "image_id", "left_anti")
    conflicting = usable.select(*KEY).distinct().join(_conflicting_ids(usable), "image_id", "left_semi")
    return gone.join(conflicting, list(KEY), "left_anti")


def relinked_pictures(samples: DataFrame, gone: DataFrame) -> DataFrame:
    """Find the pictures whose near duplicate (column `near_of`) is deleted, and choose another near duplicate.

    Of the pictures that resemble the same deleted picture, the picture with the smallest id gets no near duplicate.
    This picture becomes the near duplicate of the other pictures. A filter `near_of IS NULL` therefore still selects
    one of these pictures.

    Returns:
        rows with the columns image_id, gone_id (the near duplicate that is deleted) and near_of (the new near
        duplicate, or null).
    """
    ids = gone.select("image_id")
    dangling = samples.filter("near_of IS NOT NULL").select("image_id", F.col("near_of").alias("gone_id"))
    dangling = dangling.join(ids.withColumnRenamed("image_id", "gone_id"), "gone_id", "left_semi")
    dangling = dangling.join(ids, "image_id", "left_anti")
    first = F.min("image_id").over(Window.partitionBy("gone_id"))
    return dangling.select("image_id", "gone_id", F.nullif(first, F.col("image_id")).alias("near_of"))
