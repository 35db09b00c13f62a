"""Functions for sources that consist of files: list the files, select the pending files, and load files of lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.config import DataConfig, short_hash
from pipelines.driver.ingest.ledger import items_table, pending_items
from pipelines.driver.ingest.sources.source import Source, SourceRows
from pipelines.errors import UserError
from pipelines.executor.ingest.records.folder import change_token
from pipelines.executor.ingest.records.lines import Lines, file_lines, spark_lines
from pipelines.executor.ingest.splits import split_of_file

SET_PATH = "--set data.source.path=FILE_OR_FOLDER"
COMPRESSION_SUFFIXES = ("", ".gz", ".bz2", ".zst")
"""Suffixes of compressed files of lines. The empty suffix stands for no compression."""
RANGE_BYTES = 32 * 2**20
"""Number of bytes of a file of lines that one task reads."""


class SourceFile(NamedTuple):
    """One input file.

    Attributes:
        path: full path.
        name: file name.
        size: size in bytes.
        modified: modification time in microseconds.
    """

    path: str
    name: str
    size: int
    modified: int

    @property
    def state(self) -> str:
        """Change token of the file, which contains the size and the modification time."""
        return change_token(self.size, self.modified)


def open_files(
    name: str, files: Sequence[SourceFile], ingested: pa.Table, load: Callable[[list[SourceFile]], SourceRows]
) -> Source:
    """Open a source of files. Files that have been ingested in their current state are not loaded."""
    pending = pending_items(items_table([(file.path, file.state) for file in files]), ingested)
    paths = set(pending["item"].to_pylist())
    to_read = [file for file in files if file.path in paths]
    return Source(load(to_read) if to_read else None, _hash_files(name, files), pending, len(files) - len(to_read))


def _hash_files(name: str, files: Sequence[SourceFile]) -> str:
    """Hash a data config's name and the names, sizes and modification times of its files to an ingest_id."""
    return short_hash(name, sorted((file.name, file.size, file.modified) for file in files))


def list_files(spark: SparkSession, config: DataConfig, suffixes: tuple[str, ...]) -> list[SourceFile]:
    """List the files at the path of the source through Spark, and select the files to read (`select_files`).

    Raises:
        UserError: no path is set, the path does not exist, or no file is selected.
    """
    path = config.source.path
    if not path:
        raise UserError("the run has no input", where="data.source.path", got="nothing", fix=SET_PATH)
    try:
        listed = spark.read.format("binaryFile").load(absolute_path(path))
    except AnalysisException as error:
        absent = error.getCondition() == "PATH_NOT_FOUND"
        got = "no such file or folder" if absent else str(error).partition("\n")[0]
        raise UserError("the input cannot be read", where=path, got=got, fix=SET_PATH) from None
    rows = listed.select("path", "length", F.unix_micros("modificationTime").alias("modified")).collect()
    found = [SourceFile(row["path"], row["path"].rpartition("/")[2], row["length"], row["modified"]) for row in rows]
    return select_files(found, config, suffixes)


def select_files(found: Sequence[SourceFile], config: DataConfig, suffixes: tuple[str, ...]) -> list[SourceFile]:
    """Select the files that have one of the suffixes, and sort these files.

    With split kind `file`, select only files named train, val or test, because such a folder often has other files.

    Raises:
        UserError: no file is selected.
    """
    files = [file for file in found if file.name.lower().endswith(suffixes)]
    expected = f"files ending in {', '.join(suffixes)}"
    if config.split.kind == "file":
        files = [file for file in files if split_of_file(file.name)]
        expected += ", named train, val or test because data.split.kind is file"
    if not files:
        names = ", ".join(sorted(file.name for file in found)[:10]) or "no files, or only empty ones"
        raise UserError(
            "the input has no file to read", where=config.source.path, got=names, fix=f"expected {expected}"
        )
    return sorted(files)


def load_lines(spark: SparkSession, files: Sequence[tuple[SourceFile, int]]) -> tuple[DataFrame, Lines]:
    """Return the raw rows of files of lines, and the function with which executors read the lines.

    Args:
        spark: Spark session.
        files: pairs of a file and the index of its header.
    """
    paths = [_filesystem_path(file.path) for file, _ in files]
    if None in paths or any(file.name.endswith(COMPRESSION_SUFFIXES[1:]) for file, _ in files):
        by_header: dict[int, list[str]] = {}
        for file, header in files:
            by_header.setdefault(header, []).append(file.path)
        frames = [load_text(spark, group, header) for header, group in by_header.items()]
        return reduce(DataFrame.unionAll, frames), spark_lines
    ranges = [
        (path, file.name, start, header, min(start + RANGE_BYTES, file.size))
        for path, (file, header) in zip(paths, files, strict=True)
        for start in range(0, file.size, RANGE_BYTES)
    ]
    tasks = 1 + sum(file.size for file, _ in files) // RANGE_BYTES
    rows = spark.createDataFrame(ranges, "path string, file string, start bigint, header int, end bigint")
    return rows.repartitionByRange(tasks, "path", "start"), file_lines


def load_text(spark: SparkSession, paths: list[str], header: int = 0) -> DataFrame:
    """Read lines through Spark in the format of `spark_lines`. Lines are bytes, because a line may be invalid UTF-8."""
    return spark.read.text(paths, lineSep="\n").select(
        F.col("_metadata.file_path").alias("path"),
        F.col("_metadata.file_name").alias("file"),
        F.col("_metadata.file_block_start").alias("start"),
        F.lit(header).alias("header"),
        F.col("value").cast("binary").alias("content"),
    )


def _filesystem_path(path: str) -> str | None:
    """Convert a path that Spark reports to a path that Python can open, or return None if there is no such path."""
    if path.startswith("file:/"):
        return f"/{path.removeprefix('file:').lstrip('/')}"
    return path.removeprefix("dbfs:") if path.startswith("dbfs:/Volumes/") else None


def absolute_path(path: str) -> str:
    """Return the absolute path, which does not depend on the JVM's working directory. Return URLs unchanged."""
    return path if "://" in path or path.startswith("dbfs:") else str(Path(path).absolute())


def source_folder(config: DataConfig) -> Path:
    """Return the path of the source as a plain path that executors can open.

    Raises:
        UserError: no path is set, or the path is a URL.
    """
    path = config.source.path.removeprefix("dbfs:")
    if not path:
        raise UserError("the run has no input", where="data.source.path", got="nothing", fix=SET_PATH)
    if "://" in path:
        raise UserError(
            f"a source of kind {config.source.kind} is read as plain files",
            where=config.source.path,
            got="a URL",
            fix="give a folder that every executor sees, such as a Volume (/Volumes/...) or a network drive",
        )
    return Path(path).absolute()
