"""JSON lines sources: files that have one JSON object per line, with base64 pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

from pyspark.sql import DataFrame, SparkSession

from pipelines.config import DataConfig
from pipelines.driver.ingest.sources.files import COMPRESSION_SUFFIXES, SourceFile, load_lines, load_text
from pipelines.driver.ingest.sources.source import SourceRows, require_columns
from pipelines.executor.ingest.records.jsonl import jsonl_records

SUFFIXES = tuple(f"{name}{compression}" for name in (".jsonl", ".ndjson") for compression in COMPRESSION_SUFFIXES)
INSPECTED_LINES = 20
"""Number of lines whose keys are the columns of the source. The columns are checked before the
ingest, because a wrong column name would quarantine every row."""


def load_rows(spark: SparkSession, config: DataConfig, files: Sequence[SourceFile]) -> SourceRows:
    """Load the lines of the files.

    Raises:
        UserError: the first lines lack a column that the data config names.
    """
    require_columns(config, first_keys(load_text(spark, [file.path for file in files])), config.source.path)
    frame, lines = load_lines(spark, [(file, 0) for file in files])
    return SourceRows(frame, partial(jsonl_records, lines=lines))


def first_keys(lines: DataFrame) -> list[str]:
    """Return the keys of the objects in the first lines, in order of appearance."""
    keys: dict[str, None] = {}
    for row in lines.limit(INSPECTED_LINES).collect():
        try:
            found = json.loads(row["content"])
        except ValueError:
            continue
        keys |= dict.fromkeys(found if isinstance(found, dict) else ())
    return list(keys)
