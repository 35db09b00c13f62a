"""What an ingest has found out so far: pictures and payloads that wait for the plan, and the narrow rows it is made of.

All in files of one folder that executors write and read. Spark's cache would not do for the narrow rows: an executor
that is lost takes its part along, which means to decode again, and a write into `samples` clears what was made of it.
"""

from __future__ import annotations

import logging
import re
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

from pipelines.executor.ingest.spill import PLACE, WIDE, with_wide
from pipelines.platform import Platform

logger = logging.getLogger(__name__)

PREFIX = "ingest-"
GLOB = re.compile(r"[\[\]{}*?\\]")
"""Characters of a path that Spark takes for a pattern when it reads, not when it writes."""
FILE_BYTES = 128 * 2**20
"""Bytes of pictures that go into one file of a table, about."""
STALE = timedelta(days=2)


@dataclass(frozen=True)
class Waiting:
    """Files of one ingest.

    Attributes:
        folder: where they are; of this ingest alone.
    """

    folder: Path

    def keep(self, rows: DataFrame, what: str) -> DataFrame:
        """Narrow rows, computed now and once, whatever is asked of them later. `what` they are names their files."""
        path = str(self.folder / f"{what}-{uuid.uuid4().hex}")
        rows.write.parquet(path)
        return rows.sparkSession.read.schema(rows.schema).parquet(GLOB.sub(r"\\\g<0>", path))

    def join(self, rows: DataFrame, *names: str) -> DataFrame:
        """Rows with wide columns of theirs (`staging.WIDE`), in the place of a column `place` (a struct, PLACE first).

        Nothing wide is shuffled: rows go, a few hundred bytes each, to where a task reads its part of the files.
        """
        size = sum(path.stat().st_size for path in self.folder.glob("*.arrow"))
        tasks = max(rows.sparkSession.sparkContext.defaultParallelism, size // FILE_BYTES)
        placed = rows.select("*", *(f"place.{name}" for name in PLACE.names)).drop("place")
        parts = placed.repartitionByRange(tasks, *PLACE.names[:2]).sortWithinPartitions(*PLACE.names)
        wide = from_arrow_schema(pa.schema([WIDE.field(name) for name in names]))
        schema = StructType([*placed.schema.fields[: -len(PLACE)], *wide.fields])
        return parts.mapInArrow(partial(with_wide, folder=str(self.folder), names=names), schema)


@contextmanager
def waiting_rows(platform: Platform) -> Iterator[Waiting]:
    """A folder for as long as the block runs. What killed ingests left behind is removed once it is old."""
    folder = platform.folder("staged").absolute()
    for path in folder.glob(f"{PREFIX}*"):
        if time.time() - path.stat().st_mtime > STALE.total_seconds():
            logger.info("removing what an ingest left behind when it was killed: %s", path)
            shutil.rmtree(path, ignore_errors=True)
    waiting = Waiting(folder / f"{PREFIX}{uuid.uuid4().hex}")
    waiting.folder.mkdir(parents=True)
    try:
        yield waiting
    finally:
        shutil.rmtree(waiting.folder, ignore_errors=True)
