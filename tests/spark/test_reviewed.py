"""Test that `lakesight ingest --run reviewed` reads verdicts on different pictures with equal ids."""

from __future__ import annotations

from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from pictures import png
from pyspark.sql import SparkSession

from pipelines.config import DataConfig, load_run
from pipelines.driver.ingest.run import ingest
from pipelines.formats.tables import VERDICTS
from pipelines.platform import Platform


def verdict(table: str, picture: bytes, text: str | None) -> dict[str, Any]:
    row = dict.fromkeys(VERDICTS.names, "x") | {"image_id": "1", "source_table": table, "prompt": "", "text": text}
    return row | {"image": picture, "sha256": sha256(picture).hexdigest(), "judged_at": datetime.now(UTC)}


@pytest.mark.matrix
def test_verdicts_on_different_pictures_with_equal_ids_are_ingested_and_earlier_ids_are_replaced(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    shipped = load_run("reviewed").data.model_dump()
    shipped["source"] |= {"table": "", "path": str(tmp_path / "verdicts")}
    config = DataConfig.model_validate(shipped)
    shipped["source"]["columns"] |= {"id": "image_id"}
    earlier = DataConfig.model_validate(shipped)

    def write(*rows: dict[str, Any]) -> None:
        content = pa.Table.from_pylist(list(rows), VERDICTS.arrow_schema)
        write_deltalake(tmp_path / "verdicts", content, mode="append")

    def texts() -> dict[str, list[str]]:
        rows = spark.table(platform.table("samples")).where(f"source = '{source}'").collect()
        return {row["image_id"].partition("/")[2]: [pair["text"] for pair in row["texts"]] for row in rows}

    write(verdict("shop", png(1), "a red hat"))
    ingest(spark, platform, source, earlier)
    assert texts() == {"1": ["a red hat"]}
    write(verdict("garden", png(2), "a green leaf"), verdict("shop", png(3), None))
    report = ingest(spark, platform, source, config)
    assert (report.new, report.removed, report.quarantined) == (2, 1, 0)
    assert texts() == {sha256(png(1)).hexdigest(): ["a red hat"], sha256(png(2)).hexdigest(): ["a green leaf"]}
