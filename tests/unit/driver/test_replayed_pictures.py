"""Tests that a replay reads the same picture files as an ingest, if rows refer to pictures by relative paths."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pictures import png

from pipelines.config import DataConfig
from pipelines.driver.ingest.sources.pictures import read_named_pictures, read_replayed_pictures
from pipelines.executor.ingest.decode import DecodeRules, decode_record
from pipelines.executor.ingest.records.record import Record
from pipelines.executor.ingest.records.table import payload_records


def parse(batches: Iterator[pa.RecordBatch]) -> Iterator[Record]:
    """Yield one record per row, named after the file in the row's column `path`. All records have the same fields."""
    for batch in batches:
        for path in batch["path"].to_pylist():
            yield Record(Path(path).name, {"image": "1.png", "text": "a cat"})


def decode(config: DataConfig, records: Iterator[Record]) -> list[dict[str, Any]]:
    rules = DecodeRules("shop", config.source.record_columns, config.limits, config.split, near_duplicates=False)
    return [decode_record(record, rules) for record in records]


@pytest.mark.parametrize("path", ["", "*/rows.jsonl", "2024/rows.jsonl"], ids=["folder", "pattern", "file"])
@pytest.mark.parametrize("image_root", [".", "pictures"])
def test_a_replay_reads_the_picture_that_lies_beside_the_file_of_its_row(
    tmp_path: Path, path: str, image_root: str
) -> None:
    years = ["2024"] if path.startswith("2024") else ["2023", "2024"]
    places = [tmp_path, *(tmp_path / year for year in years)]
    for place in places:
        (place / image_root).mkdir(parents=True, exist_ok=True)
        (place / "rows.jsonl").touch()
    source = {"kind": "jsonl", "path": str(tmp_path / path), "image_root": image_root}
    config = DataConfig.model_validate({"source": source})
    (tmp_path / image_root / "1.png").write_bytes(png(9))

    batch = pa.RecordBatch.from_pydict({"path": [f"{tmp_path}/{year}/rows.jsonl".encode() for year in years]})
    refused = decode(config, read_named_pictures(config, lambda rows: parse(as_text(rows)))(iter([batch])))
    assert [row["reason"] for row in refused] == ["missing_field"] * len(years)
    assert len({row["source_row"] for row in refused}) == len(years), "equal rows of two folders are two rows"

    for number, year in enumerate(years):
        (tmp_path / year / image_root / "1.png").write_bytes(png(number))
    columns = {name: [row[name] for row in refused] for name in ("source_row", "payload")}
    quarantined = pa.RecordBatch.from_pydict(columns)
    accepted = decode(config, read_replayed_pictures(config, payload_records)(iter([quarantined])))
    assert [row["image"] for row in accepted] == [png(number) for number in range(len(years))]
    assert [row["source_row"] for row in accepted] == columns["source_row"]


def test_a_row_that_an_earlier_release_has_refused_is_not_replayed_with_a_picture_of_another_folder(
    tmp_path: Path,
) -> None:
    (tmp_path / "1.png").write_bytes(png(9))
    source = {"kind": "jsonl", "path": str(tmp_path), "image_root": "."}
    config = DataConfig.model_validate({"source": source})
    payload = json.dumps({"image": "1.png", "text": "a cat", "__picture__": None})
    quarantined = pa.RecordBatch.from_pydict({"source_row": ["r1"], "payload": [payload]})
    (row,) = decode(config, read_replayed_pictures(config, payload_records)(iter([quarantined])))
    assert row["reason"] == "missing_field"
    assert "`lakesight ingest --refresh` reads the row again" in row["detail"]


def as_text(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield pa.RecordBatch.from_pydict({"path": [path.decode() for path in batch["path"].to_pylist()]})
