"""Functions that write to `samples`. Each write is one Delta commit, whose row counts are checked against the plan."""

from __future__ import annotations

import logging

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from pipelines.driver.delta.settings import UNCOMPRESSED, uncompressed_parquet
from pipelines.driver.delta.versions import guarded_options, skip_if_changed_since
from pipelines.driver.ingest.decode import DecodedRows
from pipelines.driver.ingest.near_duplicates import NearReport, find_near_duplicates
from pipelines.driver.ingest.plan import IngestPlan
from pipelines.driver.ingest.sources.source import Covered
from pipelines.driver.ingest.table_rows import merge_into, rows_of_source, verify_append, verify_merge
from pipelines.formats.tables import QUARANTINE, SAMPLES
from pipelines.platform import Platform

logger = logging.getLogger(__name__)

KEPT_REASONS = ("decode_timeout", "decoder_crash")
"""Quarantine reasons that depend on the machine, so that an ingest may refuse a row that an earlier ingest has
accepted."""


def write_samples(platform: Platform, plan: IngestPlan) -> NearReport:
    """Write the usable pictures of an ingest plan to `samples`.

    Pictures that are near duplicates of each other get the same split.

    Raises:
        WriteConflict: after the plan was made, another ingest has committed rows of the same source. If the Spark
            session accepts the settings of `skip_if_changed_since`, nothing is written. If the session refuses the
            settings of `skip_if_changed_since`, texts may be added to pictures that the other ingest has not changed.
    """
    write = _replace if plan.request.replace else _add
    if not (plan.totals.new or plan.totals.updated):
        return NearReport()
    found = find_near_duplicates(plan) if plan.totals.new and plan.request.config.near_duplicates else None
    if found is None:
        write(platform, plan, plan.pictures.withColumn("near_of", F.lit(None).cast("string")))
        return NearReport()
    pictures = plan.pictures.join(found.neighbours.drop("split"), "image_id", "left")
    write(platform, plan, pictures.withColumn("split", F.coalesce("near_split", "split")))
    return found.report()


def _add(platform: Platform, plan: IngestPlan, pictures: DataFrame) -> None:
    """Insert new pictures and add new texts to existing pictures in one commit. `pictures` needs a column `near_of`."""
    stamp, totals = plan.stamp, plan.totals
    spark, table = pictures.sparkSession, platform.table(SAMPLES.name)
    changed = pictures.filter("NOT conflicting AND size(new_texts) > 0")
    rows = _sample_rows(plan, changed.filter("is_new"))
    with uncompressed_parquet(spark):
        if totals.updated:
            texts = F.col("new_texts").alias("texts")
            updates = changed.filter("NOT is_new").select("image_id", texts, "known_texts")
            with skip_if_changed_since(spark, stamp.source, stamp.base_version):
                counts = merge_into(
                    table,
                    rows.unionByName(updates, allowMissingColumns=True),
                    "image_id",
                    stamp.source,
                    # `updates.texts` has only texts that `samples` lacks, because the ingest plan leaves out known
                    # texts. The condition of the update leaves out pictures whose texts have changed since the plan was
                    # made.
                    "WHEN MATCHED AND target.texts = updates.known_texts "
                    "THEN UPDATE SET texts = concat(target.texts, updates.texts)",
                    f"WHEN NOT MATCHED AND updates.image IS NOT NULL THEN {SAMPLES.insert_clause('updates')}",
                )
            verify_merge(counts, inserted=totals.new, updated=totals.updated)
        else:  # an append is faster: a merge would join all planned pictures with the table
            rows.writeTo(table).options(**_options(plan)).append()
            verify_append(spark, platform, SAMPLES, stamp, totals.new)
    logger.info("added %d new pictures, and added new texts to %d earlier pictures", totals.new, totals.updated)


def _replace(platform: Platform, plan: IngestPlan, pictures: DataFrame) -> None:
    """Replace all pictures of the source by the planned pictures in one commit. `pictures` needs a column `near_of`."""
    stamp, totals = plan.stamp, plan.totals
    spark, table = pictures.sparkSession, platform.table(SAMPLES.name)
    rows = _sample_rows(plan, pictures.filter("NOT conflicting"))
    with uncompressed_parquet(spark):
        rows.writeTo(table).options(**_options(plan)).overwrite(F.col("source") == stamp.source)
    verify_append(spark, platform, SAMPLES, stamp, totals.new)
    logger.info("replaced the earlier pictures of the source by %d pictures", totals.new)


def _options(plan: IngestPlan) -> dict[str, str]:
    """Return the options of an append or overwrite of `samples`."""
    return guarded_options(plan.stamp.source, plan.stamp.base_version) | UNCOMPRESSED


def _sample_rows(plan: IngestPlan, pictures: DataFrame) -> DataFrame:
    """Convert planned pictures to rows of `samples`, with the columns in the order of the table."""
    rows = pictures.select(
        *("image_id", "sha256", "spilled", "spilled.format", "spilled.width", "spilled.height"),
        F.col("new_texts").alias("texts"),
        *("split", "source_row", "fingerprint", "near_of"),
    )
    constants = {"source": plan.stamp.source, "ingest_id": plan.stamp.ingest_id, "ingested_at": plan.stamp.planned_at}
    stamped = {name: F.lit(value) for name, value in constants.items()}
    return plan.spill.restore(rows, "image").withColumns(stamped).select(SAMPLES.names)


def remove_gone(platform: Platform, decoded: DecodedRows, covered: Covered) -> int:
    """Delete the pictures in `covered` that the source no longer has, according to the decoded rows. Return the number
    of deleted pictures.

    If a text of a picture has changed, the picture is deleted too. The ingest plan then adds the picture again, with
    the current texts.
    """
    source, table = decoded.request.source, platform.table(SAMPLES.name)
    spark = decoded.outcomes.sparkSession
    samples = covered.select(rows_of_source(spark, platform, SAMPLES.name, source))
    quarantine = rows_of_source(spark, platform, QUARANTINE.name, source)
    gone = gone_pictures(decoded.outcomes, samples, quarantine)
    gone = decoded.spill.materialize(gone, "gone")
    if gone.isEmpty():
        return 0
    # Another ingest may have replaced a picture after `gone_pictures` found it. The condition keeps the new picture.
    unchanged = "target.sha256 = updates.sha256 AND array_contains(target.texts, updates.text)"
    counts = merge_into(table, gone, "image_id", source, f"WHEN MATCHED AND {unchanged} THEN DELETE")
    assert counts is not None
    logger.info("removed %d pictures whose source rows were deleted or changed", counts["num_deleted_rows"])
    return int(counts["num_deleted_rows"])


def gone_pictures(outcomes: DataFrame, samples: DataFrame, quarantine: DataFrame) -> DataFrame:
    """Find the pictures in `samples` that have a text which occurs in no usable row of the source.

    For each picture found, return the image_id, the sha256 and one text that occurs in no usable row. Two kinds of
    refused rows keep their pictures: rows whose reason depends on the machine (KEPT_REASONS), and rows that
    `lakesight quarantine replay` has added to `samples`.

    Args:
        outcomes: decoded rows of the source, without pictures and payloads.
        samples: rows of `samples` to compare with the decoded rows.
        quarantine: rows of the table `quarantine` that belong to the source.
    """
    key = ["image_id", "sha256", "text"]
    current = outcomes.filter(F.col("reason").isNull()).select(*key[:2], F.explode("texts").alias("text"))
    missing = samples.select(*key[:2], F.explode("texts").alias("text")).join(current, key, "left_anti")
    refused = outcomes.filter(F.col("claimed_id").isNotNull())
    replayed = quarantine.filter("replayed_at IS NOT NULL").select("source_row")
    kept = refused.filter(F.col("reason").isin(*KEPT_REASONS)).unionByName(
        refused.join(replayed, "source_row", "left_semi")
    )
    kept_ids = kept.select(F.col("claimed_id").alias("image_id"))
    return missing.groupBy(key[:2]).agg(F.min("text").alias("text")).join(kept_ids, "image_id", "left_anti")
