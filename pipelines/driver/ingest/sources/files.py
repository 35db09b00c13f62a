"""What readers share: the contract, the files of a path, and the columns a source must have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.config import ColumnSplitConfig, DataConfig, short_hash
from pipelines.driver.ingest.ledger import fresh_of, items_of
from pipelines.errors import UserError
from pipelines.executor.ingest.decode import split_of_file
from pipelines.executor.ingest.files import state_of
from pipelines.executor.ingest.lines import Lines, given_lines, read_lines
from pipelines.executor.ingest.records import Read
from vlm.errors import nearest

SET_PATH = "--set data.source.path=FILE_OR_FOLDER"
PACKED = ("", ".gz", ".bz2", ".zst")
"""How a file of lines may be compressed, by suffix."""
RANGE = 32 * 2**20
"""Bytes of a file of lines that a task reads."""


class SourceFile(NamedTuple):
    """One input file: full path, name, size in bytes, time of last change (microseconds)."""

    path: str
    name: str
    size: int
    changed: int

    @property
    def state(self) -> str:
        """What tells whether it is as it was."""
        return state_of(self.size, self.changed)


class Rows(NamedTuple):
    """What executors read: rows in whatever columns suit a reader, and what makes records of them, there."""

    frame: DataFrame
    read: Read


@dataclass(frozen=True)
class Source:
    """What a reader yields.

    Attributes:
        rows: of all that was not taken in before; None where everything was.
        ingest_id: a hash of the source's name and of what tells whether the source has changed.
        fresh: what `rows` are the rows of, for the ledger (ITEMS).
        unchanged: how many other items the source has.
        gone: ids (column `id`) whose rows the source changed or has no more, where it can tell.
    """

    rows: Rows | None
    ingest_id: str
    fresh: pa.Table
    unchanged: int
    gone: DataFrame | None = None


def source_of(
    name: str, files: Sequence[SourceFile], taken: pa.Table, read: Callable[[list[SourceFile]], Rows]
) -> Source:
    """A source of files, of which those are read that were not taken in before as they are now."""
    fresh = fresh_of(items_of([(file.path, file.state) for file in files]), taken)
    paths = set(fresh["item"].to_pylist())
    left = [file for file in files if file.path in paths]
    return Source(read(left) if left else None, hash_of(name, files), fresh, len(files) - len(left))


def files_of(spark: SparkSession, config: DataConfig, suffixes: tuple[str, ...]) -> list[SourceFile]:
    """The files of the source's path, as Spark sees it, that `chosen` leaves.

    Raises:
        UserError: no path, nothing there, or no such file.
    """
    path = config.source.path
    if not path:
        raise UserError("the run has no input", where="data.source.path", got="nothing", fix=SET_PATH)
    return chosen(_listed(spark, path), config, suffixes)


def _listed(spark: SparkSession, path: str) -> list[SourceFile]:
    try:
        listed = spark.read.format("binaryFile").load(absolute(path))
    except AnalysisException as error:
        absent = error.getCondition() == "PATH_NOT_FOUND"
        got = "no such file or folder" if absent else str(error).partition("\n")[0]
        raise UserError("the input cannot be read", where=path, got=got, fix=SET_PATH) from None
    rows = listed.select("path", "length", F.unix_micros("modificationTime").alias("changed")).collect()
    return [SourceFile(row["path"], row["path"].rpartition("/")[2], row["length"], row["changed"]) for row in rows]


def chosen(found: Sequence[SourceFile], config: DataConfig, suffixes: tuple[str, ...]) -> list[SourceFile]:
    """Files that have one of the suffixes, sorted.

    With split kind `file` only those named train, val and test: such folders also hold lists that are not pictures.

    Raises:
        UserError: there are none.
    """
    files = [file for file in found if file.name.lower().endswith(suffixes)]
    expected = f"files ending in {', '.join(suffixes)}"
    if config.split.kind == "file":
        files = [file for file in files if split_of_file(file.name)]
        expected += ", named train, val or test because data.split.kind is file"
    if not files:
        names = ", ".join(sorted(file.name for file in found)[:10]) or "nothing, or empty files alone"
        raise UserError(
            "the input has no file to read", where=config.source.path, got=names, fix=f"expected {expected}"
        )
    return sorted(files)


def lines_of(spark: SparkSession, files: Sequence[tuple[SourceFile, int]]) -> tuple[DataFrame, Lines]:
    """Rows of lines, and what reads them on executors. Each file comes with the number of its header."""
    places = [_plain(file.path) for file, _ in files]
    if None in places or any(file.name.endswith(PACKED[1:]) for file, _ in files):
        by_header: dict[int, list[str]] = {}
        for file, header in files:
            by_header.setdefault(header, []).append(file.path)
        frames = [text_of(spark, paths, header) for header, paths in by_header.items()]
        return reduce(DataFrame.unionAll, frames), given_lines
    ranges = [
        (place, file.name, start, header, min(start + RANGE, file.size))
        for place, (file, header) in zip(places, files, strict=True)
        for start in range(0, file.size, RANGE)
    ]
    tasks = 1 + sum(file.size for file, _ in files) // RANGE
    rows = spark.createDataFrame(ranges, "path string, file string, start bigint, header int, end bigint")
    return rows.repartitionByRange(tasks, "path", "start"), read_lines


def text_of(spark: SparkSession, paths: list[str], header: int = 0) -> DataFrame:
    """Lines for `given_lines`: bytes, since a string that is not UTF-8 would not reach Python."""
    return spark.read.text(paths, lineSep="\n").select(
        F.col("_metadata.file_path").alias("path"),
        F.col("_metadata.file_name").alias("file"),
        F.col("_metadata.file_block_start").alias("start"),
        F.lit(header).alias("header"),
        F.col("value").cast("binary").alias("content"),
    )


def _plain(path: str) -> str | None:
    """The path of a file that executors can open themselves, of one that Spark names."""
    if path.startswith("file:/"):
        return f"/{path.removeprefix('file:').lstrip('/')}"
    return path.removeprefix("dbfs:") if path.startswith("dbfs:/Volumes/") else None


def hash_of(name: str, files: Sequence[SourceFile]) -> str:
    """An ingest_id: of the data config's name and the names, sizes and times of its files."""
    return short_hash(name, sorted((file.name, file.size, file.changed) for file in files))


def absolute(path: str) -> str:
    """A path that does not depend on the JVM's working directory; URLs and Spark's own schemes are left alone."""
    return path if "://" in path or path.startswith("dbfs:") else str(Path(path).absolute())


def plain_folder(config: DataConfig) -> Path:
    """The source's path as plain files, which executors open themselves.

    Raises:
        UserError: no path, nothing there, or a URL.
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


def demand_columns(config: DataConfig, there: Sequence[str], where: str) -> None:
    """Compare the columns that a config names with those that are there.

    Raises:
        UserError: one is missing; says which setting names it, and the likeliest column.
    """
    wanted = {f"data.source.columns.{purpose}": name for purpose, name in config.source.columns.named.items()}
    if isinstance(config.split, ColumnSplitConfig):
        wanted["data.split.column"] = config.split.column
    missing = {setting: name for setting, name in wanted.items() if name not in there}
    if missing:
        free = [column for column in there if column not in wanted.values()]
        likely = [f"--set {setting}={_likeliest(name, free)}" for setting, name in missing.items()]
        raise UserError(
            f"the input has no column {', '.join(missing.values())}",
            where=where,
            got=f"columns {', '.join(column[:80] for column in there[:20])}",
            fix=f"name the right one with {' '.join(likely)} on the command",
        )


def _likeliest(name: str, free: Sequence[str]) -> str:
    """The column that is meant by a name: the nearest, or the only one left."""
    return next(iter(nearest(name, free) or (free if len(free) == 1 else ())), "COLUMN")
