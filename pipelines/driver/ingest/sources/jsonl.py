"""JSON lines sources: each line is a JSON object with a base64 picture or the path of a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.config import DataConfig
from pipelines.driver.ingest.sources.files import SourceFile
from pipelines.driver.ingest.sources.lines import COMPRESSION_SUFFIXES, load_ranges, read_layouts, whole_range
from pipelines.driver.ingest.sources.source import SourceRows, require_columns, used_columns
from pipelines.executor.ingest.records.jsonl import KEYS, find_keys, jsonl_range, jsonl_records
from pipelines.executor.ingest.records.lines import Layout, line_limit
from pipelines.executor.ingest.storage import FILE_ERRORS, require_damage

SUFFIXES = tuple(f"{name}{compression}" for name in (".jsonl", ".ndjson") for compression in COMPRESSION_SUFFIXES)
INSPECTED_LINES = 20
"""Number of lines of a source in which the driver looks for the columns. Executors look for missing columns in all
lines."""


def load_rows(spark: SparkSession, config: DataConfig, files: Sequence[SourceFile]) -> SourceRows:
    """Load the lines of the files.

    The columns are checked before the ingest, because a wrong column name would quarantine every row.

    Raises:
        UserError: the data config names a column that no line has.
    """
    where = files[0].path if len(files) == 1 else config.source.where
    layouts = read_layouts(files, lambda _, layout: layout)
    frame, distinct = load_ranges(spark, files, layouts)
    limit = line_limit(config.limits)
    found = dict.fromkeys(name for file in files for name in file.partition)
    found |= dict.fromkeys(first_keys(files, layouts, limit))
    missing = [name for name in used_columns(config).values() if name not in found]
    if missing and not all(layout.problem for layout in layouts):
        search = partial(find_keys, layouts=distinct, limit=limit, wanted=missing)
        found |= dict.fromkeys(_find_later_keys(frame, search))
        require_columns(config, list(found), where)
    return SourceRows(frame, partial(jsonl_records, layouts=distinct, limit=limit))


def first_keys(files: Sequence[SourceFile], layouts: Sequence[Layout], limit: int) -> list[str]:
    """Return the keys of the objects in the first lines (INSPECTED_LINES in total), in order of appearance."""
    keys: dict[str, None] = {}
    lines = INSPECTED_LINES
    for file, layout in zip(files, layouts, strict=True):
        if layout.problem or not lines:
            continue
        try:
            for record in islice(jsonl_range(whole_range(file, layout), limit), lines):
                keys |= dict.fromkeys(record.fields)
                lines -= 1
        except FILE_ERRORS as error:
            require_damage(error)  # executors will refuse a damaged file
    return list(keys)


def _find_later_keys(frame: DataFrame, search: Callable[..., Iterator[pa.RecordBatch]]) -> list[str]:
    """Return the keys that `search` looks for and that occur in at least one line."""
    keys = frame.mapInArrow(search, from_arrow_schema(KEYS)).distinct().collect()
    return [row["key"] for row in keys]
