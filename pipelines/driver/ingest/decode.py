"""Decoding in an ingest: executors decode the raw rows of a source once, and write the large columns to spill files.

Pictures are in spill files (`pipelines.executor.ingest.spill`) until Spark writes the pictures to their table. If a
plan has to be made again, the new plan uses the same decoded rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from pyarrow import RecordBatch
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.config import DataConfig
from pipelines.driver.delta.settings import bounded_batches
from pipelines.driver.delta.spark_errors import run_or_guard, translate_spark_errors
from pipelines.driver.delta.tables import add_columns
from pipelines.driver.ingest.sources.source import SourceRows
from pipelines.driver.ingest.spill import SpillFolder
from pipelines.executor.ingest.decode import DecodeRules, decode_batches, decode_guarded
from pipelines.executor.ingest.spill import NARROW, decode_and_spill
from pipelines.formats.tables import SAMPLES
from pipelines.platform import Platform

logger = logging.getLogger(__name__)

READ_ORDER = "read_order"
"""Name of a column of decoded rows. The numbers in this column increase in the order in which the rows of a file are
read."""


@dataclass(frozen=True)
class IngestRequest:
    """Rows to ingest, and the settings of the ingest.

    Attributes:
        source: name of the source, which is the name of its data config.
        config: data config of the source.
        rows: raw rows, and the parser that executors apply to the raw rows.
        ingest_id: id of the ingest; all rows that the ingest writes contain the id.
        replace: whether the result replaces all rows of the source, so that the plan ignores existing rows.
    """

    source: str
    config: DataConfig
    rows: SourceRows
    ingest_id: str
    replace: bool = False


@dataclass(frozen=True)
class DecodedRows:
    """Rows that executors have decoded.

    Attributes:
        request: ingest request that the rows belong to.
        spill: spill folder with the pictures and payloads.
        outcomes: one decoded row per record of the input, with narrow columns only (`executor.ingest.spill.NARROW`,
            READ_ORDER). The parser in `request.rows` makes records from raw rows.
        rows_in: number of records of the input.
        refused: number of rows that executors refused.
    """

    request: IngestRequest
    spill: SpillFolder
    outcomes: DataFrame
    rows_in: int
    refused: int


@contextmanager
def decode_rows(
    spark: SparkSession, platform: Platform, request: IngestRequest, spill: SpillFolder
) -> Iterator[DecodedRows]:
    """Decode rows into a spill folder. The decoded rows can be used while the block runs.

    Inside the block, Arrow batches are limited in size, because pictures are large.

    Raises:
        StageFailed: Spark failed in this function or in the block.
    """
    add_columns(spark, platform, SAMPLES)
    with (
        translate_spark_errors("the input could not be ingested", where=request.config.source.where),
        bounded_batches(spark),
    ):
        outcomes = run_or_guard(
            partial(_decode, request, spill, decode_batches), partial(_decode, request, spill, decode_guarded)
        )
        counts = outcomes.agg(F.count("*").alias("rows_in"), F.count("reason").alias("refused")).collect()[0]
        yield DecodedRows(request, spill, outcomes, **counts.asDict())


def _decode(request: IngestRequest, spill: SpillFolder, decoder: Callable[..., Iterator[RecordBatch]]) -> DataFrame:
    """Decode raw rows, and write the results (pictures, payloads and NARROW rows) to the spill folder."""
    started = time.monotonic()
    config, rows = request.config, request.rows
    rules = DecodeRules(
        request.source, config.source.record_columns, config.limits, config.split, config.near_duplicates
    )
    decode = partial(decoder, read=rows.read, rules=rules)
    spilled = partial(decode_and_spill, decode=decode, folder=str(spill.folder))
    decoded = rows.frame.mapInArrow(spilled, from_arrow_schema(NARROW))
    outcomes = spill.materialize(decoded.withColumn(READ_ORDER, F.monotonically_increasing_id()), "outcomes")
    logger.info("rows decoded in %.1f s", time.monotonic() - started)
    return outcomes
