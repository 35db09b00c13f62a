"""Spill folder of one ingest, with intermediate results and with pictures and payloads that are not in a table yet.

Executors write and read the files of the spill folder. Spark's cache cannot replace the spill files. If an executor
were lost, the cached pictures of the executor would be lost too and would have to be decoded again. A write to
`samples` also clears every cached result that is based on `samples`.
"""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import StructType

from pipelines.driver.delta.settings import escape_wildcards
from pipelines.executor.ingest.spill import POSITION, WIDE, restore_wide
from pipelines.platform import Platform, default_parallelism

logger = logging.getLogger(__name__)

PREFIX = "ingest-"
FILE_BYTES = 128 * 2**20
"""Approximate size of the pictures in one data file of a table, in bytes."""
STALE = timedelta(days=2)
"""The next ingest removes spill folders of at least this age, because their ingests were probably killed."""


@dataclass(frozen=True)
class SpillFolder:
    """A folder of spill files that belongs to one ingest."""

    folder: Path

    def materialize(self, rows: DataFrame, name: str) -> DataFrame:
        """Compute rows once, write them to Parquet files, and return a DataFrame that reads these files."""
        path = str(self.folder / f"{name}-{uuid.uuid4().hex}")
        rows.write.parquet(path)
        return rows.sparkSession.read.schema(rows.schema).parquet(escape_wildcards(path))

    def restore(self, rows: DataFrame, *names: str) -> DataFrame:
        """Read the large columns `names` from the spill files, and put them in place of the column `spilled`. Column
        `spilled` is a struct that starts with the position in the spill files (POSITION).

        Rows are shuffled without the large columns, so a shuffled row has only a few hundred bytes. Each task then
        reads its part of the spill files.
        """
        size = sum(path.stat().st_size for path in self.folder.glob("*.arrow"))
        tasks = max(default_parallelism(rows.sparkSession), size // FILE_BYTES)
        narrow = rows.select("*", *(f"spilled.{name}" for name in POSITION.names)).drop("spilled")
        parts = narrow.repartitionByRange(tasks, *POSITION.names[:2]).sortWithinPartitions(*POSITION.names)
        wide = from_arrow_schema(pa.schema([WIDE.field(name) for name in names]))
        schema = StructType([*narrow.schema.fields[: -len(POSITION)], *wide.fields])
        return parts.mapInArrow(partial(restore_wide, folder=str(self.folder), names=names), schema)


@contextmanager
def spill_folder(platform: Platform) -> Iterator[SpillFolder]:
    """Create a spill folder that exists while the block runs. Old folders of killed ingests are removed first."""
    parent = platform.folder("staged").absolute()
    for path in parent.glob(f"{PREFIX}*"):
        if time.time() - path.stat().st_mtime > STALE.total_seconds():
            logger.info("removing %s, the spill folder of an ingest that was killed", path)
            shutil.rmtree(path, ignore_errors=True)
    spill = SpillFolder(parent / f"{PREFIX}{uuid.uuid4().hex}")
    spill.folder.mkdir(parents=True)
    try:
        yield spill
    finally:
        shutil.rmtree(spill.folder, ignore_errors=True)
