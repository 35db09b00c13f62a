"""Quarantine: rows that cannot be samples, whole, with the reason."""

from __future__ import annotations

import logging

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from pipelines.driver.merge import Stamp, expect, merge_into, rows_of_source
from pipelines.executor.decode import Rules
from pipelines.platform import Platform
from pipelines.tables import QUARANTINE

logger = logging.getLogger(__name__)


def refusals_of(outcomes: DataFrame, plan: DataFrame, rules: Rules) -> DataFrame:
    """Rows that cannot be samples, whole: those refused by an executor, and pictures that fight over an id."""
    columns = ("source_row", "payload", "stage", "reason", "detail")
    name = rules.columns.image.replace("\\", "\\\\").replace('"', '\\"')
    rest = F.expr("substring(payload, 1, length(payload) - 1)")
    encoded = F.translate(F.base64("image"), "\r\n", "")  # Spark breaks base64 into lines of 76, or not, by version
    whole = F.concat(rest, F.lit(f', "{name}": "'), encoded, F.lit('"}'))
    conflicting = (
        outcomes.filter(F.col("reason").isNull())
        .join(plan.filter("conflicting").select("image_id", "sha256"), ["image_id", "sha256"])
        .select(
            "source_row",
            whole.alias("payload"),
            F.lit("merge").alias("stage"),
            F.lit("conflicting_id").alias("reason"),
            F.concat(F.lit("another picture has the id "), "image_id").alias("detail"),
        )
    )
    return outcomes.filter(F.col("reason").isNotNull()).select(*columns).unionAll(conflicting.select(*columns))


def quarantine(platform: Platform, refusals: DataFrame, stamp: Stamp) -> dict[str, int]:
    """Write refusals that `quarantine` does not have yet; how many by reason.

    A row is known by its content (`source` and `source_row`): a file that grew brings its bad rows only once.
    """
    known = rows_of_source(refusals.sparkSession, platform, QUARANTINE.name, stamp.source).select("source_row")
    fresh = refusals.join(known, "source_row", "left_anti").dropDuplicates(["source_row"])
    counted = fresh.groupBy("reason").count().orderBy(F.desc("count"), "reason").collect()
    reasons = {row["reason"]: row["count"] for row in counted}
    quarantined = sum(reasons.values())
    if quarantined:
        rows = fresh.select(
            F.lit(stamp.ingest_id).alias("ingest_id"),
            F.lit(stamp.source).alias("source"),
            *("source_row", "payload", "stage", "reason", "detail"),
            F.lit(stamp.at).alias("quarantined_at"),
            F.lit(None).cast("timestamp").alias("replayed_at"),
        )
        merge = merge_into(platform.table(QUARANTINE.name), rows, "source_row", stamp.source)
        expect(merge.whenNotMatchedInsertAll().execute(), QUARANTINE.name, inserted=quarantined, updated=0)
        logger.info("%d rows quarantined: %s", quarantined, reasons)
    return reasons

