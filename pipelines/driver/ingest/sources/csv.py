"""CSV sources: files with a header. The pictures are base64 text or paths of picture files."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from functools import partial

from pyspark.sql import SparkSession

from pipelines.config import CsvSourceConfig, DataConfig
from pipelines.driver.ingest.sources.files import SourceFile
from pipelines.driver.ingest.sources.lines import COMPRESSION_SUFFIXES, load_ranges, read_layouts, whole_range
from pipelines.driver.ingest.sources.source import SourceRows, require_columns
from pipelines.executor.ingest.records.csv import csv_records, csv_rows, is_blank, split_line
from pipelines.executor.ingest.records.lines import Layout, LongLine, line_limit

logger = logging.getLogger(__name__)

SUFFIXES = tuple(f".{name}{compression}" for name in ("csv", "tsv") for compression in COMPRESSION_SUFFIXES)
DELIMITERS = (",", ";", "\t", "|")
"""Delimiters to try if the config sets no delimiter. The first delimiter that splits the header into the configured
columns is used."""
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?', re.IGNORECASE)
"""Pattern of the line `sep=;`, which spreadsheets write before the header to state the delimiter."""
HEADER_BYTES = 8 * 2**20
"""Largest size of a header, in bytes."""


def load_rows(
    spark: SparkSession, dialect: CsvSourceConfig, config: DataConfig, files: Sequence[SourceFile]
) -> SourceRows:
    """Load the rows of CSV files. Each file has its own header and its own delimiter.

    Args:
        spark: Spark session.
        dialect: settings of the CSV format, such as the characters that separate fields and escape quotes.
        config: data config of the source.
        files: CSV files.

    Raises:
        UserError: the data config names a column that no file has.
    """
    where = files[0].path if len(files) == 1 else config.source.where
    layouts = csv_layouts(config, files, where, dialect)
    frame, distinct = load_ranges(spark, files, layouts)
    limit = line_limit(config.limits)
    return SourceRows(frame, partial(csv_records, layouts=distinct, multiline=dialect.multiline, limit=limit))


def csv_layouts(config: DataConfig, files: Sequence[SourceFile], where: str, dialect: CsvSourceConfig) -> list[Layout]:
    """Return the layouts of CSV files.

    If a file lacks the picture column or the text column, the `problem` of its layout says so.

    Raises:
        UserError: the data config names a column that no file has.
    """
    needed = (config.source.columns.image, config.source.columns.text)
    read = partial(_read_header, needed=needed, dialect=dialect)
    layouts = read_layouts(files, read, whole=dialect.multiline)
    found = [(*layout.names, *file.partition) for file, layout in zip(files, layouts, strict=True) if layout.names]
    if found:
        require_columns(config, list(dict.fromkeys(name for names in found for name in names)), where)
    return [_refuse_without(needed, *pair) for pair in zip(files, layouts, strict=True)]


def _refuse_without(needed: Sequence[str], file: SourceFile, layout: Layout) -> Layout:
    lacking = [name for name in needed if name not in layout.names and name not in file.partition]
    if not layout.names or not lacking:
        return layout
    return Layout(problem=f"the file has no column {', '.join(lacking)}, unlike other files of the source")


def _read_header(file: SourceFile, layout: Layout, *, needed: Collection[str], dialect: CsvSourceConfig) -> Layout:
    """Add the column names from the header of a file to the file's layout. An empty file gets no column names."""
    found: list[Layout] = []
    layout = layout._replace(escape=dialect.escape or "", quote=dialect.quote or "")
    for tried in (dialect.delimiter,) if dialect.delimiter else DELIMITERS:
        found.append(_try_delimiter(file, layout._replace(delimiter=tried), needed, multiline=dialect.multiline))
        if all(name in found[-1].names or name in file.partition for name in needed):
            return found[-1]
    return max(found, key=lambda one: len(one.names))


def _try_delimiter(file: SourceFile, layout: Layout, needed: Collection[str], *, multiline: bool) -> Layout:
    named = None
    rows = csv_rows(whole_range(file, layout), multiline=multiline, limit=HEADER_BYTES)
    for count, row in enumerate(rows, 1):
        if isinstance(row, LongLine):
            return Layout(problem=f"the file has no header within its first {HEADER_BYTES} bytes")
        if named is None and (named := SEPARATOR_LINE.fullmatch(row.strip())):
            if named[1] != layout.delimiter:
                return _try_delimiter(file, layout._replace(delimiter=named[1]), needed, multiline=multiline)
        elif not is_blank(row, layout.delimiter):
            names = split_line(row, layout.delimiter, layout.escape, layout.quote)
            if names is None:
                return Layout(problem="the header of the file has wrong quotes")
            return layout._replace(names=_distinct_names(names, needed, file), skip=count)
    return layout


def _distinct_names(names: Sequence[str], needed: Collection[str], file: SourceFile) -> tuple[str, ...]:
    """Return a distinct name for each column.

    A blank name becomes `_c` and the number of its column. A repeated name gets the number of its column as a suffix.
    White space around names is kept if the header has all needed columns. If a needed column is missing, white space is
    removed from all names.
    """
    if not all(name in names for name in needed):
        names = [name.strip() for name in names]
    distinct: dict[str, None] = {}
    for index, name in enumerate(names):
        unique = name or f"_c{index}"
        while unique in distinct:
            if name in needed:
                logger.warning(
                    "file %s has several columns named %s: only the first of these columns is read", file.path, name
                )
            unique += str(index)
        distinct[unique] = None
    return tuple(distinct)
