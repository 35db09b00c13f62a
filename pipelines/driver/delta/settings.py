"""Spark settings that hold while a block runs, and are put back after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pyspark.sql import SparkSession

MAX_BATCH_BYTES = 16 * 2**20
MAX_BATCH_ROWS = 32


@contextmanager
def spark_settings(spark: SparkSession, values: dict[str, str]) -> Iterator[None]:
    """Set Spark settings while the block runs, and put back what they were."""
    before = {key: spark.conf.get(key, None) for key in values}
    for key, value in values.items():
        spark.conf.set(key, value)
    try:
        yield
    finally:
        for key, earlier in before.items():
            if earlier is None:
                spark.conf.unset(key)
            else:
                spark.conf.set(key, earlier)


@contextmanager
def bounded_batches(spark: SparkSession) -> Iterator[None]:
    """Bound the batches that queries run inside read from Parquet, and the Arrow batches that Python workers receive.

    Spark's default of 10,000 rows is 17 GB of megapixel pictures. Spark 4.1 and later also obey the bound in bytes;
    4.0 knows only the bound in rows, which is therefore small: 32 rows of the largest usual pictures are 50 MB.
    """
    with spark_settings(
        spark,
        {
            "spark.sql.parquet.columnarReaderBatchSize": str(MAX_BATCH_ROWS),
            "spark.sql.execution.arrow.maxRecordsPerBatch": str(MAX_BATCH_ROWS),
            "spark.sql.execution.arrow.maxBytesPerBatch": str(MAX_BATCH_BYTES),
        },
    ):
        yield


@contextmanager
def stored_as_they_are(spark: SparkSession) -> Iterator[None]:
    """Write pictures and payloads inside without compressing them again, or looking for two that are the same.

    A row of 50 MB would be copied for each.
    """
    settings = {"spark.sql.parquet.compression.codec": "uncompressed"}
    with spark_settings(
        spark, settings | {f"parquet.enable.dictionary#{name}": "false" for name in ("image", "payload")}
    ):
        yield


@contextmanager
def logged_vacuum(spark: SparkSession) -> Iterator[None]:
    """Have VACUUM say in the table's history what it did."""
    with spark_settings(spark, {"spark.databricks.delta.vacuum.logging.enabled": "true"}):
        yield
