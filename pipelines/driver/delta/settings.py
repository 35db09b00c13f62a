"""Limits of Spark jobs, context managers that change Spark settings for a block, and a function that escapes paths."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from pyspark.errors import AnalysisException
from pyspark.sql import SparkSession

logger = logging.getLogger(__name__)

MAX_BATCH_BYTES = 16 * 2**20
MAX_BATCH_ROWS = 32
FEW_ROWS = 200_000
"""Largest number of rows whose ids are sent to every task (about 50 MB per executor)."""
UNCOMPRESSED = {"compression": "uncompressed"}
"""Option with which Spark writes a Delta table without compression, because pictures are compressed already."""
WILDCARDS = re.compile(r"[\[\]{}*?\\]")
"""Pattern of the characters that are wildcards in a path from which Spark reads, but not in a path to which Spark
writes."""


def escape_wildcards(path: str) -> str:
    """Escape the wildcards in a path from which Spark is to read."""
    return WILDCARDS.sub(r"\\\g<0>", path)


@contextmanager
def spark_settings(spark: SparkSession, values: dict[str, str], *, required: bool = False) -> Iterator[None]:
    """Set Spark settings while the block runs, then restore the previous values.

    Serverless compute of Databricks refuses to change most settings. If the session refuses a setting and `required` is
    false, the setting keeps its value and the block runs. Callers leave `required` false for settings that only save
    time, memory or the repetition of a write.

    Raises:
        AnalysisException: the session refuses a required setting.
    """
    previous = {}
    try:
        for key, value in values.items():
            try:
                before = spark.conf.get(key, None)
                spark.conf.set(key, value)
            except AnalysisException as error:
                if required:
                    raise
                logger.info("the Spark session refuses the setting %s: %s", key, str(error).partition("\n")[0])
            else:
                previous[key] = before
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
    the largest usual size take 50 MB together. If the session refuses these settings, the limits of the session apply.
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
