"""Functions that write to `samples`. Each write is one Delta commit, whose row counts are checked against the plan."""

from __future__ import annotations

import logging

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.driver.delta.settings import uncompressed_parquet
from pipelines.driver.delta.versions import skip_if_changed_since
from pipelines.driver.ingest.near_duplicates import NearReport, find_near_duplicates
from pipelines.driver.ingest.plan import IngestPlan
from pipelines.driver.ingest.table_rows import merge_into, rows_of_source, verify_append, verify_merge
from pipelines.formats.tables import SAMPLES
from pipelines.platform import Platform

logger = logging.getLogger(__name__)


def write_samples(platform: Platform, plan: IngestPlan) -> NearReport:
    """Write the usable pictures of a plan to `samples`. Near duplicates of each other get the same split.

    Raises:
        WriteConflict: another ingest of the source has committed since the plan was made. Nothing is written.
    """
    write = _replace if plan.request.replace else _add
    if not plan.totals.contributing:
        return NearReport()
    if not (plan.totals.new and plan.request.config.near_duplicates):
        write(platform, plan, plan.pictures.withColumn("near_of", F.lit(None).cast("string")))
        return NearReport()
    found = find_near_duplicates(plan)
    pictures = plan.pictures.join(found.neighbours.drop("split"), "image_id", "left")
    write(platform, plan, pictures.withColumn("split", F.coalesce("near_split", "split")))
    return found.report()


def _add(platform: Platform, plan: IngestPlan, pictures: DataFrame) -> None:
    """Insert new pictures and add new texts to existing pictures in one commit. `pictures` has a column `near_of`."""
    stamp, totals = plan.stamp, plan.totals
    spark, table = pictures.sparkSession, platform.table(SAMPLES.name)
    changed = pictures.filter("NOT conflicting AND size(new_texts) > 0")
    rows = _sample_rows(plan, changed.filter("is_new"))
    with uncompressed_parquet(spark), skip_if_changed_since(spark, stamp.source, stamp.base_version):
        if totals.updated:
            texts = changed.filter("NOT is_new").select("image_id", F.col("new_texts").alias("texts"))
            merge = merge_into(table, rows.unionByName(texts, allowMissingColumns=True), "image_id", stamp.source)
            union = F.expr("array_sort(array_union(target.texts, updates.texts))")
            merge = merge.whenMatchedUpdate(set={"texts": union})
            metrics = merge.whenNotMatchedInsertAll(condition="updates.image IS NOT NULL").execute()
            verify_merge(metrics, inserted=totals.new, updated=totals.updated)
        else:  # append, because a merge would needlessly join all planned pictures with the table
            rows.writeTo(table).append()
            verify_append(spark, table, "ingested_at", stamp, totals.new)
    logger.info("%d new pictures, and %d earlier pictures with new texts", totals.new, totals.updated)


def _replace(platform: Platform, plan: IngestPlan, pictures: DataFrame) -> None:
    """Replace all pictures of the source by the planned pictures in one commit. `pictures` has a column `near_of`."""
    stamp, totals = plan.stamp, plan.totals
    spark, table = pictures.sparkSession, platform.table(SAMPLES.name)
    rows = _sample_rows(plan, pictures.filter("NOT conflicting"))
    with uncompressed_parquet(spark), skip_if_changed_since(spark, stamp.source, stamp.base_version):
        rows.writeTo(table).overwrite(F.col("source") == stamp.source)
    verify_append(spark, table, "ingested_at", stamp, totals.new)
    logger.info("%d pictures replace the earlier pictures of the source", totals.new)


def _sample_rows(plan: IngestPlan, pictures: DataFrame) -> DataFrame:
    """Convert planned pictures to rows of `samples`, with the columns in the order of the table."""
    rows = pictures.select(
        *("image_id", "sha256", "spilled", "spilled.format", "spilled.width", "spilled.height"),
        F.array_sort("new_texts").alias("texts"),
        *("split", "source_row", "fingerprint", "near_of"),
    )
    constants = {"source": plan.stamp.source, "ingest_id": plan.stamp.ingest_id, "ingested_at": plan.stamp.planned_at}
    stamped = {name: F.lit(value) for name, value in constants.items()}
    return plan.spill.restore(rows, "image").withColumns(stamped).select(SAMPLES.names)


def remove_samples(spark: SparkSession, platform: Platform, source: str, ids: DataFrame) -> int:
    """Delete the pictures of a source whose ids are in column `id` of `ids`. Return the number of deleted pictures."""
    existing = rows_of_source(spark, platform, SAMPLES.name, source).select("image_id")
    image_ids = F.concat(F.lit(f"{source}/"), F.trim(F.col("id").cast("string"))).alias("image_id")
    deleted = existing.join(ids.select(image_ids), "image_id", "left_semi")
    if deleted.isEmpty():
        return 0
    merge = merge_into(platform.table(SAMPLES.name), deleted, "image_id", source).whenMatchedDelete()
    [row] = merge.execute().collect()
    return int(row["num_deleted_rows"])
