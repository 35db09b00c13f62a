"""Text files: the driver reads the beginning of each file, and executors read byte ranges of lines or whole files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import IO

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.driver.ingest.sources.files import SourceFile, range_bytes
from pipelines.executor.ingest.records.lines import RANGE, WHOLE, Layout, Range
from pipelines.executor.ingest.storage import FILE_ERRORS, open_binary, require_damage
from pipelines.executor.ingest.text_stream import HEAD_BYTES, is_plain, open_text

COMPRESSION_SUFFIXES = ("", ".gz", ".bz2", ".zst", ".xz")
"""Suffixes of text files, one for each kind of compression. The empty suffix stands for no compression. The suffix only
selects files. The compression is recognised by the content of the file."""
UNPACKED_SHARE = 4
"""Assumed number of uncompressed bytes per byte of a file that is read as a whole, because most such files are
compressed. The number of tasks is computed from this number."""
THREADS = 16
"""Number of files whose beginnings are read at the same time, because network storage answers slowly."""
LINE_END_BYTES = 2**20
"""Number of bytes at the beginning of a file in which the first line end is searched. If the first line is longer than
this limit, lines are assumed to end with a line feed."""

ReadHead = Callable[[SourceFile, Layout], Layout]


def read_layouts(files: Sequence[SourceFile], read: ReadHead, *, whole: bool = False) -> list[Layout]:
    """Return the layout of each file. If the beginning of a file is damaged, its layout has a `problem`.

    Args:
        files: text files that are read line by line.
        read: function that reads the beginning of a file and completes the file's layout.
        whole: whether to read every file as a whole, without splitting it into ranges.
    """

    def read_layout(file: SourceFile) -> Layout:
        if not file.accessible:
            return Layout(problem=os.strerror(errno.EACCES))
        try:
            with closing(open_binary(file.path)) as stream:
                plain = is_plain(stream.read(HEAD_BYTES))
            with closing(open_text(file.path)) as stream:
                separator = _find_separator(stream)
            return read(file, Layout(separator, whole=whole or not plain))
        except FILE_ERRORS as error:
            return Layout(problem=require_damage(error))

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(read_layout, files))


def _find_separator(stream: IO[bytes]) -> bytes:
    """Return a carriage return if the first line ends with a carriage return alone, else a line feed."""
    head = b""
    read1 = getattr(stream, "read1", stream.read)
    while len(head) < LINE_END_BYTES and not head.lstrip(b"\r").rstrip(b"\r").count(b"\r") and b"\n" not in head:
        more = read1(LINE_END_BYTES)
        if not more:
            break
        head += more
    line = head.partition(b"\n")[0].rstrip(b"\r") if b"\n" in head else head
    return b"\r" if b"\r" in line else b"\n"


def whole_range(file: SourceFile, layout: Layout) -> Range:
    """Return one range that covers a whole file."""
    return Range(file.path, file.name, 0, WHOLE, layout, dict(file.partition))


def load_ranges(
    spark: SparkSession, files: Sequence[SourceFile], layouts: Sequence[Layout]
) -> tuple[DataFrame, tuple[Layout, ...]]:
    """Return the byte ranges of text files as raw rows (records.lines.RANGE), and the layouts to which the rows refer.

    Args:
        spark: Spark session.
        files: text files that are read line by line.
        layouts: layout of each file, such as the separator of its lines, in the order of `files`.
    """
    distinct = tuple(dict.fromkeys(layouts))
    size = sum(f.size * (UNPACKED_SHARE if one.whole else 1) for f, one in zip(files, layouts, strict=True))
    per_task = range_bytes(size)
    ranges = split_files(files, layouts, distinct, per_task)
    rows = spark.createDataFrame(ranges, from_arrow_schema(RANGE))
    return rows.repartitionByRange(min(1 + size // per_task, len(ranges)), "path", "start"), distinct


def split_files(
    files: Sequence[SourceFile], layouts: Sequence[Layout], distinct: Sequence[Layout], size: int
) -> list[tuple[bytes, str, int, int, int, str]]:
    """Return the ranges of files as rows of RANGE.

    Args:
        files: text files that are read line by line.
        layouts: layout of each file, such as the separator of its lines, in the order of `files`.
        distinct: list of all different layouts. A range refers to its layout by the index in this list.
        size: largest number of bytes of a range.
    """
    numbers = {layout: number for number, layout in enumerate(distinct)}
    ranges: list[tuple[bytes, str, int, int, int, str]] = []
    for file, layout in zip(files, layouts, strict=True):
        path, partition, number = os.fsencode(file.path), json.dumps(dict(file.partition)), numbers[layout]
        if layout.whole or layout.problem:
            ranges.append((path, file.name, 0, WHOLE, number, partition))
        else:
            starts = range(0, file.size, size)
            ranges += [(path, file.name, at, min(at + size, file.size), number, partition) for at in starts]
    return ranges
