"""Tests of ingest with Spark and Delta: every row is counted, and a second ingest of the same input adds nothing."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pictures import IMAGE, TEXT, as_base64, encoded, picture, png, write_csv
from PIL import Image
from pyspark.sql import Row, SparkSession
from shared_data import shared_file

from pipelines.config import DataConfig
from pipelines.driver.delta.settings import spark_settings
from pipelines.driver.delta.tables import add_columns, ensure_table
from pipelines.driver.delta.versions import MAINTENANCE_OPERATIONS, commit_note, read_versions, source_note
from pipelines.driver.ingest.run import ingest
from pipelines.driver.ingest.totals import IngestReport
from pipelines.errors import UserError
from pipelines.formats.tables import SAMPLES
from pipelines.platform import Platform


def config(path: Path, **changes: Any) -> DataConfig:
    source = {"path": str(path), **changes.pop("source", {})}
    return DataConfig.model_validate(
        {"source": source, "near_duplicates": False, "limits": {"max_pixels": 2_000_000}} | changes
    )


def rows_of(spark: SparkSession, platform: Platform, table: str, source: str) -> list[Row]:
    return spark.table(platform.table(table)).where(f"source = '{source}'").collect()


def newest(spark: SparkSession, platform: Platform, table: str = "samples") -> int:
    return int(spark.sql(f"DESCRIBE HISTORY {platform.table(table)} LIMIT 1").collect()[0]["version"])


def parts(report: IngestReport) -> tuple[int, int, int, int, int]:
    return report.rows_in, report.new, report.merged, report.duplicates, report.quarantined


def texts(row: Row) -> list[str]:
    return [pair["text"] for pair in row["texts"]]


BAD = {
    "missing_field": ["", "no picture"],
    "bad_base64": ["?" + as_base64(png(1)), "not base64"],
    "not_an_image": [as_base64(b"just words"), "words"],
    "truncated_image": [as_base64(png(1)[:-30]), "cut"],
    "unsupported_format": [as_base64(encoded(picture(1), "PPM")), "a PPM"],
    "too_large": [as_base64(encoded(picture(1).resize((2000, 1001)), "JPEG")), "too large"],
    "too_small": [as_base64(png(1, (3, 9))), "too small"],
    "empty_text": [as_base64(png(2)), " "],
    "text_too_long": [as_base64(png(3)), "long " * 500],
    "malformed_record": [as_base64(png(4)), "one", "too many"],
}


def test_every_kind_of_bad_row_is_quarantined_with_all_fields_and_good_rows_are_kept(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    good = [[as_base64(png(n)), f'picture "{n}", with a comma'] for n in range(10, 14)]
    path = write_csv(tmp_path / "mixed.csv", [good[0], *BAD.values(), *good[1:], good[2]])
    report = ingest(spark, platform, source, config(path))
    assert parts(report) == (15, 4, 0, 1, 10)
    assert report.reasons == dict.fromkeys(BAD, 1)
    assert sum(report.splits.values()) == 4

    refused = {row["reason"]: row for row in rows_of(spark, platform, "quarantine", source)}
    assert set(refused) == set(BAD)
    for reason, row in refused.items():
        image, text = BAD[reason][:2]
        if reason == "malformed_record":
            assert row["payload"] == ",".join(BAD[reason])
        else:
            assert json.loads(row["payload"]) == {IMAGE: image or None, TEXT: text}
        assert row["ingest_id"] == report.ingest_id
        assert row["source_row"].startswith("mixed.csv#")
        assert row["detail"]
        assert row["replayed_at"] is None

    kept = {texts(row)[0]: row for row in rows_of(spark, platform, "samples", source)}
    assert set(kept) == {text for _, text in good}
    assert bytes(kept['picture "11", with a comma']["image"]) == png(11)


def test_a_repeated_ingest_of_a_file_adds_only_rows_that_were_appended_to_the_file(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    rows = [[as_base64(png(n)), f"picture {n}"] for n in range(30, 33)]
    path = write_csv(tmp_path / "a.csv", [*rows, BAD["bad_base64"]])
    first = ingest(spark, platform, source, config(path))
    before = [newest(spark, platform, table) for table in ("samples", "quarantine")]
    again = ingest(spark, platform, source, config(path))
    assert parts(first) == (4, 3, 0, 0, 1)
    assert parts(again) == (0, 0, 0, 0, 0)
    assert (first.items, first.unchanged, again.items, again.unchanged) == (1, 0, 0, 1)
    assert again.splits == first.splits
    assert again.reasons == {}
    assert [newest(spark, platform, table) for table in ("samples", "quarantine")] == before
    assert again.ingest_id == first.ingest_id
    assert again.dataset_version == first.dataset_version == before[0]

    more = [[as_base64(png(30)), "another text"], [as_base64(png(33)), "picture 33"], BAD["not_an_image"]]
    write_csv(path, [*rows, BAD["bad_base64"], *more])
    second = ingest(spark, platform, source, config(path))
    assert second.ingest_id != first.ingest_id
    assert parts(second) == (7, 1, 1, 4, 1)
    assert second.reasons == {"not_an_image": 1}
    assert second.dataset_version > first.dataset_version
    kept = {row["sha256"]: row for row in rows_of(spark, platform, "samples", source)}
    assert len(kept) == 4
    assert sorted(map(texts, kept.values())) == [
        ["picture 30", "another text"],
        *(["picture 31"], ["picture 32"], ["picture 33"]),
    ]
    assert {row["ingest_id"] for row in kept.values()} == {first.ingest_id, second.ingest_id}


def test_the_texts_of_all_rows_of_a_picture_are_merged_in_row_order_and_repeats_are_kept(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    image = as_base64(png(40))
    rows = [[image, "b", "what?"], [image, "a", ""], [image, "a", ""], [image, "a", "what?"]]
    path = write_csv(tmp_path / "a.csv", rows, header=(IMAGE, TEXT, "question"))
    report = ingest(spark, platform, source, config(path, source={"columns": {"prompt": "question"}}))
    assert parts(report) == (4, 1, 2, 1, 0)
    [row] = rows_of(spark, platform, "samples", source)
    pairs = [(pair["prompt"], pair["text"]) for pair in row["texts"]]
    assert pairs == [("what?", "b"), ("", "a"), ("", "a"), ("what?", "a")]

    write_csv(path, [*rows[2:], [image, "b", "what?"], [image, "b", "what?"]], header=(IMAGE, TEXT, "question"))
    again = ingest(spark, platform, source, config(path, source={"columns": {"prompt": "question"}}))
    assert parts(again) == (4, 0, 0, 4, 0)
    [row] = rows_of(spark, platform, "samples", source)
    assert [(pair["prompt"], pair["text"]) for pair in row["texts"]] == [*pairs, ("what?", "b")]
    assert again.dataset_version > report.dataset_version


def test_new_pictures_with_conflicting_ids_are_quarantined_and_the_picture_in_samples_is_kept(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    header = ("key", IMAGE, TEXT)
    with_ids = {"columns": {"id": "key"}}
    path = write_csv(tmp_path / "a.csv", [["one", as_base64(png(50)), "first"]], header)
    ingest(spark, platform, source, config(path, source=with_ids))
    fights = [
        ["one", as_base64(png(51)), "usurper"],
        ["two", as_base64(png(52)), "x"],
        ["two", as_base64(png(53)), "y"],
    ]
    write_csv(path, [["one", as_base64(png(50)), "first"], *fights, ["three", as_base64(png(50)), "twin"]], header)
    report = ingest(spark, platform, source, config(path, source=with_ids))
    assert parts(report) == (5, 1, 0, 1, 3)
    assert report.reasons == {"conflicting_id": 3}
    kept = {row["image_id"]: bytes(row["image"]) for row in rows_of(spark, platform, "samples", source)}
    assert kept == {f"{source}/one": png(50), f"{source}/three": png(50)}
    payloads = [json.loads(row["payload"]) for row in rows_of(spark, platform, "quarantine", source)]
    assert sorted(payloads, key=lambda row: str(row[TEXT])) == [dict(zip(header, row, strict=True)) for row in fights]


def test_csv_files_without_a_split_in_their_name_are_ignored_if_file_names_give_the_split(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    header = (TEXT, IMAGE)
    write_csv(tmp_path / "train.csv", [["a", as_base64(png(60))], ["b", as_base64(png(61))]], header)
    write_csv(tmp_path / "test.csv", [[as_base64(png(62)), "c"], [as_base64(png(61)), "b"]])
    write_csv(tmp_path / "captions.csv", [["x", "y"]], header=("something", "else"))
    report = ingest(spark, platform, source, config(tmp_path, split={"kind": "file"}))
    assert parts(report) == (4, 3, 0, 1, 0)
    assert report.splits == {"test": 2, "train": 1}, "the picture that is in both files is in the test split"
    assert report.equal_pictures_across_splits == 1


def test_a_damaged_file_is_quarantined_as_one_row_and_is_read_again_after_a_repair(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    rows = [[as_base64(png(110 + n)), f"row {n}"] for n in range(9)]
    write_csv(tmp_path / "in" / "_good [1].csv", rows[:2])
    whole = gzip.compress(write_csv(tmp_path / "note.txt", rows[2:]).read_bytes(), mtime=0)
    (tmp_path / "cut.csv").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.csv").touch()
    report = ingest(spark, platform, source, config(tmp_path))
    assert report.passed_over == {"empty": ["empty.csv"], "other_kind": ["note.txt"]}
    assert report.reasons == {"unreadable_file": 1}
    assert report.rows_in == report.new + 1
    assert 2 <= report.new < 9
    [named] = report.unreadable_files
    assert named.startswith(f"cut.csv: after {report.new - 2} rows")
    [refused] = rows_of(spark, platform, "quarantine", source)
    assert str(tmp_path / "cut.csv") in refused["payload"]
    assert ingest(spark, platform, source, config(tmp_path)).items == 0, "an unchanged damaged file is not read again"

    (tmp_path / "cut.csv").write_bytes(whole)
    again = ingest(spark, platform, source, config(tmp_path))
    assert (again.rows_in, again.new, again.quarantined) == (7, 9 - report.new, 0)


def test_quoted_line_breaks_in_csv_files_are_read_if_the_setting_multiline_is_true(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    path = write_csv(tmp_path / "a.csv", [[as_base64(png(70)), "two\nlines"], [as_base64(png(71)), "one line"]])
    report = ingest(spark, platform, source, config(path, source={"multiline": True}))
    assert parts(report) == (2, 2, 0, 0, 0)
    assert sorted(texts(row)[0] for row in rows_of(spark, platform, "samples", source)) == ["one line", "two\nlines"]


def test_all_rows_of_every_csv_dialect_are_read_for_any_partitioning_of_the_files(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    rows = [[as_base64(png(72 + n)), f'"{n}", a picture'] for n in range(6)]
    path = write_csv(tmp_path / "made in a/spreadsheet.csv", rows[:4])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    other = write_csv(tmp_path / "in" / "spreadsheet.csv", [row[::-1] for row in rows[4:]], header=(TEXT, IMAGE))
    other.write_bytes(other.read_bytes() + b"caf\xe9," + rows[0][0].encode())
    with spark_settings(spark, {"spark.sql.files.maxPartitionBytes": "500"}):
        report = ingest(spark, platform, source, config(tmp_path / "*"))
    assert parts(report) == (7, 6, 1, 0, 0)
    kept = {text for row in rows_of(spark, platform, "samples", source) for text in texts(row)}
    assert kept == {text for _, text in rows} | {"caf\ufffd"}


def test_texts_of_a_csv_file_that_spark_wrote_are_ingested_unchanged(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    said = ['say "hi"', 'C:\\dir "x"', "end\\", "end\\,", 'a\\\\"b', '"', '\\"', "\\", 'q",\\', 'two\nlines "\\"']
    rows = [(as_base64(png(300 + n)), text) for n, text in enumerate(said)]
    spark.createDataFrame(rows, f"`{IMAGE}` STRING, `{TEXT}` STRING").write.csv(str(tmp_path / "in"), header=True)
    found = config(tmp_path / "in", source={"escape": "\\", "multiline": True})
    assert parts(ingest(spark, platform, source, found)) == (10, 10, 0, 0, 0)
    assert {text for row in rows_of(spark, platform, "samples", source) for text in texts(row)} == set(said)


@pytest.mark.matrix
def test_rows_of_50_megabytes_are_ingested_or_quarantined(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    large = encoded(Image.new("RGB", (4200, 4000)), "BMP")
    rows = [[as_base64(large), "large"], [as_base64(png(1)), "small"], [f"?{as_base64(large)}", "large and bad"]]
    report = ingest(spark, platform, source, config(write_csv(tmp_path / "a.csv", rows), limits={}))
    assert len(large) > 50_000_000
    assert (report.rows_in, report.new, report.reasons) == (3, 2, {"bad_base64": 1})
    sizes = {texts(row)[0]: len(row["image"]) for row in rows_of(spark, platform, "samples", source)}
    assert sizes == {"large": len(large), "small": len(png(1))}
    [refused] = rows_of(spark, platform, "quarantine", source)
    assert json.loads(refused["payload"]) == {IMAGE: rows[2][0], TEXT: "large and bad"}


@pytest.mark.matrix
def test_the_counts_in_the_ingest_report_of_random_rows_equal_the_counts_of_a_simple_loop(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    rng = random.Random(7)
    rows = [
        rng.choice(list(BAD.values()))
        if rng.random() < 0.3
        else [as_base64(png(rng.randrange(90, 105))), rng.choice("ab")]
        for _ in range(150)
    ]
    seen: set[tuple[str, ...]] = set()
    known: set[str] = set()
    for count in (100, 150):
        hand = Counter(rows_in=count)
        for row in rows[:count]:
            kind = "quarantined" if row in BAD.values() else "merged" if row[0] in known else "new"
            hand["duplicates" if tuple(row) in seen else kind] += 1
            seen.add(tuple(row))
            known |= {row[0]} if kind == "new" else set()
        report = ingest(spark, platform, source, config(write_csv(tmp_path / "a.csv", rows[:count])))
        assert {name: report.model_dump()[name] for name in hand} == hand
        assert sum(report.splits.values()) == len(known)
        assert len(rows_of(spark, platform, "quarantine", source)) == len(seen & {tuple(row) for row in BAD.values()})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or folder"),
        ("", "no files, or only empty ones"),
        (f"{IMAGE},{TEXT}\n", "no rows"),
        (f"picture,{TEXT}\nx,y\n", f"no column {IMAGE}.* --set data.source.columns.image=picture on"),
        (f"{IMAGE},number,captions\nx,1,y\n", f"no column {TEXT}.* --set data.source.columns.text=captions on"),
        ("a,b\nx,y\n", "image=COLUMN --set data.source.columns.text=COLUMN on"),
        (f"{IMAGE},{TEXT}\nnothing,good\n", "not one row .* 1 not_an_image"),
    ],
    ids=["missing", "empty", "header-only", "no-column", "nearest-column", "no-columns", "all-bad"],
)
def test_an_ingest_of_an_unusable_input_raises_an_error_with_a_message_of_one_paragraph(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "a.csv"
    if content is not None:
        path.write_text(content)
    before = newest(spark, platform)
    with pytest.raises(UserError, match=message) as caught:
        ingest(spark, platform, source, config(path))
    assert "\n" not in str(caught.value)
    assert newest(spark, platform) == before


def test_the_csv_file_of_the_seemore_project_is_read(spark: SparkSession, platform: Platform, source: str) -> None:
    report = ingest(spark, platform, source, config(shared_file("seemore/inputs.csv")))
    assert parts(report) == (3, 3, 0, 0, 0)
    rows = rows_of(spark, platform, "samples", source)
    assert {(row["format"], row["width"], row["height"], row["split"]) for row in rows} == {
        ("PNG", 1024, 1024, "train")
    }


def test_the_test_split_of_the_emoji_dataset_is_read(spark: SparkSession, platform: Platform, source: str) -> None:
    path = shared_file("emoji/test.csv")
    data = config(path, source={"columns": {"id": "image_id"}}, split={"kind": "file"})
    report = ingest(spark, platform, source, data)
    assert parts(report) == (620, 620, 0, 0, 0)
    assert report.splits == {"test": 620}


def test_only_changed_rows_or_a_manual_commit_change_the_dataset_version_of_a_source(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    path = write_csv(tmp_path / "a.csv", [[as_base64(png(80)), "a"], [as_base64(png(81)), "b"]])
    pinned = ingest(spark, platform, source, config(path)).dataset_version
    ingest(spark, platform, f"{source}-other", config(path))
    table = platform.table(SAMPLES.name)
    spark.sql(f"OPTIMIZE {table}").collect()
    assert read_versions(spark, platform, source).last_change == pinned
    assert read_versions(spark, platform, source).newest > pinned + 1

    with commit_note(spark, source_note(f"{source}-other")):
        spark.sql(f"DELETE FROM {table} WHERE source = '{source}-other'").collect()
    assert read_versions(spark, platform, source).last_change == pinned
    spark.sql(f"DELETE FROM {table} WHERE source = '{source}' AND texts[0].text = 'a'").collect()
    assert read_versions(spark, platform, source).last_change == newest(spark, platform)


def test_a_table_of_an_earlier_release_gets_the_missing_columns_and_keeps_its_rows(
    spark: SparkSession, platform: Platform, tmp_path: Path
) -> None:
    old = replace(platform, namespace="lakesight_old", tables=tmp_path)
    spark.sql(f"CREATE SCHEMA lakesight_old LOCATION '{tmp_path}'")
    spark.sql("CREATE TABLE lakesight_old.samples USING DELTA AS SELECT 'a' AS image_id, 'b' AS sha256")
    for _ in range(2):
        add_columns(spark, old, replace(SAMPLES, columns=(*SAMPLES.columns[:2], *SAMPLES.columns[-2:])))
    [row] = spark.table("lakesight_old.samples").collect()
    assert row.asDict() == {"image_id": "a", "sha256": "b", "fingerprint": None, "near_of": None}
    history = spark.sql("DESCRIBE HISTORY lakesight_old.samples").collect()
    assert [commit["operation"] in MAINTENANCE_OPERATIONS for commit in history] == [True, False]


def test_a_table_is_created_again_if_the_first_creation_was_killed(
    spark: SparkSession, platform: Platform, tmp_path: Path
) -> None:
    killed = replace(platform, namespace="lakesight_killed", tables=tmp_path)
    spark.sql(f"CREATE SCHEMA lakesight_killed LOCATION '{tmp_path}'")
    log = tmp_path / "samples" / "_delta_log"
    (log / "_staged_commits").mkdir(parents=True)
    (log / f".{0:020}.json.b95e3025.tmp").touch()
    os.utime(log, (0, 0))
    ensure_table(spark, killed, SAMPLES)
    assert spark.table("lakesight_killed.samples").columns == SAMPLES.names
