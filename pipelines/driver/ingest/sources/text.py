"""Sources of plain text: the names of the files, and the raw rows that executors parse."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from pyspark.sql import SparkSession
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.config import DataConfig, TextSourceConfig
from pipelines.driver.ingest.sources.files import SourceFile, count_tasks
from pipelines.driver.ingest.sources.lines import COMPRESSION_SUFFIXES
from pipelines.driver.ingest.sources.source import SourceRows
from pipelines.executor.texts.records import FILES, text_records
from pipelines.platform.session import default_parallelism

SUFFIXES = tuple(f"{name}{compression}" for name in (".txt", ".text", ".md") for compression in COMPRESSION_SUFFIXES)


def load_rows(
    spark: SparkSession, source: TextSourceConfig, config: DataConfig, files: Sequence[SourceFile]
) -> SourceRows:
    """Return one raw row per file. A task reads many small files or a few large files."""
    rows = [(os.fsencode(file.path), file.name) for file in files]
    tasks = count_tasks(files, default_parallelism(spark))
    frame = spark.createDataFrame(rows, from_arrow_schema(FILES)).coalesce(1).repartition(tasks)
    # Unicode normalisation (NFC) may shorten a text, so a text that is a little too long is refused only after
    # normalisation.
    read = partial(text_records, rows=source.rows, max_chars=2 * config.limits.max_text_chars)
    return SourceRows(frame, read)
