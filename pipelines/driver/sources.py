"""Readers: a source as its files say it, nothing decoded yet. A further kind of source is one more reader.

The contract is `Source`: a DataFrame in whatever columns suit the reader, a function of `pipelines.executor.records`
that makes records of them on an executor, and an id that tells whether the files are the same as last time.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple, get_args

from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StringType, StructField, StructType

from pipelines.config import CsvSourceConfig, DataConfig, Split, short_hash
from pipelines.errors import UserError
from pipelines.executor.decode import split_of_file
from pipelines.executor.records import Read, csv_records, parsed_records

CSV_SUFFIXES = (".csv", ".csv.gz", ".csv.bz2", ".csv.zst")
CORRUPT = "_lakesight_corrupt_record"
SET_PATH = "--set data.source.path=FILE_OR_FOLDER"


class SourceFile(NamedTuple):
    """One input file: full path, name, size in bytes, time of last change (seconds)."""

    path: str
    name: str
    size: int
    changed: float


@dataclass(frozen=True)
class Source:
    """What a reader yields.

    Attributes:
        rows: what executors read.
        read: makes records of it, there.
        ingest_id: a hash of the source's name and its files' names, sizes and times.
    """

    rows: DataFrame
    read: Read
    ingest_id: str


def open_source(spark: SparkSession, name: str, config: DataConfig) -> Source:
    """Open what a data config names as its source.

    Raises:
        UserError: nothing there, no file of the kind, an empty file, or a column that is missing.
    """
    files = _csv_files(spark, config)
    rows, read = _read_csv(spark, files, config.source)
    return Source(rows, read, short_hash(name, sorted((f.name, f.size, f.changed) for f in files)))


def _csv_files(spark: SparkSession, config: DataConfig) -> list[SourceFile]:
    """The CSV files of a path.

    With split kind `file` only those named train, val and test: such folders also hold lists that are not pictures.
    """
    path = config.source.path
    if not path:
        raise UserError("the run has no input", where="data.source.path", got="nothing", fix=SET_PATH)
    try:
        listed = spark.read.format("binaryFile").load(_absolute(path))
    except AnalysisException as error:
        absent = error.getCondition() == "PATH_NOT_FOUND"
        got = "no such file or folder" if absent else str(error).partition("\n")[0]
        raise UserError("the input cannot be read", where=path, got=got, fix=SET_PATH) from None
    found = [
        SourceFile(row["path"], row["path"].rpartition("/")[2], row["length"], row["changed"])
        for row in listed.select("path", "length", F.unix_micros("modificationTime").alias("changed")).collect()
    ]
    files = [file for file in found if file.name.lower().endswith(CSV_SUFFIXES)]
    expected = "CSV files"
    if config.split.kind == "file":
        files = [file for file in files if split_of_file(file.name) in get_args(Split)]
        expected = "train.csv, val.csv or test.csv, because data.split.kind is file"
    if not files:
        names = ", ".join(sorted(file.name for file in found)[:10]) or "nothing, or empty files alone"
        raise UserError("the input has no file to read", where=path, got=names, fix=f"expected {expected}")
    return sorted(files)


def _absolute(path: str) -> str:
    """A path that does not depend on the JVM's working directory; URLs and Spark's own schemes are left alone."""
    return path if "://" in path or path.startswith("dbfs:") else str(Path(path).absolute())


def _read_csv(spark: SparkSession, files: list[SourceFile], config: CsvSourceConfig) -> tuple[DataFrame, Read]:
    """All records of the files. Each header is read for itself: Spark would take the first file's for all of them."""
    by_header: dict[tuple[str, ...], list[str]] = {}
    for file in files:
        by_header.setdefault(_header(spark, file, config), []).append(file.path)
    if config.multiline:
        parsed = (_parsed(spark, paths, header, config) for header, paths in by_header.items())
        return reduce(DataFrame.unionAll, parsed), parsed_records
    lines = (_lines(spark, paths, number) for number, paths in enumerate(by_header.values()))
    return reduce(DataFrame.unionAll, lines), partial(csv_records, headers=tuple(by_header))


def _header(spark: SparkSession, file: SourceFile, config: CsvSourceConfig) -> tuple[str, ...]:
    header = tuple(spark.read.csv(file.path, header=True, **_dialect(config)).columns)  # type: ignore[arg-type]
    if not header:
        raise UserError("the input file is empty", where=file.path, got=f"{file.size} bytes", fix="expected a header")
    wanted = [name for name in config.columns.model_dump().values() if name is not None]
    missing = [f"{name}{_nearest(name, header)}" for name in wanted if name not in header]
    if missing:
        raise UserError(
            f"the input has no column {'; '.join(missing)}",
            where=file.path,
            got=f"columns {', '.join(column[:80] for column in header[:20])}",
            fix="name the right ones with --set data.source.columns.image=... (text, id, prompt)",
        )
    return header


def _nearest(name: str, names: tuple[str, ...]) -> str:
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f" (did you mean {match[0]}?)" if match else ""


def _lines(spark: SparkSession, paths: list[str], header: int) -> DataFrame:
    """Lines for `csv_records`: bytes, since a string that is not UTF-8 would not reach Python."""
    return spark.read.text(paths).select(
        F.col("_metadata.file_path").alias("path"),
        F.col("_metadata.file_name").alias("file"),
        F.col("_metadata.file_block_start").alias("start"),
        F.lit(header).alias("header"),
        F.col("value").cast("binary").alias("line"),
    )


def _parsed(spark: SparkSession, paths: list[str], header: tuple[str, ...], config: CsvSourceConfig) -> DataFrame:
    """Records for `parsed_records`."""
    schema = StructType([StructField(name, StringType()) for name in (*header, CORRUPT)])
    frame = spark.read.csv(
        paths,
        schema=schema,
        header=True,
        mode="PERMISSIVE",
        columnNameOfCorruptRecord=CORRUPT,
        **_dialect(config),  # type: ignore[arg-type]
    )
    record = F.create_map(*(part for name in header for part in (F.lit(name), F.col(f"`{name.replace('`', '``')}`"))))
    return frame.select(F.col("_metadata.file_name").alias("file"), F.col(CORRUPT).alias("raw"), record.alias("row"))


def _dialect(config: CsvSourceConfig) -> dict[str, str | int | bool]:
    """RFC 4180: a quote inside quotes is doubled. Fields have no greatest length: pictures are in them."""
    return {"quote": '"', "escape": '"', "multiLine": config.multiline, "maxCharsPerColumn": -1}
