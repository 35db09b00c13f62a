"""Tests that Lakesight reads and writes its tables without Spark even if somebody has enabled deletion vectors."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from local_platforms import open_local
from pyspark.sql import SparkSession

from jobs.common import Job
from jobs.lineage import run_lineage
from jobs.output import CommandOutput
from pipelines.config import load_run
from pipelines.driver.delta.on_disk import count_on_disk, has_rows
from pipelines.driver.evaluate.decisions import record_decision, recorded_champion
from pipelines.driver.ingest.ledger import has_lost_items, read_ledger_of_files
from pipelines.formats.delta_files import open_delta
from pipelines.formats.table_schema import Table
from pipelines.formats.tables import DECISIONS, GENERATED_CAPTIONS, INGESTED, QUARANTINE, SAMPLES, VERDICTS
from pipelines.platform import Platform
from pipelines.review.delta_store import DeltaStore
from pipelines.review.verdicts import CaptionVerdict, Review

pytestmark = pytest.mark.matrix  # each test writes a table with Spark and changes its properties

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path) -> Platform:
    return open_local(monkeypatch, tmp_path / "home", database=empty_database)


def write(spark: SparkSession, home: Platform, table: Table, key: str, rows: list[dict[str, Any]]) -> DeltaTable:
    """Write rows to one data file. Then delete the row whose `key` is `gone`; this adds a deletion vector."""
    assert home.tables
    folder = home.tables / table.name
    empty = {field.name: _example(field.type) for field in table.arrow_schema}
    columns = pa.Table.from_pylist([empty | row for row in rows], table.arrow_schema)
    DeltaTable.create(folder, table.arrow_schema, configuration=table.properties, raise_if_key_not_exists=False)
    spark.sql(f"ALTER TABLE delta.`{folder}` SET TBLPROPERTIES ('delta.enableDeletionVectors' = 'true')")
    spark.createDataFrame(columns).coalesce(1).write.format("delta").mode("append").save(str(folder))
    spark.sql(f"DELETE FROM delta.`{folder}` WHERE {key} = 'gone'")
    assert list(folder.glob("deletion_vector_*.bin")), "Spark has deleted the row without a new data file"
    return open_delta(folder)


def _example(kind: pa.DataType) -> Any:
    if pa.types.is_timestamp(kind):
        return NOW
    if pa.types.is_list(kind):
        return []
    return b"" if pa.types.is_binary(kind) else "" if pa.types.is_string(kind) else 0


def test_the_ledger_and_row_counts_leave_out_rows_that_a_deletion_vector_deletes(
    spark: SparkSession, home: Platform
) -> None:
    entry = {"source": "a", "rules": "r", "filled_commit": None, "refused_commit": None}
    ledger = write(spark, home, INGESTED, "item", [entry | {"item": item, "state": "1"} for item in ("one", "gone")])
    assert read_ledger_of_files(ledger, "a", "r").to_pylist() == [{"item": "one", "state": "1"}]
    samples = write(
        spark, home, SAMPLES, "image_id", [{"image_id": name, "source": "a", "split": name} for name in ("x", "gone")]
    )
    assert count_on_disk(samples, {"source": "a"}, "split") == {"x": 1}
    assert has_rows(samples, {"source": "a", "split": "x"})
    assert not has_rows(samples, {"source": "a", "split": "gone"})
    quarantine = write(spark, home, QUARANTINE, "source", [{"source": "b"}, {"source": "gone"}])
    assert not has_lost_items(ledger, samples, quarantine, "a")


def test_decisions_are_read_and_written_in_a_table_with_deletion_vectors(spark: SparkSession, home: Platform) -> None:
    def decision(version: str, day: int, key: str = "") -> dict[str, Any]:
        row = {"decision_id": key, "model_name": "m", "model_version": version, "action": "promote"}
        return row | {"decided_at": NOW.replace(day=day), "model_digest": None}

    write(spark, home, DECISIONS, "decision_id", [decision("1", 1), decision("2", 2, "gone")])

    def no_spark() -> SparkSession:
        raise AssertionError("Spark would read the table")

    assert recorded_champion(no_spark, home, "m") == ("1", None)
    record_decision(no_spark, home, model="m", version="3", digest="d", action="promote", champion="1")
    assert recorded_champion(no_spark, home, "m") == ("3", "d")
    assert spark.read.format("delta").load(str(home.tables / "decisions")).count() == 2  # type: ignore[operator]


def test_captions_and_verdicts_are_read_and_written_in_tables_with_deletion_vectors(
    spark: SparkSession, home: Platform
) -> None:
    assert home.tables
    caption: dict[str, Any] = {
        "source_table": "samples",
        "model_name": "m",
        "model_version": "1",
        "settings_hash": "h",
        "model_digest": "d",
        "sha256": sha256(b"png").hexdigest(),
        "caption": "red",
    }
    nothing = dict.fromkeys(("error", "id_column", "image_column", "image_root"))
    captions = write(
        spark,
        home,
        GENERATED_CAPTIONS,
        "image_id",
        [caption | nothing | {"image_id": name} for name in ("a", "b", "gone")],
    )
    verdict = caption | {"verdict": "good"}
    write(spark, home, VERDICTS, "image_id", [verdict | {"image_id": name} for name in ("b", "gone")])
    write_deltalake(home.tables / "samples", pa.table({"image_id": ["a", "b"], "image": [b"png"] * 2}))

    pictures = open_delta(home.tables / "samples")
    store = DeltaStore(captions, pictures, home.tables / "verdicts", table="samples", model="m", has_texts=False)
    review = Review(store, table="samples", model="m")
    assert sorted(row["image_id"] for row in review.captions) == ["a", "b"]
    assert [row["image_id"] for row in review.find("judged", "")] == ["b"]
    for image_id in ("a", "b"):
        posted = {name: caption[name] for name in ("model_version", "settings_hash", "model_digest", "sha256")}
        posted |= {"image_id": image_id}
        review.save_verdict(CaptionVerdict.model_validate(posted | {"verdict": "bad"}), "me")
    stored = spark.read.format("delta").load(str(home.tables / "verdicts")).select("image_id", "verdict").collect()
    assert sorted(tuple(row) for row in stored) == [("a", "bad"), ("b", "bad")]

    job = Job(load_run("demo"), home, (), CommandOutput(io.StringIO(), as_json=False))
    assert [item.model_version for item in run_lineage(job, "a")] == ["1"]
