"""Tests of ingest of random invalid rows: no row crashes the job, no row is lost, every row has an allowed result."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from fuzzed_rows import MAX_CHARS, MAX_PIXELS, rows, written
from pyspark.sql import SparkSession

from pipelines.config import DataConfig
from pipelines.driver.ingest.run import ingest
from pipelines.platform import Platform


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=[pytest.mark.faults, pytest.mark.matrix])])
def test_every_random_row_becomes_a_sample_or_is_refused_for_an_allowed_reason(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path, count: int
) -> None:
    drawn = list(rows(count, seed=6))
    path = tmp_path / "fuzz.csv"
    path.write_bytes(written(drawn))
    config = DataConfig.model_validate(
        {
            "source": {"path": str(path), "columns": {"id": "row"}},
            "near_duplicates": count > 300,
            "limits": {"max_pixels": MAX_PIXELS, "max_text_chars": MAX_CHARS},
        }
    )
    report = ingest(spark, platform, source, config)
    assert report.rows_in == count

    samples = spark.table(platform.table("samples")).where(f"source = '{source}'").select("image_id").collect()
    refused = spark.table(platform.table("quarantine")).where(f"source = '{source}'").collect()
    came = [(int(row["image_id"].rpartition("/")[2]), None) for row in samples]
    came += [(number_in(row["payload"]), row["reason"]) for row in refused]
    assert Counter(number for number, _ in came) == Counter(range(count))
    ends = dict(came)
    wrong = [(row.number, row.kind, ends[row.number]) for row in drawn if ends[row.number] not in row.allowed]
    assert wrong == []
    assert [row["detail"] for row in refused if "unexpected" in row["detail"]] == []
    assert {end for _, end in came} >= REACHED


REACHED = {
    *(None, "malformed_record", "missing_field", "bad_base64", "not_an_image", "truncated_image", "too_large"),
    *("unsupported_format", "too_small", "empty_text", "text_too_long"),
}


def number_in(payload: str) -> int:
    """Return the row number from the payload of a row. The payload is a JSON record or a raw CSV line."""
    return int(json.loads(payload)["row"]) if payload.startswith("{") else int(payload.partition(",")[0])
