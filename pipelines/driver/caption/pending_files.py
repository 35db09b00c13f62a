"""Files of captions that executors wrote and that are not yet merged into `generated_captions`.

A folder of caption files belongs to one key (table, model name and version number, settings), not to one job. A job
that is killed leaves files, and the next job with the same key merges these files. Two MLflow registries may have model
versions of the same name and number. The caption files of such model versions are in the same folder, and each row has
the digest of its own model. Two jobs with the same key may run at the same time and merge each other's files. A job
skips files that another job has merged. If two jobs merge the same file, the second merge changes no row.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from time import monotonic

import pyarrow.parquet as pq
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.driver.delta.model_rows import SAME_MODEL
from pipelines.driver.delta.retry import retry_on_conflict
from pipelines.driver.delta.settings import escape_wildcards
from pipelines.executor.caption import PENDING_SCHEMA, UNREADABLE
from pipelines.formats.tables import GENERATED_CAPTIONS, PICTURE_COLUMNS
from pipelines.platform import Platform

logger = logging.getLogger(__name__)

COLUMNS = ("id_column", "image_column")
"""Columns of `generated_captions` that store two names: the names of the id column and of the picture column of the
captioned table. These names are a part of a caption's identity."""
READ_FROM = ("source_version", "source_commit", "source_file", *(column.name for column in PICTURE_COLUMNS))
"""Columns of `generated_captions` that say from where a picture was read."""
LISTING_SHARE = 0.05
"""Limit for the share of the time that the progress bar may use to list the folder. Listing a folder with many files
takes long."""
STALE = timedelta(days=1)
"""Temporary caption files of at least this age are removed, because the tasks that wrote them were probably killed."""


@dataclass
class Listing:
    """Number of rows in the files of a folder, and the monotonic time (`until`) at which this number expires."""

    rows: int = 0
    until: float = 0.0


@dataclass(frozen=True)
class PendingFiles:
    """Caption files that belong to one key (table, model name and version number, settings).

    Attributes:
        folder: folder that contains the files.
        key: dict from a column of `generated_captions`, such as model_name, to the value that all rows of the files
            have. The digest of the model is not part of the key.
        columns: names of the id column and of the picture column of this job. Lakesight 0.1.0 stored no column names in
            captions and files. Captions and files without column names count as captions of these columns. Other files
            of the folder may name other columns.
        counts: dict from the path of a file to its number of rows, so that each Parquet footer is read only once.
        listing: result of the last call of `num_rows` that listed the folder.
    """

    folder: Path
    key: dict[str, str]
    columns: tuple[str, str]
    counts: dict[Path, int] = field(default_factory=dict)
    listing: Listing = field(default_factory=Listing)

    def open(self) -> None:
        """Create the folder, and remove temporary files older than STALE, which killed tasks have left there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(".*.tmp"):
            if time.time() - path.stat().st_mtime > STALE.total_seconds():
                path.unlink(missing_ok=True)

    def files(self) -> list[Path]:
        """List the files that have been written completely."""
        return sorted(self.folder.glob("*.parquet"))

    def num_rows(self) -> int:
        """Count the rows of all files from the Parquet footers. A progress bar calls this method twice a second.

        A finished file never changes, so the method reads the footer of each file only once. If listing the folder
        takes long, the method returns the last result for some time (LISTING_SHARE).
        """
        started = monotonic()
        if started >= self.listing.until:
            self.listing.rows = sum(self._rows_of(path) for path in self.files())
            ended = monotonic()
            self.listing.until = ended + (ended - started) / LISTING_SHARE
        return self.listing.rows

    def _rows_of(self, path: Path) -> int:
        if path not in self.counts:
            with suppress(FileNotFoundError):  # another driver has merged and removed the file
                self.counts[path] = pq.read_metadata(path).num_rows
        return self.counts.get(path, 0)

    def merge(self, spark: SparkSession, platform: Platform) -> int:
        """Merge all files into `generated_captions` in one commit, delete the files, and return their number of rows.

        Executors read and merge the rows of the files. The rows never pass through the driver.

        Raises:
            StageFailed: every attempt to merge conflicted with other writers. The caption files are kept, so no caption
                is lost.
        """
        files = self.files()
        if not files:
            return 0
        # Spark lists the folder after this driver has listed it, so Spark reads every file that the driver removes
        # below. Spark skips files that another driver has merged and removed. Columns that the files of Lakesight 0.1.0
        # lack are null.
        rows = spark.read.schema(from_arrow_schema(PENDING_SCHEMA)).option("ignoreMissingFiles", "true")
        new = rows.option("pathGlobFilter", "*.parquet").parquet(escape_wildcards(str(self.folder)))
        table = platform.table(GENERATED_CAPTIONS.name)
        total = sum(self._rows_of(path) for path in files)
        for name, column in zip(COLUMNS, self.columns, strict=True):
            new = new.withColumn(name, F.coalesce(name, F.lit(column)))
        retry_on_conflict(lambda: _merge(spark, table, _newest_rows(new), self.key, self.columns), where=table)
        for path in files:
            path.unlink(missing_ok=True)
        return total


def matches_key(key: dict[str, str], columns: tuple[str, str]) -> Column:
    """Return the SQL condition that selects the rows of `generated_captions` (alias `old`) that belong to the key, to
    the id column and to the picture column.

    The condition contains the values as literals, so that Delta can skip data files without these values.
    """
    condition = F.lit(True)
    for column, value in key.items():
        condition &= F.col(f"old.{column}") == value
    for name, column in zip(COLUMNS, columns, strict=True):
        condition &= F.coalesce(f"old.{name}", F.lit(column)) == column
    return condition


def _newest_rows(rows: DataFrame) -> DataFrame:
    """Keep the newest row of each picture and model.

    The files may have several rows of one picture, from a retried task or from a second job. Two rows belong to the
    same model if SAME_MODEL is true for the rows: either their digests are equal, or one row has no digest and their
    runs are equal. If two rows of one model remained, Delta would refuse the merge.
    """
    of_run = Window.partitionBy("image_id", *COLUMNS, "run_id")
    model = F.coalesce(F.max("model_digest").over(of_run), "run_id")
    of_model = Window.partitionBy("image_id", *COLUMNS, "model")
    order = of_model.orderBy(F.desc("captioned_at"), F.desc("source_version"), "sha256")
    ranked = rows.repartition("image_id").withColumn("model", model).withColumn("rank", F.row_number().over(order))
    return ranked.filter("rank = 1").drop("model", "rank")


def _merge(spark: SparkSession, name: str, new: DataFrame, key: dict[str, str], columns: tuple[str, str]) -> None:
    """Insert new captions, and update rows that had an error or whose picture has changed.

    If the picture of a captioned row was read again and has not changed, the row keeps its caption. Only `read_at` and
    the columns in READ_FROM are updated, such as the table version and the data file from which the picture was read
    again. If the picture of a captioned row cannot be read now, the row keeps its caption, and `source_file` gets the
    text UNREADABLE and the time of the job (microseconds). Because of this text, the next job reads the picture again,
    and does not count the row as an error again.
    """
    of_key = " AND ".join(f"old.{column} = {{{column}}}" for column in key)
    of_columns = " AND ".join(f"COALESCE(old.{column}, {{{column}}}) = new.{column}" for column in COLUMNS)
    is_newer = "new.captioned_at > old.captioned_at"
    is_readable = f"COALESCE(new.error NOT LIKE '{UNREADABLE}%', TRUE)"
    replaces = f"old.error IS NOT NULL OR NOT (old.sha256 <=> new.sha256) AND {is_readable}"
    replaces = f"NOT new.unchanged AND {is_newer} AND ({replaces})"
    keeps = f"NOT new.unchanged AND {is_newer} AND old.error IS NULL AND NOT {is_readable}"
    kept = f"source_file = '{UNREADABLE}' || unix_micros(new.captioned_at)"
    moved = " OR ".join(f"NOT (new.{column} <=> old.{column})" for column in READ_FROM)
    read_from = ", ".join(f"{column} = new.{column}" for column in (*READ_FROM, "read_at"))
    merge = (
        f"MERGE INTO {name} old USING {{new}} new "  # noqa: S608 (constants)
        f"ON {of_key} AND {of_columns} AND old.image_id = new.image_id AND {SAME_MODEL} "
        f"WHEN MATCHED AND {replaces} THEN {GENERATED_CAPTIONS.update_clause('new')} "
        f"WHEN MATCHED AND {keeps} THEN UPDATE SET {kept} "
        f"WHEN MATCHED AND new.sha256 <=> old.sha256 AND ({moved}) THEN UPDATE SET {read_from} "
        f"WHEN NOT MATCHED AND NOT new.unchanged THEN {GENERATED_CAPTIONS.insert_clause('new')}"
    )
    spark.sql(merge, None, new=new, **key, **dict(zip(COLUMNS, columns, strict=True)))
