"""JSON lines: an object a line, base64 pictures in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

from pyspark.sql import DataFrame, SparkSession

from pipelines.config import DataConfig
from pipelines.driver.ingest.sources.files import PACKED, Rows, SourceFile, demand_columns, lines_of, text_of
from pipelines.executor.ingest.records import json_records

SUFFIXES = tuple(f"{name}{packed}" for name in (".jsonl", ".ndjson") for packed in PACKED)
LOOKED_AT = 20
"""Lines whose keys are taken for the columns of all: a wrong name should not fill quarantine with every row."""


def rows(spark: SparkSession, config: DataConfig, files: Sequence[SourceFile]) -> Rows:
    """All lines of the files.

    Raises:
        UserError: none of the first lines has a column that is named.
    """
    demand_columns(config, keys_of(text_of(spark, [file.path for file in files])), config.source.path)
    frame, lines = lines_of(spark, [(file, 0) for file in files])
    return Rows(frame, partial(json_records, lines=lines))


def keys_of(rows: DataFrame) -> list[str]:
    """Keys of the first lines that are objects, in their order."""
    keys: dict[str, None] = {}
    for row in rows.limit(LOOKED_AT).collect():
        try:
            found = json.loads(row["content"])
        except ValueError:
            continue
        keys |= dict.fromkeys(found if isinstance(found, dict) else ())
    return list(keys)
