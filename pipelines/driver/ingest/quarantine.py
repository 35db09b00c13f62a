"""Functions that write refused rows to table `quarantine`, with the whole content of each row and the reason."""

from __future__ import annotations

import logging

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from pipelines.driver.delta.settings import UNCOMPRESSED, uncompressed_parquet
from pipelines.driver.delta.versions import guarded_options, note_options, read_versions
from pipelines.driver.ingest.plan import IngestPlan, overfull_rows
from pipelines.driver.ingest.table_rows import existing_rows, merge_into, rows_to_add, verify_append
from pipelines.executor.ingest.spill import POSITION
from pipelines.formats.tables import QUARANTINE, SAMPLES
from pipelines.platform import Platform

logger = logging.getLogger(__name__)

MERGE = "merge"
"""Value of column `stage` for rows that executors have accepted and that the ingest plan refuses. In the spill folder,
the payload of such a row lacks the picture, and `_payload_with_image` adds the picture."""
REFUSED = ("source_row", "stage", "reason", "detail", "spilled")


def refused_rows(plan: IngestPlan) -> DataFrame:
    """Return the rows that an executor has refused, and the rows that the plan refuses.

    The returned rows have the columns in REFUSED. The payloads are in the spill folder, at the position `spilled`.
    """
    outcomes = plan.outcomes.withColumn("spilled", F.struct(*POSITION.names))
    refused = outcomes.filter(F.col("reason").isNotNull()).select(*REFUSED)
    usable = outcomes.filter(F.col("reason").isNull())
    if plan.totals.conflicting:
        ids = plan.pictures.filter("conflicting").select("image_id", "sha256")
        detail = F.concat(F.lit("another picture has the id "), "image_id")
        refused = refused.unionAll(_refuse(usable.join(ids, ["image_id", "sha256"]), "conflicting_id", detail))
    if plan.totals.overfull:
        limit = plan.request.config.limits.max_texts
        detail = F.concat(F.lit("picture "), "image_id", F.lit(f" would have more than {limit} texts"))
        refused = refused.unionAll(_refuse(overfull_rows(outcomes, plan.pictures), "too_many_texts", detail))
    return refused


def _refuse(rows: DataFrame, reason: str, detail: Column) -> DataFrame:
    """Convert decoded rows that the ingest plan refuses into rows with the columns in REFUSED."""
    why = {"stage": F.lit(MERGE), "reason": F.lit(reason), "detail": detail}
    return rows.withColumns(why).select(*REFUSED)


def name_unreadable_files(plan: IngestPlan, limit: int) -> list[str]:
    """Return the file and the detail of at most `limit` rows that were refused with the reason `unreadable_file`."""
    rows = plan.outcomes.filter(F.col("reason") == "unreadable_file").select("source_row", "detail").limit(limit)
    return sorted(f"{row['source_row'].rpartition('#')[0]}: {row['detail']}" for row in rows.collect())


def add_to_quarantine(platform: Platform, plan: IngestPlan) -> dict[str, int]:
    """In one commit, append the refused rows that `quarantine` lacks. Return the number of added rows by reason.

    A row is identified by its content (`source` and `source_row`), so a bad row of a growing file is added only once.

    Raises:
        WriteConflict: another ingest of the same source has added refused rows since this function read `quarantine`.
            Nothing is written.
    """
    spark, source, table = plan.pictures.sparkSession, plan.stamp.source, platform.table(QUARANTINE.name)
    version = read_versions(spark, platform, source, QUARANTINE).last_change
    existing = existing_rows(spark, platform, QUARANTINE, source).select("source_row")
    new = rows_to_add(refused_rows(plan), existing, "source_row", plan.totals.bad).dropDuplicates(["source_row"])
    reasons = _count_by_reason(new)
    if reasons:
        with uncompressed_parquet(spark):
            options = guarded_options(source, version) | UNCOMPRESSED
            _quarantine_rows(new, plan).writeTo(table).options(**options).append()
        verify_append(spark, platform, QUARANTINE, plan.stamp, sum(reasons.values()))
        logger.info("%d rows quarantined: %s", sum(reasons.values()), reasons)
    return reasons


def replace_quarantine(platform: Platform, plan: IngestPlan) -> dict[str, int]:
    """Replace all rows of the source in `quarantine` by the refused rows. Return the number of new rows by reason."""
    new = refused_rows(plan).dropDuplicates(["source_row"])
    with uncompressed_parquet(plan.pictures.sparkSession):
        table, options = platform.table(QUARANTINE.name), note_options(plan.stamp.source) | UNCOMPRESSED
        rows = _quarantine_rows(new, plan).writeTo(table).options(**options)
        rows.overwrite(F.col("source") == plan.stamp.source)
    return _count_by_reason(new)


def reopen_replayed(platform: Platform, plan: IngestPlan) -> int:
    """Set `replayed_at` to null in the rows of `quarantine` whose pictures `samples` has lost, so that these rows can
    be replayed again. Return the number of these rows.

    A row has lost its picture if a replay has accepted the row, the ingest has refused the row again, and `samples`
    does not have the picture. The picture may have been removed, or `samples` may have been restored. If the id of the
    picture is not known, `source_row` identifies the picture.
    """
    spark, source = plan.pictures.sparkSession, plan.stamp.source
    replayed = existing_rows(spark, platform, QUARANTINE, source).filter("replayed_at IS NOT NULL")
    refused = plan.outcomes.filter(F.col("reason").isNotNull()).select("source_row", "claimed_id")
    found = refused.join(replayed.select("source_row"), "source_row", "left_semi").dropDuplicates(["source_row"])
    found = plan.spill.materialize(found, "replayed")
    count = found.count()
    if not count:
        return 0
    lost = plan.spill.materialize(lost_rows(found, existing_rows(spark, platform, SAMPLES, source), count), "lost")
    if lost.isEmpty():
        return 0
    update = "WHEN MATCHED THEN UPDATE SET replayed_at = NULL"
    counts = merge_into(platform.table(QUARANTINE.name), lost, "source_row", source, update)
    reopened = counts["num_updated_rows"] if counts else 0
    logger.warning(
        "%d refused rows can be replayed again: a replay has accepted them, but table samples may no longer have "
        "their pictures",
        reopened,
    )
    return int(reopened)


def lost_rows(refused: DataFrame, samples: DataFrame, num_rows: int) -> DataFrame:
    """Return the column `source_row` of the refused rows whose pictures are not in `samples`.

    Args:
        refused: refused rows, with the columns source_row and claimed_id (id of the row's picture, or null if the id is
            not known; `source_row` then identifies the picture).
        samples: rows of table `samples`.
        num_rows: number of refused rows.
    """
    ids = samples.select(F.col("image_id").alias("claimed_id"))
    by_id = rows_to_add(refused.filter("claimed_id IS NOT NULL"), ids, "claimed_id", num_rows)
    rows = samples.select("source_row")
    by_row = rows_to_add(refused.filter("claimed_id IS NULL"), rows, "source_row", num_rows)
    return by_id.select("source_row").unionAll(by_row.select("source_row"))


def _count_by_reason(refused: DataFrame) -> dict[str, int]:
    counts = refused.groupBy("reason").count().orderBy(F.desc("count"), "reason").collect()
    return {row["reason"]: row["count"] for row in counts}


def _quarantine_rows(refused: DataFrame, plan: IngestPlan) -> DataFrame:
    """Convert refused rows to rows of `quarantine`, which have the whole content of the refused rows."""
    merged = plan.totals.conflicting + plan.totals.overfull > 0
    image = plan.request.config.source.record_columns.image
    return plan.spill.restore(refused, "payload", *(["image"] if merged else [])).select(
        F.lit(plan.stamp.ingest_id).alias("ingest_id"),
        F.lit(plan.stamp.source).alias("source"),
        "source_row",
        _payload_with_image(image).alias("payload") if merged else "payload",
        *("stage", "reason", "detail"),
        F.lit(plan.stamp.planned_at).alias("quarantined_at"),
        F.lit(None).cast("timestamp").alias("replayed_at"),
    )


def _payload_with_image(column: str) -> Column:
    """Return the payload. If the ingest plan refuses the row, add the picture to the payload, as base64 text in
    `column`."""
    name = column.replace("\\", "\\\\").replace('"', '\\"')
    rest = F.expr("substring(payload, 1, length(payload) - 1)")
    encoded = F.translate(F.base64("image"), "\r\n", "")  # some Spark versions break base64 into lines of 76 characters
    whole = F.concat(rest, F.lit(f', "{name}": "'), encoded, F.lit('"}'))
    return F.when(F.col("stage") == MERGE, whole).otherwise(F.col("payload"))
