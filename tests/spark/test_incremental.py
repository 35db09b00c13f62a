"""Tests of incremental and concurrent ingests: only changed input is read, and each row is written once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pictures import as_base64, png, write_csv
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.conf import RuntimeConfig
from refused_settings import refuse_settings

from pipelines.config import DataConfig
from pipelines.driver.delta.retry import WriteConflict, retry_on_conflict
from pipelines.driver.delta.versions import read_versions
from pipelines.driver.ingest.commit import write_samples
from pipelines.driver.ingest.decode import DecodedRows, IngestRequest, decode_rows
from pipelines.driver.ingest.ledger import items_table
from pipelines.driver.ingest.pictures.gone import gone_pictures
from pipelines.driver.ingest.plan import plan_ingest
from pipelines.driver.ingest.run import ingest
from pipelines.driver.ingest.sources.open import open_source
from pipelines.driver.ingest.sources.source import Source
from pipelines.driver.ingest.sources.table.open import select_columns
from pipelines.driver.ingest.spill import SpillFolder, spill_folder
from pipelines.driver.ingest.totals import IngestReport, describe_counts
from pipelines.errors import UserError
from pipelines.executor.ingest.records.table import delta_records
from pipelines.formats.delta_files import commit_id
from pipelines.platform import Platform


def data(source: dict[str, Any], **further: Any) -> DataConfig:
    return DataConfig.model_validate({"source": source, "near_duplicates": False} | further)


def parts(report: IngestReport) -> tuple[int, int, int, int, int]:
    total = report.new + report.updated + report.merged + report.duplicates + report.quarantined
    assert total == report.rows_in
    return report.rows_in, report.new, report.merged, report.duplicates, report.quarantined


def texts_of(spark: SparkSession, platform: Platform, source: str) -> dict[str, list[str]]:
    rows = spark.table(platform.table("samples")).where(f"source = '{source}'").select("image_id", "texts").collect()
    assert len({row["image_id"] for row in rows}) == len(rows), "no picture is duplicated"
    return {row["image_id"].partition("/")[2]: [pair["text"] for pair in row["texts"]] for row in rows}


def test_an_ingest_reads_only_new_and_changed_files_and_a_refresh_removes_rows_that_the_input_lacks(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    config = data({"path": str(tmp_path)})
    write_csv(tmp_path / "a.csv", [[as_base64(png(1)), "a"], [as_base64(b"no picture"), "b"]])
    second = write_csv(tmp_path / "b.csv", [[as_base64(png(2)), "c"]])
    first = ingest(spark, platform, source, config)
    assert (first.items, first.unchanged, parts(first)) == (2, 0, (3, 2, 0, 0, 1))

    changed = second.stat().st_mtime_ns + 2_000_000  # Spark reads modification times in milliseconds
    write_csv(second, [[as_base64(png(2)), "d"]])
    os.utime(second, ns=(changed, changed))
    write_csv(tmp_path / "c.csv", [[as_base64(png(3)), "e"]])
    later = ingest(spark, platform, source, config)
    assert (later.items, later.unchanged, parts(later)) == (2, 1, (2, 1, 1, 0, 0)), "same size, but rewritten"
    assert sorted(texts_of(spark, platform, source).values()) == [["a"], ["c", "d"], ["e"]]

    write_csv(tmp_path / "c.csv", [[as_base64(png(4)), "f"]])
    again = ingest(spark, platform, source, config, refresh=True)
    assert (again.items, parts(again), again.updated) == (3, (4, 1, 0, 0, 1), 2), "only one picture is new"
    assert describe_counts(again) == "1 new + 2 updated + 0 merged + 0 duplicates + 1 quarantined"
    assert again.replaced == {"samples": 3, "quarantine": 1}
    assert sorted(texts_of(spark, platform, source).values()) == [["a"], ["d"], ["f"]]
    write_csv(tmp_path / "a.csv", [[as_base64(b"no picture"), "b"]])
    second.unlink()
    (tmp_path / "c.csv").unlink()
    with pytest.raises(UserError, match="a refresh would remove all rows of the source"):
        ingest(spark, platform, source, config, refresh=True)
    assert len(texts_of(spark, platform, source)) == 3


def test_only_new_rows_and_changed_pictures_of_a_folder_are_read(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    rows = [[f"{n}.png", f"picture {n}"] for n in range(4)]
    captions = write_csv(tmp_path / "captions.csv", rows, header=("file_name", "text"))
    config = data({"kind": "folder", "path": str(tmp_path), "captions": captions.name})
    first = open_source(spark, platform, source, config, items_table([]))
    (tmp_path / "3.png").write_bytes(png(3))
    (tmp_path / "0.png").write_bytes(png(10, (25, 16)))
    write_csv(captions, [*rows, rows[1], ["1.png", "another text"]], header=("file_name", "text"))
    second = open_source(spark, platform, source, config, first.pending)
    assert (first.num_pending, second.num_pending, second.unchanged) == (4, 3, 2)
    assert second.rows is not None
    came = {row["fields"] for row in second.rows.frame.collect()}
    assert len(came) == 3
    assert not [fields for fields in came if "picture 1" in fields or "picture 2" in fields]


FEED = {"delta.enableChangeDataFeed": "true"}


def rows_of(*numbers: int, text: str = "x", key: str = "id") -> pa.Table:
    """Return table rows with two columns that are in no config: one has a dot in its name, one has years after 9999."""
    far = pa.scalar(400_000_000_000_000_000, pa.timestamp("us", "UTC"))
    rows = pa.Table.from_pylist([{key: n, "image": png(n), "text": f"{text}{n}"} for n in numbers])
    return rows.append_column("meta.url", [["u"] * len(rows)]).append_column("far", pa.array([far] * len(rows)))


def opened_ids(spark: SparkSession, opened: Source) -> tuple[list[Any], list[str] | None]:
    """Return the ids of the rows to read from a table, and the ids of the pictures that the ingest may remove (None if
    it may remove any picture).
    """
    assert opened.rows
    read = sorted(row["used_2"] for row in opened.rows.frame.select("used_2").collect())
    if opened.covered is None:
        return read, []
    ids = opened.covered.image_ids
    return read, None if ids is None else sorted(row["image_id"].partition("/")[2] for row in ids.collect())


def test_only_changed_rows_of_a_table_with_a_change_data_feed_are_read(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    write_deltalake(tmp_path, rows_of(1, 2, 3), configuration=FEED)
    write_deltalake(tmp_path, rows_of(5, text="bad"), mode="append")
    kind = {"kind": "table", "path": str(tmp_path), "columns": {"id": "id"}}
    with pytest.raises(UserError, match=r"condition cannot be used. Where: data.source.filter. Got: texts > 1"):
        ingest(spark, platform, source, data(kind | {"filter": "texts > 1"}))
    config = data(kind | {"filter": "text NOT LIKE 'bad%'"})
    assert parts(ingest(spark, platform, source, config)) == (3, 3, 0, 0, 0)
    table = DeltaTable(tmp_path)
    table.update(updates={"text": "'better'"}, predicate="id = 5")
    table.delete("id = 3")
    table.update(updates={"text": "'corrected'"}, predicate="id = 2")
    write_deltalake(tmp_path, rows_of(4), mode="append")
    followed = ingest(spark, platform, source, config)
    assert (followed.removed, parts(followed)) == (2, (3, 3, 0, 0, 0)), "row 1 was not read again"
    assert texts_of(spark, platform, source) == {"1": ["x1"], "2": ["corrected"], "4": ["x4"], "5": ["better"]}


@pytest.mark.matrix
def test_pictures_whose_rows_were_deleted_from_a_table_without_a_change_data_feed_are_removed(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    write_deltalake(tmp_path, rows_of(1, 2, 3))
    config = data({"kind": "table", "path": str(tmp_path), "columns": {"id": "id"}})
    assert parts(ingest(spark, platform, source, config)) == (3, 3, 0, 0, 0)
    table = DeltaTable(tmp_path)
    table.update(updates={"text": "'corrected'"}, predicate="id = 3")
    table.delete("id = 2")
    followed = ingest(spark, platform, source, config)
    assert (followed.removed, parts(followed)) == (2, (2, 1, 0, 1, 0))
    assert texts_of(spark, platform, source) == {"1": ["x1"], "3": ["corrected"]}
    bad = pa.Table.from_pylist([{"id": 1, "image": b"words", "text": "x"}])
    write_deltalake(tmp_path, bad, mode="overwrite", schema_mode="overwrite")
    with pytest.raises(UserError, match="not one row of the table could be used, so the pictures of earlier"):
        ingest(spark, platform, source, config)
    assert sorted(texts_of(spark, platform, source)) == ["1", "3"]


@pytest.mark.matrix
def test_a_table_is_read_completely_if_its_changes_are_unknown_and_not_at_all_if_only_files_were_rewritten(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    write_deltalake(tmp_path, rows_of(1, 2, key="k.id"), configuration=FEED)
    write_deltalake(tmp_path, rows_of(3, key="k.id"), mode="append")
    without_ids: dict[str, Any] = {"kind": "table", "path": str(tmp_path)}
    with_ids = without_ids | {"columns": {"id": "k.id"}}

    def opened(settings: dict[str, Any], last: int) -> Source:
        state = f"version {last} {commit_id(tmp_path, last)}"
        ingested = items_table([(str(DeltaTable(tmp_path).metadata().id), state)])
        return open_source(spark, platform, source, data(settings), ingested)

    assert opened_ids(spark, opened(with_ids, 0)) == ([3], []), "only inserts"
    assert opened(with_ids, 1).rows is None
    assert opened_ids(spark, opened(with_ids | {"version": 0}, 1)) == ([1, 2], None), "an older version"
    DeltaTable(tmp_path).delete("`k.id` = 1")
    assert opened_ids(spark, opened(with_ids, 1)) == ([], ["1"])
    whole = opened(without_ids, 1)
    assert whole.rows
    assert whole.rows.frame.count() == 2
    assert whole.covered
    assert whole.covered.image_ids is None
    DeltaTable(tmp_path).optimize.compact()
    assert opened_ids(spark, opened(with_ids, 2)) == ([], [])
    spark.sql(f"RESTORE TABLE delta.`{tmp_path}` TO VERSION AS OF 1")
    assert opened_ids(spark, opened(with_ids, 3))[0] == [1, 2, 3]
    spark.sql(f"ALTER TABLE delta.`{tmp_path}` UNSET TBLPROPERTIES (delta.enableChangeDataFeed)")
    DeltaTable(tmp_path).delete("`k.id` = 2")
    assert opened_ids(spark, opened(with_ids, 4)) == ([1, 3], None), "the feed was disabled"
    spark.sql(f"CREATE OR REPLACE TEMPORARY VIEW a_view AS SELECT * FROM delta.`{tmp_path}`")
    with pytest.raises(UserError, match="a view has no versions: read its table"):
        open_source(spark, platform, source, data({"kind": "table", "table": "a_view"}), items_table([]))


def test_a_column_of_any_type_is_passed_to_executors_as_values_or_as_text(spark: SparkSession) -> None:
    """Not every version of Spark converts VARIANT, TIME and intervals to Arrow (SPARK-45128, SPARK-53263)."""
    values = {
        "k.id": "1.0D",
        "a`b": "parse_json('{\"a\": [1]}')",
        "void": "NULL",
        "months": "INTERVAL '1-2' YEAR TO MONTH",
        "days": "INTERVAL '1 02' DAY TO HOUR",
        "both": "make_interval(1, 2)",
        "time": "TIME'12:34:56'",
        "nested": "map('x', named_struct('v', parse_json('1'), 'd', date'+14645-01-01'))",
        "far": "timestamp'+14645-01-01 00:00:00'",
        "long": "repeat('x', 2000000)",
        "id": "2",
    }
    quoted = {name: "`" + name.replace("`", "``") + "`" for name in values}
    frame = spark.sql(f"SELECT {', '.join(f'{value} AS {quoted[name]}' for name, value in values.items())}")
    selected = select_columns(frame, ("k.id",), "file")
    [record] = delta_records(iter(selected.toArrow().to_batches()), ("k.id",), "image")
    assert (record.file, record.fields) == ("file", {"k.id": 1.0})
    assert record.others
    others = record.others()
    assert list(others) == list(values)[1:]
    assert (json.loads(others["a`b"]), others["void"], len(others["long"]), others["id"]) == (
        {"a": [1]},
        None,
        2**20,
        2,
    )
    assert all(isinstance(others[name], str) for name in ("months", "days", "both", "time", "nested", "far"))


def test_a_picture_is_removed_if_the_input_lacks_the_picture_or_one_of_its_texts(
    spark: SparkSession,
) -> None:
    def samples(*rows: tuple[str, str, list[str]]) -> DataFrame:
        schema = "image_id string, sha256 string, texts array<struct<prompt: string, text: string>>"
        return spark.createDataFrame([(*row[:2], [("", text) for text in row[2]]) for row in rows], schema)

    kept = samples(("same", "a", ["x", "y"]), ("slow", "a", ["x"]), ("replayed", "a", ["x"]))
    gone = samples(
        ("deleted", "a", ["x"]), ("text", "a", ["x"]), ("picture", "a", ["x"]), ("one text", "a", ["x", "y"])
    )
    usable = samples(
        ("same", "a", ["x"]),
        ("same", "a", ["y", "z"]),
        ("text", "a", ["y"]),
        ("picture", "b", ["x"]),
        ("one text", "a", ["x"]),
    )
    refused = [("slow", "decode_timeout", "r1"), ("replayed", "text_too_long", "r2"), ("deleted", "empty_text", "r3")]
    columns = "claimed_id string, reason string, source_row string"
    outcomes = usable.unionByName(spark.createDataFrame(refused, columns), allowMissingColumns=True)
    times = [("r2", datetime.now(UTC)), ("r3", None)]
    quarantine = spark.createDataFrame(times, "source_row string, replayed_at timestamp")
    found = gone_pictures(outcomes, kept.unionAll(gone), quarantine).collect()
    assert sorted(row["image_id"] for row in found) == ["deleted", "one text", "picture", "text"]


@pytest.mark.matrix
def test_an_ingest_makes_a_new_plan_after_a_conflict_and_two_concurrent_ingests_write_each_row_once(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    pictures = [[as_base64(png(n % 5)), f"text {n}"] for n in range(6)]
    config = data({"path": str(write_csv(tmp_path / "a.csv", [*pictures, [as_base64(b"words"), "x"]]))})
    opened = open_source(spark, platform, source, config, items_table([]))
    assert opened.rows is not None
    faster = data({"path": str(write_csv(tmp_path / "b.csv", pictures[:2]))})
    planned = []

    def plan_and_write(decoded: DecodedRows) -> int:
        plan = plan_ingest(spark, platform, decoded)
        planned.append(plan.totals.new)
        if len(planned) == 1:
            ingest(spark.newSession(), platform, source, faster)
        write_samples(platform, plan)
        return plan.totals.contributing

    request = IngestRequest(source, config, opened.rows, opened.ingest_id)
    with spill_folder(platform) as spill, decode_rows(spark, platform, request, spill) as decoded:
        assert retry_on_conflict(partial(plan_and_write, decoded)) == 4
    assert planned == [5, 3]
    expected = {0: ["text 0", "text 5"], **{n: [f"text {n}"] for n in range(1, 5)}}
    assert sorted(texts_of(spark, platform, source).values()) == sorted(expected.values())

    twice = f"{source}-twice"
    with ThreadPoolExecutor() as pool:
        sessions = [spark.newSession(), spark.newSession()]
        both = list(pool.map(lambda session: ingest(session, platform, twice, config), sessions))
    assert sorted(texts_of(spark, platform, twice).values()) == sorted(expected.values())
    assert [sum(column) for column in zip(*map(parts, both), strict=True)][1:3] == [5, 1]
    assert sum(report.quarantined for report in both) == 1
    assert spark.table(platform.table("quarantine")).where(f"source = '{twice}'").count() == 1


@pytest.mark.matrix
def test_an_ingest_with_an_outdated_plan_adds_no_text_twice_if_the_session_refuses_settings(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, other, third = (as_base64(png(n)) for n in range(3))
    config = data({"path": str(write_csv(tmp_path / "a.csv", [[picture, "x"], [other, "x"]]))})
    refuse_settings(monkeypatch, RuntimeConfig)
    ingest(spark, platform, source, config)
    more = data({"path": str(write_csv(tmp_path / "b.csv", [[picture, "y"], [other, "y"], [third, "x"]]))})
    faster = data({"path": str(write_csv(tmp_path / "c.csv", [[picture, "y"], [third, "x"]]))})
    opened = open_source(spark, platform, source, more, items_table([]))
    assert opened.rows is not None
    request = IngestRequest(source, more, opened.rows, opened.ingest_id)
    with spill_folder(platform) as spill, decode_rows(spark, platform, request, spill) as decoded:
        outdated = plan_ingest(spark, platform, decoded)
        ingest(spark, platform, source, faster)
        with pytest.raises(WriteConflict):
            write_samples(platform, outdated)
        write_samples(platform, plan_ingest(spark, platform, decoded))
    assert sorted(texts_of(spark, platform, source).values()) == [["x"], ["x", "y"], ["x", "y"]]
    assert read_versions(spark, platform, f"{source}-another").last_change < outdated.stamp.base_version


def test_rows_in_the_spill_folder_are_computed_once_and_stay_unchanged_when_the_source_table_changes(
    spark: SparkSession, tmp_path: Path
) -> None:
    spill = SpillFolder(tmp_path / "a {folder} of [mine] *")
    spill.folder.mkdir()
    path = str(tmp_path / "table")
    spark.range(1).write.format("delta").save(path)
    table = spark.read.format("delta").load(path)
    calls = tmp_path / "calls"

    def counting(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            with calls.open("a") as file:
                file.write("once\n")
            yield batch

    kept = spill.materialize(table.mapInArrow(counting, "id bigint"), "numbers")
    assert [row["id"] for row in kept.collect()] == [0]
    spark.range(1).write.format("delta").mode("append").save(path)
    assert (table.count(), kept.count(), calls.read_text()) == (2, 1, "once\n")
