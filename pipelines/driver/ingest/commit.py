"""Functions that write to `samples`. Each write is one Delta commit, whose row counts are checked against the plan."""

from __future__ import annotations

import logging

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from pipelines.driver.delta.settings import UNCOMPRESSED, uncompressed_parquet
from pipelines.driver.delta.versions import guarded_options, skip_if_changed_since
from pipelines.driver.ingest.near_duplicates import NearReport, find_near_duplicates
from pipelines.driver.ingest.plan import IngestPlan
from pipelines.driver.ingest.table_rows import merge_into, verify_append, verify_merge
from pipelines.formats.tables import SAMPLES
from pipelines.platform import Platform

logger = logging.getLogger(__name__)


def write_samples(platform: Platform, plan: IngestPlan) -> NearReport:
    """Write the usable pictures of an ingest plan to `samples`.

    If the data config sets `near_duplicates`, new pictures are compared with each other and with the pictures of the
    source in `samples` (`find_near_duplicates`). The comparison decides the column near_of, and may change the split.
    Return the report of the comparison.

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
