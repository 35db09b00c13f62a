"""JSON lines: an object a line, base64 pictures in it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.config import DataConfig
from pipelines.driver.sources.files import PACKED, Rows, SourceFile, demand_columns
from pipelines.executor.records import json_records

SUFFIXES = tuple(f"{name}{packed}" for name in (".jsonl", ".ndjson") for packed in PACKED)
LOOKED_AT = 20
"""Lines whose keys are taken for the columns of all: a wrong name should not fill quarantine with every row."""


def rows(spark: SparkSession, config: DataConfig, files: Sequence[SourceFile]) -> Rows:
    """All lines of the files.

    Raises:
        UserError: none of the first lines has a column that is named.
    """
    frame = lines(spark, [file.path for file in files])
    demand_columns(config, keys_of(frame), config.source.path)
    return Rows(frame, json_records)


def lines(spark: SparkSession, paths: list[str]) -> DataFrame:
    """Rows for `json_records`: bytes, since a string that is not UTF-8 would not reach Python."""
    return spark.read.text(paths).select(
        F.col("_metadata.file_name").alias("file"), F.col("value").cast("binary").alias("line")
    )


def keys_of(rows: DataFrame) -> list[str]:
    """Keys of the first lines that are objects, in their order."""
    keys: dict[str, None] = {}
    for row in rows.limit(LOOKED_AT).collect():
        try:
            found = json.loads(row["line"])
        except ValueError:
            continue
        keys |= dict.fromkeys(found if isinstance(found, dict) else ())
    return list(keys)
