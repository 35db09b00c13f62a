"""Context managers that change Spark settings for the duration of a block, and a function that escapes paths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from pyspark.sql import SparkSession

MAX_BATCH_BYTES = 16 * 2**20
MAX_BATCH_ROWS = 32
WILDCARDS = re.compile(r"[\[\]{}*?\\]")
"""Characters that are wildcards in a path from which Spark reads, but not in a path to which Spark writes."""


def escape_wildcards(path: str) -> str:
    """Escape the wildcards in a path from which Spark is to read."""
    return WILDCARDS.sub(r"\\\g<0>", path)


@contextmanager
def spark_settings(spark: SparkSession, values: dict[str, str]) -> Iterator[None]:
    """Set Spark settings while the block runs, then restore the previous values."""
    previous = {key: spark.conf.get(key, None) for key in values}
    for key, value in values.items():
        spark.conf.set(key, value)
    try:
        yield
    finally:
        for key, previous_value in previous.items():
            if previous_value is None:
                spark.conf.unset(key)
            else:
                spark.conf.set(key, previous_value)


@contextmanager
def bounded_batches(spark: SparkSession) -> Iterator[None]:
    """Limit the size of Parquet and Arrow batches in queries that run in the block.

    With Spark's default limit of 10,000 rows, a batch of megapixel pictures takes 17 GB. Spark 4.1 and later also
    limit the bytes of a batch, but Spark 4.0 limits only the rows. The limit is set to 32 rows, because 32 pictures of
    the largest usual size take 50 MB together.
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
def uncompressed_parquet(spark: SparkSession) -> Iterator[None]:
    """In the block, turn off Parquet compression, and the dictionary encoding of the columns `image` and `payload`.

    Pictures are compressed already, and each encoding step would copy a row of up to 50 MB.
    """
    settings = {"spark.sql.parquet.compression.codec": "uncompressed"}
    with spark_settings(
        spark, settings | {f"parquet.enable.dictionary#{name}": "false" for name in ("image", "payload")}
    ):
        yield


@contextmanager
def vacuum_logging(spark: SparkSession) -> Iterator[None]:
    """Make the VACUUM commands in the block write their metrics to the table history."""
    with spark_settings(spark, {"spark.databricks.delta.vacuum.logging.enabled": "true"}):
        yield
