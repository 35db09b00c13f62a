"""Tests that ingest removes a picture only if its row is gone or different, and that no accepted row is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from picture_server import picture_server
from pictures import as_base64, png, write_csv
from pyspark.sql import DataFrame, SparkSession

from pipelines.config import DataConfig
from pipelines.driver.ingest.pictures.gone import gone_pictures, relinked_pictures
from pipelines.driver.ingest.replay import replay
from pipelines.driver.ingest.run import ingest
from pipelines.driver.ingest.totals import TooManyRefused
from pipelines.errors import UserError
from pipelines.platform import Platform

PICTURES = "image_id string, sha256 string, split string, texts array<struct<prompt: string, text: string>>"
REFUSED = "claimed_id string, reason string, source_row string"


def table_config(path: Path, **further: Any) -> DataConfig:
    """Return the data config of the Delta table at a path, whose rows have the columns id, image and text."""
    source = {"kind": "table", "path": str(path), "columns": {"id": "id"}} | further.pop("source", {})
    return DataConfig.model_validate({"source": source, "near_duplicates": False} | further)


def write_rows(path: Path, rows: list[dict[str, Any]], **settings: Any) -> None:
    """Replace all rows of the Delta table at a path, or create the table."""
    write_deltalake(path, pa.Table.from_pylist(rows), mode="overwrite", schema_mode="overwrite", **settings)


def row(number: int, **columns: Any) -> dict[str, Any]:
    return {"id": number, "image": png(number), "text": f"picture {number}"} | columns


def stored(spark: SparkSession, platform: Platform, source: str, column: str = "split") -> dict[str, Any]:
    """Return one column of the rows of a source in `samples`, as a dict from picture id to value."""
    rows = spark.table(platform.table("samples")).where(f"source = '{source}'").select("image_id", column).collect()
    return {row["image_id"].partition("/")[2]: row[column] for row in rows}


def test_pictures_that_cannot_be_read_now_or_that_hardly_any_row_describes_stay_and_other_splits_are_found(
    spark: SparkSession,
) -> None:
    def samples(*rows: tuple[str, str, str]) -> DataFrame:
        return spark.createDataFrame([(*each, [("", "x")]) for each in rows], PICTURES)

    known = samples(("same", "a", "train"), ("moved", "a", "train"), ("busy", "a", "train"), ("bad", "a", "train"))
    known = known.unionAll(samples(("absent", "a", "train"), ("changed", "a", "train")))
    usable = samples(("same", "a", "train"), ("moved", "a", "train"), ("moved", "a", "test"), ("changed", "b", "train"))
    refused = [("busy", "unreadable_file", "r1"), ("bad", "not_an_image", "r2")]
    outcomes = usable.unionByName(spark.createDataFrame(refused, REFUSED), allowMissingColumns=True)
    quarantine = spark.createDataFrame([], "source_row string, replayed_at timestamp")

    def gone(**settings: bool) -> list[str]:
        return sorted(row["image_id"] for row in gone_pictures(outcomes, known, quarantine, **settings).collect())

    assert gone() == ["absent", "bad", "changed"]
    assert gone(follow_splits=True) == ["absent", "bad", "changed", "moved"]
    assert gone(keep_absent=True) == ["changed"]


def test_a_picture_whose_id_belongs_to_several_pictures_and_a_picture_with_unreadable_rows_stay(
    spark: SparkSession,
) -> None:
    def samples(*rows: tuple[str, str, str, list[str]]) -> DataFrame:
        return spark.createDataFrame([(*each[:3], [("", text) for text in each[3]]) for each in rows], PICTURES)

    known = samples(("clash", "a", "train", ["x"]), ("two", "a", "train", ["x", "y"]), ("new", "a", "train", ["x"]))
    usable = samples(
        ("clash", "a", "test", ["z"]),
        ("clash", "b", "test", ["x"]),
        ("two", "a", "train", ["x"]),
        ("new", "a", "train", ["corrected"]),
    )
    outcomes = usable.unionByName(spark.createDataFrame([], REFUSED), allowMissingColumns=True)
    quarantine = spark.createDataFrame([], "source_row string, replayed_at timestamp")

    def gone(**settings: bool) -> list[str]:
        return sorted(row["image_id"] for row in gone_pictures(outcomes, known, quarantine, **settings).collect())

    assert gone(follow_splits=True) == ["new", "two"]
    assert gone(keep_absent=True, keep_subsets=True) == ["new"]


def test_pictures_whose_near_duplicate_is_removed_get_one_of_each_other_as_near_duplicate(spark: SparkSession) -> None:
    near = [("a", None), ("b", "a"), ("c", "a"), ("d", "a"), ("e", "b"), ("f", "gone")]
    samples = spark.createDataFrame(near, "image_id string, near_of string")
    gone = spark.createDataFrame([("a",), ("b",)], "image_id string")
    found = {row["image_id"]: (row["gone_id"], row["near_of"]) for row in relinked_pictures(samples, gone).collect()}
    assert found == {"c": ("a", None), "d": ("a", "c"), "e": ("b", None)}


@pytest.mark.matrix
def test_a_picture_that_a_server_cannot_send_now_is_not_removed(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = {"/1.png": png(1), "/2.png": png(2)}
    rows = [row(n, image=f"{n}.png") for n in (1, 2)]
    with picture_server(pictures) as root:
        for key in ("id", None):
            config = table_config(tmp_path, source={"columns": {"id": key}, "image_root": root})
            name = f"{source}-{key}"
            pictures["/2.png"] = png(2)
            write_rows(tmp_path, rows)
            assert ingest(spark, platform, name, config).new == 2
            del pictures["/2.png"]
            write_rows(tmp_path, rows)
            report = ingest(spark, platform, name, config)
            assert (report.removed, report.reasons) == (0, {"unreadable_file": 1})
            assert len(stored(spark, platform, name)) == 2
    assert "Without an id column, ingest cannot find these pictures" in caplog.text


@pytest.mark.matrix
@pytest.mark.parametrize("feed", ["true", "false"])
def test_a_table_that_is_empty_for_a_moment_keeps_its_pictures(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path, feed: str
) -> None:
    config = table_config(tmp_path)
    write_rows(tmp_path, [row(1), row(2)], configuration={"delta.enableChangeDataFeed": feed})
    ingest(spark, platform, source, config)
    DeltaTable(tmp_path).delete()
    with pytest.raises(UserError, match=r"not one row of the table could be used.*Got: 0 rows.*delete the rows of"):
        ingest(spark, platform, source, config)
    assert sorted(stored(spark, platform, source)) == ["1", "2"]
    write_deltalake(tmp_path, pa.Table.from_pylist([row(2), row(3)]), mode="append")
    report = ingest(spark, platform, source, config)
    assert (report.removed, report.new, sorted(stored(spark, platform, source))) == (1, 1, ["2", "3"])


@pytest.mark.matrix
def test_an_ingest_that_fails_because_of_bad_rows_removes_only_pictures_that_it_adds_again(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    config = table_config(tmp_path, limits={"max_bad_share": 0.2})
    write_rows(tmp_path, [row(n) for n in range(1, 5)])
    ingest(spark, platform, source, config)
    write_rows(tmp_path, [row(1), row(2, image=b"words"), row(4, text="corrected")])
    with pytest.raises(TooManyRefused) as failed:
        ingest(spark, platform, source, config)
    assert (failed.value.report.removed, failed.value.report.new) == (1, 1)
    found = stored(spark, platform, source, "texts")
    assert {name: texts[0]["text"] for name, texts in found.items()} == {
        **{str(n): f"picture {n}" for n in range(1, 4)},
        "4": "corrected",
    }
    write_rows(tmp_path, [row(1), row(2), row(4, text="corrected")])
    assert ingest(spark, platform, source, config).removed == 1
    assert sorted(stored(spark, platform, source)) == ["1", "2", "4"]


@pytest.mark.matrix
def test_a_table_whose_rows_all_have_the_same_id_for_a_moment_keeps_its_pictures(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    config = table_config(tmp_path)
    write_rows(tmp_path, [row(n) for n in (1, 2, 3)])
    ingest(spark, platform, source, config)
    write_rows(tmp_path, [row(n, id=7) for n in (1, 2, 3)])
    with pytest.raises(UserError, match="the pictures of earlier ingests were kept"):
        ingest(spark, platform, source, config)
    assert sorted(stored(spark, platform, source)) == ["1", "2", "3"]


@pytest.mark.matrix
def test_a_changed_split_in_a_table_moves_the_picture(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    config = table_config(tmp_path, split={"kind": "column", "column": "part"})
    write_rows(tmp_path, [row(n, part="train") for n in (1, 2)])
    ingest(spark, platform, source, config)
    DeltaTable(tmp_path).update(updates={"part": "'test'"}, predicate="id = 2")
    report = ingest(spark, platform, source, config)
    assert (report.removed, report.new, stored(spark, platform, source)) == (1, 1, {"1": "train", "2": "test"})


@pytest.mark.matrix
def test_a_changed_split_in_a_file_is_reported_until_a_refresh_applies_it(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def write(*splits: str) -> None:
        rows = [{"image": as_base64(png(n)), "text": "x", "part": split} for n, split in enumerate(splits)]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))

    settings = {"source": {"kind": "jsonl", "path": str(tmp_path)}, "split": {"kind": "column", "column": "part"}}
    config = DataConfig.model_validate(settings | {"near_duplicates": False})
    write("train", "train")
    assert ingest(spark, platform, source, config).pictures_of_other_splits == 0
    write("train", "test", "val")
    report = ingest(spark, platform, source, config)
    assert (report.pictures_of_other_splits, report.splits) == (1, {"train": 2, "val": 1})
    assert "1 pictures stay in the split of an earlier ingest" in caplog.text
    report = ingest(spark, platform, source, config, refresh=True)
    assert (report.pictures_of_other_splits, report.splits) == (0, {"test": 1, "train": 1, "val": 1})


@pytest.mark.matrix
def test_a_row_that_a_replay_has_accepted_can_be_replayed_again_after_its_picture_was_removed(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    strict = table_config(tmp_path, limits={"max_text_chars": 20})
    tolerant = table_config(tmp_path, limits={"max_text_chars": 90})
    long = row(2, text="x" * 50)
    write_rows(tmp_path, [row(1), long, row(3, text="y" * 50)])
    ingest(spark, platform, source, strict)
    assert replay(spark, platform, source, tolerant, ["text_too_long"]).new == 2
    DeltaTable(tmp_path).delete("id = 2")
    assert ingest(spark, platform, source, strict).removed == 1
    assert replay(spark, platform, source, tolerant, ["text_too_long"]).rows_in == 0, "the row is not in the table"
    write_deltalake(tmp_path, pa.Table.from_pylist([long]), mode="append")
    report = ingest(spark, platform, source, strict)
    assert (report.new, report.duplicates, report.refused) == (0, 3, 2)
    again = replay(spark, platform, source, tolerant, ["text_too_long"])
    assert (again.rows_in, again.new) == (1, 1)
    assert sorted(stored(spark, platform, source)) == ["1", "2", "3"]


@pytest.mark.matrix
def test_a_refresh_without_usable_rows_changes_nothing_and_the_next_ingest_reads_only_changed_files(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    files = [write_csv(tmp_path / name, [[as_base64(png(n)), "x"]]) for n, name in enumerate(("a.csv", "b.csv"))]
    config = DataConfig.model_validate({"source": {"path": str(tmp_path)}, "near_duplicates": False})
    ingest(spark, platform, source, config)
    first, status = files[0].read_bytes(), files[0].stat()
    for file in files:
        write_csv(file, [["words", "x"]])
    with pytest.raises(UserError, match="a refresh would remove all rows of the source"):
        ingest(spark, platform, source, config, refresh=True)
    write_csv(files[1], [[as_base64(png(2)), "x"]])
    files[0].write_bytes(first)
    os.utime(files[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    report = ingest(spark, platform, source, config)
    assert (report.items, report.unchanged) == (1, 1)


@pytest.mark.matrix
def test_a_refresh_fails_if_the_captions_file_has_no_rows(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    (tmp_path / "1.png").write_bytes(png(1))
    captions = write_csv(tmp_path / "captions.csv", [["1.png", "x"]], header=("file_name", "text"))
    config = DataConfig.model_validate({"source": {"kind": "folder", "path": str(tmp_path), "captions": captions.name}})
    ingest(spark, platform, source, config)
    write_csv(captions, [], header=("file_name", "text"))
    with pytest.raises(UserError, match="a refresh would remove all rows of the source"):
        ingest(spark, platform, source, config, refresh=True)
    assert len(stored(spark, platform, source)) == 1
