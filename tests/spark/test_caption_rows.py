"""Tests that a caption belongs to the present picture of its row, also with repeated ids and failing servers.

Other tests check the errors of earlier jobs and the view champion_captions.
"""

from __future__ import annotations

import hashlib
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from caption_requests import numbers, picture, request, stored, write
from picture_server import picture_server
from pyspark.sql import SparkSession
from tiny_runs import save_random_model

import pipelines.driver.caption.run as stage
from pipelines.driver.caption.finished import find_finished
from pipelines.driver.caption.pending_files import PendingFiles
from pipelines.driver.caption.run import TooManyErrors, caption
from pipelines.driver.delta.tables import VIEW_PROPERTY, ensure_champion_captions, table_properties
from pipelines.driver.model_files import ModelFiles
from pipelines.errors import StageFailed
from pipelines.executor.caption import PENDING_SCHEMA
from pipelines.formats.champion_captions import COLUMNS
from pipelines.platform import Platform

pytestmark = pytest.mark.matrix


@pytest.fixture
def model(tmp_path: Path) -> ModelFiles:
    """Create a model with random weights and with a name that no other test uses."""
    save_random_model(tmp_path / "model")
    return ModelFiles(folder=tmp_path / "model", name=f"m-{tmp_path.name}", version="1", run_id="r")


def digest(number: int) -> str:
    return hashlib.sha256(picture(number)).hexdigest()


def test_rows_with_the_same_id_that_a_condition_selects_in_turn_get_the_caption_of_their_own_picture(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The condition selects unique ids, but the table has a second row with one of the ids in the same data file."""
    schema = "id STRING, side STRING, photo BINARY"
    rows = [("A", "front", picture(1)), ("A", "back", picture(2)), ("B", "front", picture(3))]
    table = f"delta.`{tmp_path}/photos`"
    spark.createDataFrame(rows, schema).coalesce(1).write.format("delta").save(str(tmp_path / "photos"))
    assert numbers(caption(spark, platform, model, request(table, where="side = 'front'"))) == (2, 0, 2, 0)
    caplog.set_level(logging.WARNING)
    back = caption(spark, platform, model, request(table, where="side = 'back'"))
    assert (numbers(back), back.changed) == ((1, 0, 1, 0), 1)
    assert "1 of the rows to caption share their ids with further rows" in caplog.text
    assert {name: row["sha256"] for name, row in stored(spark, platform, model).items()} == {
        "A": digest(2),
        "B": digest(3),
    }
    again = caption(spark, platform, model, request(table, where="side = 'back'"))
    assert (numbers(again), again.changed) == ((1, 1, 0, 0), 0), "a picture that is read twice is captioned once"


def test_pending_captions_of_one_model_from_several_runs_are_merged_into_one_row(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    """In a copied registry, the same model files have another run id. Captions of Lakesight 0.1.0 have no digest."""
    key = {"source_table": "t", "model_name": model.name, "model_version": "1", "settings_hash": "s"}
    pending = PendingFiles(tmp_path / "pending", key, ("id", "photo"))
    pending.open()
    begun = datetime(2026, 1, 1, tzinfo=UTC)

    def write_pending(*rows: tuple[str, str | None]) -> None:
        for hour, (run, model_digest) in enumerate(rows):
            row: dict[str, object] = {
                "image_id": "1",
                "run_id": run,
                "model_digest": model_digest,
                "sha256": f"picture {hour}",
            }
            row |= {"caption": f"caption {hour}", "captioned_at": begun + timedelta(hours=hour), "unchanged": False}
            row |= key | {"prompt": "", "settings": "{}", "num_tokens": 1, "source_version": hour}
            pq.write_table(pa.Table.from_pylist([row], PENDING_SCHEMA), pending.folder / f"{hour}.parquet")

    write_pending(("first", "a digest"))
    assert pending.merge(spark, platform) == 1
    write_pending(("first", "a digest"), ("second", "a digest"), ("first", None))
    assert pending.merge(spark, platform) == 3
    assert [row["caption"] for row in stored(spark, platform, model).values()] == ["caption 2"]


def test_a_picture_that_a_server_cannot_send_now_keeps_its_caption_and_is_read_again_by_the_next_job(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    pictures = {"/a.png": picture(1), "/b.png": picture(2)}
    schema, rows = "id INT, photo STRING", [(1, "a.png"), (2, "b.png"), (3, "never.png")]
    with picture_server(pictures) as root:
        table = write(spark, tmp_path / "photos", rows, schema)
        assert numbers(caption(spark, platform, model, request(table, image_root=root))) == (3, 0, 2, 1)
        before = stored(spark, platform, model)
        # Another program writes the table again, so the next caption job reads all pictures again.
        spark.createDataFrame(rows, schema).write.format("delta").mode("overwrite").save(str(tmp_path / "photos"))
        kept = pictures.pop("/b.png")
        failed = caption(spark, platform, model, request(table, image_root=root))
        assert (numbers(failed), failed.changed) == ((3, 2, 0, 1), 0), "never.png counts only once"
        after = stored(spark, platform, model)
        assert [after[name]["caption"] for name in "123"] == [before[name]["caption"] for name in "123"]
        assert after["2"]["read_at"] == before["2"]["read_at"] < after["1"]["read_at"]
        assert after["3"]["error"].startswith("unreadable_file")
        strict = request(table, image_root=root, max_error_share=0)
        assert numbers(caption(spark, platform, model, strict)) == (3, 3, 0, 0), "b.png counts only once, too"
        pictures["/b.png"] = kept
        done = caption(spark, platform, model, request(table, image_root=root))
        assert (done.captioned, done.changed) == (0, 0)
        assert stored(spark, platform, model)["2"]["read_at"] > after["2"]["read_at"]


def test_a_job_fails_again_if_it_cannot_read_pictures_of_captioned_rows_until_the_errors_are_accepted(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    pictures, schema, rows = (
        {"/a.png": picture(1), "/b.png": picture(2)},
        "id INT, photo STRING",
        [(1, "a.png"), (2, "b.png")],
    )
    with picture_server(pictures) as root:
        table = write(spark, tmp_path / "photos", rows, schema)
        strict = request(table, image_root=root, max_error_share=0.1)
        assert numbers(caption(spark, platform, model, strict)) == (2, 0, 2, 0)
        spark.createDataFrame(rows, schema).write.format("delta").mode("overwrite").save(str(tmp_path / "photos"))
        pictures.clear()
        with pytest.raises(TooManyErrors, match="2 of 2 rows"):
            caption(spark, platform, model, strict)
        with pytest.raises(TooManyErrors, match=r"2 of 2 rows .*; 2 of 2 in earlier jobs that failed"):
            caption(spark, platform, model, strict)
        assert numbers(caption(spark, platform, model, request(table, image_root=root))) == (2, 2, 0, 0)
        assert numbers(caption(spark, platform, model, strict)) == (2, 2, 0, 0)
        assert {row["error"] for row in stored(spark, platform, model).values()} == {None}


def test_a_new_picture_that_could_not_be_read_is_read_by_each_job_until_it_has_a_caption(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    pictures = {"/a.png": picture(1), "/b.png": picture(2)}
    rows = [(1, "a.png"), (2, "b.png"), (3, "late.png")]
    table = write(spark, tmp_path / "photos", rows, "id INT, photo STRING")
    with picture_server(pictures) as root:
        strict = request(table, image_root=root, max_error_share=0.5)
        assert numbers(caption(spark, platform, model, strict)) == (3, 0, 2, 1)
        assert find_finished(platform, model, strict) is None
        assert numbers(caption(spark, platform, model, strict)) == (3, 3, 0, 0), "the accepted error counts only once"
        pictures["/late.png"] = picture(3)
        assert numbers(caption(spark, platform, model, strict)) == (3, 2, 1, 0)
        assert stored(spark, platform, model)["3"]["caption"] is not None
        assert find_finished(platform, model, strict) is not None


def test_rows_that_had_no_picture_before_are_not_errors_of_a_job_whose_table_was_written_again(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    def rewrite(rows: list[tuple[int, bytes | None]]) -> None:
        new = spark.createDataFrame(rows, "id INT, photo BINARY")
        new.write.format("delta").mode("overwrite").save(str(tmp_path / "photos"))

    rows: list[tuple[int, bytes | None]] = [(n, picture(n)) for n in range(9)]
    strict = request(f"delta.`{tmp_path}/photos`", max_error_share=0.1)
    rewrite([*rows, (9, None)])
    assert numbers(caption(spark, platform, model, strict)) == (10, 0, 9, 1)
    rewrite([*rows, (9, None)])
    assert numbers(caption(spark, platform, model, strict)) == (10, 10, 0, 0)
    found = find_finished(platform, model, strict)
    assert found is not None
    assert found.already == 10, "the rows are known to be in the new data files"
    rewrite([*rows, (9, picture(9))])
    assert numbers(caption(spark, platform, model, strict)) == (10, 9, 1, 0)
    rewrite([*rows[1:], (0, None), (9, picture(9))])
    with pytest.raises(TooManyErrors, match="1 of 1 rows"):
        caption(spark, platform, model, strict)


def test_a_repeated_job_fails_again_until_the_pictures_are_repaired_or_the_errors_are_accepted(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    table = write(spark, tmp_path / "photos", [(0, picture(0)), *((n, b"no picture") for n in (1, 2, 3))])
    strict = request(table, max_error_share=0.5)
    with pytest.raises(TooManyErrors, match=r"3 of 4 rows \(75.0%, --max-error-share is 50.0%\)"):
        caption(spark, platform, model, strict)
    assert find_finished(platform, model, strict) is None
    write(spark, tmp_path / "photos", [(4, picture(4))])
    with pytest.raises(TooManyErrors, match=r"3 of 5 rows .*; 3 of 4 in earlier jobs that failed") as repeated:
        caption(spark, platform, model, strict)
    assert numbers(repeated.value.report) == (5, 4, 1, 0)
    assert numbers(caption(spark, platform, model, request(table, max_error_share=0.5, where="id > 3")))[1:] == (
        1,
        0,
        0,
    )
    with pytest.raises(TooManyErrors, match="3 of 5 rows"):
        caption(spark, platform, model, strict)

    repaired = spark.createDataFrame([(1, picture(1)), (2, picture(2))], "id INT, photo BINARY")
    merge = f"MERGE INTO {table} t USING {{new}} s ON t.id = s.id WHEN MATCHED THEN UPDATE SET photo = s.photo"
    spark.sql(merge, new=repaired)
    report = caption(spark, platform, model, strict)
    assert (numbers(report), report.failed_rows, report.failed_errors) == ((5, 3, 2, 0), 3, 1)
    write(spark, tmp_path / "photos", [(5, b"no picture"), (6, b"no picture")])
    with pytest.raises(TooManyErrors, match="2 of 2 rows"):  # rows of jobs before the last success do not count
        caption(spark, platform, model, strict)
    assert numbers(caption(spark, platform, model, request(table, max_error_share=1))) == (7, 7, 0, 0)
    accepted = caption(spark, platform, model, strict)
    assert (accepted.failed_rows, accepted.failed_errors) == (0, 0)
    assert find_finished(platform, model, strict) is not None


def test_the_captions_of_an_empty_table_are_not_removed(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    table = write(spark, tmp_path / "photos", [(1, picture(1)), (2, picture(2))])
    assert numbers(caption(spark, platform, model, request(table))) == (2, 0, 2, 0)
    spark.sql(f"TRUNCATE TABLE {table}")
    with pytest.raises(StageFailed, match="the table to caption is empty, so no caption is removed"):
        caption(spark, platform, model, request(table, remove_deleted=True))
    assert len(stored(spark, platform, model)) == 2


def test_the_errors_of_a_killed_job_count_in_the_job_that_recovers_its_captions(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write(spark, tmp_path / "photos", [(0, picture(0)), *((n, b"no picture") for n in (1, 2, 3))])
    run_executors = stage._run_executors

    def die_after_captioning(*arguments: Any) -> None:
        run_executors(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "_run_executors", die_after_captioning)
    with pytest.raises(KeyboardInterrupt):
        caption(spark, platform, model, request(table))
    monkeypatch.undo()
    with pytest.raises(TooManyErrors, match=r"3 of 4 rows .*; 3 of 4 in earlier jobs") as repeated:
        caption(spark, platform, model, request(table, max_error_share=0.5))
    assert repeated.value.report.recovered == 4


def test_the_select_statement_of_a_view_that_another_release_created_is_replaced(
    spark: SparkSession, platform: Platform
) -> None:
    name = platform.table("champion_captions")
    ensure_champion_captions(spark, platform)
    stamp = table_properties(spark, name)[VIEW_PROPERTY]
    spark.sql(f"ALTER VIEW {name} AS SELECT 'an older release' AS caption")
    spark.sql(f"ALTER VIEW {name} SET TBLPROPERTIES ('{VIEW_PROPERTY}' = 'older')")
    ensure_champion_captions(spark, platform)
    assert spark.table(name).columns == list(COLUMNS)
    assert table_properties(spark, name)[VIEW_PROPERTY] == stamp
