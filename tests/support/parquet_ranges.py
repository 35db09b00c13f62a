"""Functions that read Parquet files of tests in byte ranges, as an ingest does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.executor.ingest.records.parquet import parquet_records
from pipelines.executor.ingest.records.record import Record

RANGES = pa.schema(
    [
        ("path", pa.string()),
        ("file", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("partition", pa.map_(pa.string(), pa.string())),
    ]
)
BYTES = b"\x89PNG"


def read(
    path: Path, *, step: int = 2**25, named: tuple[str, ...] = ("image", "text"), partition: Mapping[str, Any] = {}
) -> list[Record]:
    """Read a file in byte ranges of `step` bytes."""
    return list(stream(path, step, named, partition))


def stream(path: Path, step: int, named: tuple[str, ...], partition: Mapping[str, Any]) -> Iterator[Record]:
    size, pairs = path.stat().st_size, [*partition.items()]
    rows = [
        {"path": str(path), "file": path.name, "start": start, "end": min(start + step, size), "partition": pairs}
        for start in range(0, size, step)
    ]
    return parquet_records(iter([pa.RecordBatch.from_pylist(rows, RANGES)]), "image", named, 64 * 2**20)


def read_path(path: str, size: int) -> list[Record]:
    row = {"path": path, "file": path.rpartition("/")[2], "start": 0, "end": size, "partition": []}
    batch = pa.RecordBatch.from_pylist([row], RANGES)
    return list(parquet_records(iter([batch]), "image", ("image", "text"), 64 * 2**20))


def count_each(path: Path) -> int:
    """Count the records of a file. Read the unused columns of each record too, but keep only one record in memory."""
    return sum(1 for record in stream(path, 2**25, ("image", "text"), {}) if not record.others or record.others() or 1)


def written(folder: Path, columns: Mapping[str, Any] | pa.Table, **options: Any) -> Path:
    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    pq.write_table(table, folder / "x.parquet", **options)
    return folder / "x.parquet"


def others(record: Record) -> dict[str, Any]:
    assert record.others is not None
    return record.others()
