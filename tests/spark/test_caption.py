"""Tests of caption jobs on Delta tables: each row is captioned once, and a row with a bad picture stores the error."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from caption_requests import MAPPED, VECTORS, create, numbers, picture, request, stored, write
from crashing_decoder import CrashingLimits, crashing_picture, hanging_picture
from deltalake import DeltaTable
from pyspark.sql import SparkSession
from tiny_runs import save_random_model

from pipelines.config import LimitsConfig
from pipelines.driver.caption.finished import find_finished
from pipelines.driver.caption.run import TooManyErrors, caption
from pipelines.driver.evaluate.decisions import record_decision
from pipelines.driver.model_files import ModelFiles
from pipelines.errors import StageFailed, UserError
from pipelines.formats.champion_captions import TABLES, select
from pipelines.formats.delta_files import query
from pipelines.formats.tables import GENERATED_CAPTIONS
from pipelines.platform import Platform
from pipelines.review.source_pictures import read_pictures
from pipelines.worker.caption import load_captioner
from vlm.config import GenerationConfig


@pytest.fixture
def model(tmp_path: Path) -> ModelFiles:
    """Create a model with random weights and with a name that no other test uses."""
    save_random_model(tmp_path / "model")
    return ModelFiles(folder=tmp_path / "model", name=f"m-{tmp_path.name}", version="1", run_id="r")


def commits(spark: SparkSession, platform: Platform) -> int:
    history = spark.sql(f"DESCRIBE HISTORY {platform.table(GENERATED_CAPTIONS.name)}")
    return history.where(history.operation == "MERGE").count()


def test_each_row_gets_a_caption_with_its_lineage_or_the_error_of_its_picture(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    good = [(n, picture(n)) for n in range(70)]
    deadly = [(73, crashing_picture()), (74, hanging_picture()), (75, bytes(100_001))]
    bad = [(70, b"no picture"), (71, None), (72, picture(1)[:90]), *deadly]
    table = write(spark, tmp_path / "photos", [*good, *bad])
    limits = CrashingLimits(max_decode_seconds=1.5, max_bytes=100_000)
    report = caption(spark, platform, model, request(table, limits=limits))
    assert numbers(report) == (76, 0, 70, 6)
    assert report.settings_hash == "1dd86ab5a8514f8c", "captions that an earlier release stored must be found"
    rows = stored(spark, platform, model)
    assert len(rows) == 76
    assert [rows[str(n)]["error"].partition(":")[0] for n in range(70, 76)] == [
        "not_an_image",
        "missing_field",
        "truncated_image",
        "decoder_crash",
        "decode_timeout",
        "too_large",
    ]
    assert rows["73"]["error"].endswith("was ended by SIGSEGV")
    assert rows["74"]["error"] == "decode_timeout: more than 1.5 seconds"
    assert rows["74"]["sha256"] == hashlib.sha256(hanging_picture()).hexdigest()
    for row in rows.values():
        assert (row["caption"] is None) != (row["error"] is None)
        assert (row["source_table"], row["source_version"], row["run_id"]) == (table, 0, "r")
    captioner = load_captioner(str(model.folder))
    settings = captioner.model.config.generation
    for number, data in good[:5]:  # each caption equals the caption of the same picture in a batch of one
        (alone,) = captioner.caption([data], [""], **settings.model_dump())
        row = rows[str(number)]
        assert (row["caption"], row["sha256"], row["num_tokens"]) == (alone.caption, alone.sha256, alone.num_tokens)
        assert row["mean_logprob"] == pytest.approx(alone.mean_logprob, abs=1e-4)
    before = commits(spark, platform)
    again = caption(spark, platform, model, request(table))
    assert numbers(again) == (76, 76, 0, 0)
    found = find_finished(platform, model, request(table))
    assert found is not None
    assert found.model_copy(update={"seconds": again.seconds}) == again
    assert commits(spark, platform) == before  # the second job found no new rows and wrote nothing


def test_only_rows_without_a_caption_by_the_same_version_with_the_same_settings_are_captioned(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    table = write(spark, tmp_path / "photos", [(n, picture(n)) for n in range(4)])
    caption(spark, platform, model, request(table))
    write(spark, tmp_path / "photos", [(n, picture(n)) for n in range(4, 7)])
    assert numbers(caption(spark, platform, model, request(table, where="id < 6"))) == (6, 4, 2, 0)
    assert numbers(caption(spark, platform, model, request(table, source_version=0))) == (4, 4, 0, 0)
    assert numbers(caption(spark, platform, model, request(table, where="id = 0", prompt="what"))) == (1, 0, 1, 0)


@pytest.mark.matrix
def test_a_row_gets_a_separate_caption_for_each_decoding_setting_precision_and_version(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    table, one = write(spark, tmp_path / "photos", [(n, picture(n)) for n in range(2)]), "id = 0"
    caption(spark, platform, model, request(table))
    shorter = request(table, where=one, settings=GenerationConfig(max_new_tokens=3))
    assert numbers(caption(spark, platform, model, shorter)) == (1, 0, 1, 0)
    half = caption(spark, platform, model, request(table, where=one, precision="bf16"))
    assert numbers(half) == (1, 0, 1, 0)
    table_of_captions = spark.table(platform.table("generated_captions"))
    told = table_of_captions.where(table_of_captions.settings_hash == half.settings_hash).select("settings").distinct()
    assert [json.loads(row["settings"])["precision"] for row in told.collect()] == ["bf16"]
    second = model.model_copy(update={"version": "2", "remote": True})
    assert numbers(caption(spark, platform, second, request(table, where=one))) == (1, 0, 1, 0)
    copies = Path(tempfile.gettempdir()).glob(f"lakesight-models-{os.getuid()}/*/model.safetensors")
    assert (model.folder / "model.safetensors").read_bytes() in [copy.read_bytes() for copy in copies]


def test_rows_with_equal_ids_in_two_tables_of_base64_pictures_have_separate_captions(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    encoded = [(n, base64.b64encode(picture(n)).decode()) for n in range(3)]
    table = write(spark, tmp_path / "texts", [*encoded, (3, "%%%")], "id INT, photo STRING")
    assert numbers(caption(spark, platform, model, request(table))) == (4, 0, 3, 1)
    captioner = load_captioner(str(model.folder))
    (alone,) = captioner.caption([picture(2)], [""])
    assert stored(spark, platform, model)["2"]["caption"] == alone.caption
    other = write(spark, tmp_path / "bytes", [(2, picture(9))])
    assert numbers(caption(spark, platform, model, request(other))) == (1, 0, 1, 0)


def test_pictures_that_a_table_names_by_path_are_captioned_and_an_unreadable_picture_gets_an_error(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "2.png").write_bytes(picture(2))
    (tmp_path / "secret.png").write_bytes(picture(3))
    names = [(0, "2.png"), (1, f"file://{tmp_path}/in/2.png"), (2, "../secret.png"), (3, "9.png"), (4, None)]
    table = write(spark, tmp_path / "names", names, "id INT, photo STRING")
    report = caption(spark, platform, model, request(table, image_root=str(tmp_path / "in")))
    assert numbers(report) == (5, 0, 2, 3)
    rows = stored(spark, platform, model)
    captioner = load_captioner(str(model.folder))
    (alone,) = captioner.caption([picture(2)], [""])
    assert [rows[n]["caption"] for n in "01"] == [alone.caption] * 2
    assert [rows[n]["error"].partition(": ")[0] for n in "234"] == ["missing_field"] * 3
    assert "not inside the folder" in rows["2"]["error"]
    assert {rows["0"][name] for name in ("id_column", "image_column", "image_root")} == {
        "id",
        "photo",
        f"{tmp_path}/in",
    }
    with pytest.raises(UserError, match="no folder"):
        caption(spark, platform, model, request(table, image_root=str(tmp_path / "gone")))


def test_the_view_champion_captions_returns_the_same_rows_when_read_with_and_without_spark(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    assert platform.tables
    table = write(spark, tmp_path / "photos", [(n, picture(n)) for n in range(3)] + [(3, b"no picture")])
    caption(spark, platform, model, request(table))
    record_decision(
        lambda: spark, platform, model=model.name, version="1", digest=model.digest, action="promote", champion=None
    )
    view = spark.table(platform.table("champion_captions"))
    found = view.where(view.model_name == model.name).orderBy("image_id").toArrow()
    files = {name: DeltaTable(platform.tables / name) for name in TABLES}
    sql = f"SELECT * FROM ({select()}) AS v WHERE model_name = '{model.name}' ORDER BY image_id"
    assert found.to_pylist() == query(files, sql).read_all().to_pylist()
    assert found["image_id"].to_pylist() == ["0", "1", "2"]


def test_the_sampled_caption_of_a_picture_does_not_depend_on_other_pictures_in_the_batch(model: ModelFiles) -> None:
    captioner = load_captioner(str(model.folder))
    settings = GenerationConfig(max_new_tokens=8, temperature=1.5, seed=7)
    images = [picture(n) for n in range(6)]
    together = captioner.caption(images, ["", "a", "", "a", "", ""], **settings.model_dump())
    for image, prompt, result in zip(images, ["", "a", "", "a", "", ""], together, strict=True):
        assert captioner.caption([image], [prompt], **settings.model_dump())[0].caption == result.caption


def test_a_picture_is_captioned_again_after_a_change_but_not_after_a_move_to_another_data_file(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    table = write(spark, tmp_path / "photos", [(n, picture(n)) for n in range(4)])
    write(spark, tmp_path / "photos", [(4, b"no picture"), (5, picture(5))])
    assert numbers(caption(spark, platform, model, request(table))) == (6, 0, 5, 1)
    first = stored(spark, platform, model)

    new = spark.createDataFrame([(1, picture(9)), (4, picture(4))], "id INT, photo BINARY")
    spark.sql(
        f"MERGE INTO {table} t USING {{new}} s ON t.id = s.id WHEN MATCHED THEN UPDATE SET photo = s.photo", new=new
    )
    spark.sql(f"DELETE FROM {table} WHERE id = 5")
    report = caption(spark, platform, model, request(table, remove_deleted=True))
    assert numbers(report) == (5, 3, 2, 0)
    assert (report.changed, report.removed) == (2, 1)
    second = stored(spark, platform, model)
    assert set(second) == {"0", "1", "2", "3", "4"}
    assert second["1"]["sha256"] != first["1"]["sha256"]
    assert (second["4"]["error"], second["4"]["caption"] is None) == (None, False)
    assert {second[same]["captioned_at"] == first[same]["captioned_at"] for same in "023"} == {True}
    assert second["0"]["source_version"] == report.source_version  # the UPDATE moved this row to another data file
    assert second["2"]["source_version"] == first["2"]["source_version"]  # the UPDATE left this row in its data file

    before = commits(spark, platform)
    assert numbers(caption(spark, platform, model, request(table))) == (5, 5, 0, 0)
    assert commits(spark, platform) == before


@pytest.mark.matrix
def test_captions_are_made_again_if_a_column_name_stands_for_other_pictures_of_the_same_data_files(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    schema = "id INT, photo BINARY, other BINARY"
    table = create(spark, tmp_path / "photos", schema, MAPPED)
    write(spark, tmp_path / "photos", [(1, picture(1), picture(2)), (2, picture(3), picture(3))], schema)
    assert numbers(caption(spark, platform, model, request(table))) == (2, 0, 2, 0)
    for old, new in (("other", "x"), ("photo", "other"), ("x", "photo")):
        spark.sql(f"ALTER TABLE {table} RENAME COLUMN {old} TO {new}")
    renamed = caption(spark, platform, model, request(table))
    assert (numbers(renamed), renamed.changed) == ((2, 1, 1, 0), 1), "the second row has equal pictures in both columns"
    second = stored(spark, platform, model)["1"].asDict()
    assert read_pictures(platform, [second]) == {("1", second["sha256"]): picture(2)}, "without Spark"
    assert numbers(caption(spark, platform, model, request(table))) == (2, 2, 0, 0)


@pytest.mark.matrix
def test_captions_of_several_id_columns_and_picture_columns_of_a_table_are_kept_side_by_side(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    schema = "id INT, number INT, photo BINARY, other BINARY"
    pictures = [(1, 2, picture(1), picture(3)), (2, 1, picture(2), picture(2))]
    table = write(spark, tmp_path / "photos", pictures, schema)
    for identity, image in (("id", "photo"), ("id", "other"), ("number", "photo")):
        done = caption(spark, platform, model, request(table, id_column=identity, image_column=image))
        assert (numbers(done), done.changed) == ((2, 0, 2, 0), 0)
    captions = spark.table(platform.table(GENERATED_CAPTIONS.name)).where(f"model_name = '{model.name}'")
    found = [row.asDict() for row in captions.collect()]
    number = {hashlib.sha256(picture(n)).hexdigest(): n for n in (1, 2, 3)}
    assert sorted((row["id_column"], row["image_column"], row["image_id"], number[row["sha256"]]) for row in found) == [
        *[("id", "other", "1", 3), ("id", "other", "2", 2), ("id", "photo", "1", 1), ("id", "photo", "2", 2)],
        *[("number", "photo", "1", 2), ("number", "photo", "2", 1)],
    ]
    assert set(read_pictures(platform, found).values()) == {picture(n) for n in (1, 2, 3)}

    spark.sql(f"DELETE FROM {table} WHERE id = 2")
    again = caption(spark, platform, model, request(table, remove_deleted=True))
    assert (numbers(again), again.removed) == ((1, 1, 0, 0), 2), "captions with the id column `number` are kept"
    assert captions.count() == 4


@pytest.mark.matrix
def test_a_picture_that_a_restore_brings_back_into_a_file_with_a_deletion_vector_is_captioned_again(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    table = create(spark, tmp_path / "photos", "id INT, photo BINARY", VECTORS)
    new = spark.createDataFrame([(n, picture(n)) for n in range(6)], "id INT, photo BINARY")
    new.coalesce(1).write.format("delta").mode("append").save(str(tmp_path / "photos"))
    new = spark.createDataFrame([(1, picture(9))], "id INT, photo BINARY")
    spark.sql(f"MERGE INTO {table} t USING {{new}} s ON t.id = s.id WHEN MATCHED THEN UPDATE SET *", new=new)
    assert numbers(caption(spark, platform, model, request(table))) == (6, 0, 6, 0)
    spark.sql(f"RESTORE TABLE {table} TO VERSION AS OF 1")
    report = caption(spark, platform, model, request(table))
    assert (numbers(report), report.changed) == ((6, 5, 1, 0), 1)
    spark.sql(f"DELETE FROM {table} WHERE id = 2")
    rows = [row.asDict() for row in stored(spark, platform, model).values()]
    found = {image_id: data for (image_id, _), data in read_pictures(platform, rows).items()}
    assert found == {str(n): picture(n) for n in (0, 1, 3, 4, 5)}, "without Spark"


@pytest.mark.matrix
def test_binary_ids_that_are_no_texts_become_hexadecimal_digits(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    ids = (b"\xff\xfe", b"sku-1", b"a\x00b")
    table = write(spark, tmp_path / "photos", [(id_, picture(1)) for id_ in ids], "id BINARY, photo BINARY")
    assert numbers(caption(spark, platform, model, request(table))) == (3, 0, 3, 0)
    assert set(stored(spark, platform, model)) == {"fffe", "sku-1", "610062"}


def test_option_retry_errors_captions_rows_with_errors_again_and_too_many_errors_fail_the_job(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path
) -> None:
    table = write(spark, tmp_path / "photos", [(0, picture(0)), (1, picture(1)), (2, b"no picture")])
    small = request(table, max_error_share=0.5, limits=LimitsConfig(max_pixels=100))
    with pytest.raises(TooManyErrors, match=r"3 of 3 rows .100.0%, --max-error-share is 50.0%.*--retry-errors"):
        caption(spark, platform, model, small)
    assert [row["error"].partition(":")[0] for _, row in sorted(stored(spark, platform, model).items())] == [
        "too_large",
        "too_large",
        "not_an_image",
    ]
    assert numbers(caption(spark, platform, model, request(table))) == (3, 3, 0, 0)
    assert numbers(caption(spark, platform, model, request(table, retry_errors=True))) == (3, 0, 2, 1)
    assert {number for number, row in stored(spark, platform, model).items() if row["error"]} == {"2"}


@pytest.mark.matrix
def test_two_concurrent_caption_jobs_write_each_caption_only_once_after_a_cancelled_caption_job(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The job has 12 tasks, so the test can cancel the job after the first tasks have ended.
    monkeypatch.setattr("pipelines.driver.caption.run.ROWS_PER_FILE", 128)
    pictures = [picture(n) for n in range(8)]
    table = write(spark, tmp_path / "photos", [(n, pictures[n % 8]) for n in range(1300)])
    staged = platform.folder("staged")
    there = set(staged.glob("*/*.parquet"))
    with ThreadPoolExecutor(2) as threads:
        job = threads.submit(caption, spark, platform, model, request(table))
        while not (set(staged.glob("*/*.parquet")) - there or job.done()):
            time.sleep(0.02)
        spark.sparkContext.cancelAllJobs()
        with pytest.raises(StageFailed, match=r"could not be captioned.*cancelled"):
            job.result()
        assert not stored(spark, platform, model)
        both = [threads.submit(caption, s, platform, model, request(table)) for s in (spark, spark.newSession())]
        reports = [job.result() for job in both]
    rows = stored(spark, platform, model)
    assert len(rows) == 1300
    assert {rows[str(n)]["caption"] == rows[str(n % 8)]["caption"] for n in range(1300)} == {True}
    assert max(report.recovered for report in reports) > 0
    for report in reports:
        assert report.considered == report.already + report.captioned + report.errors == 1300


@pytest.fixture(scope="module")
def one_photo(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a Delta table with one row, which no other test captions, and return the name of the table."""
    return write(spark, tmp_path_factory.mktemp("tables") / "photos", [(1, picture(1))])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source_table": "photos; DROP TABLE x"}, "the name of the table to caption is not valid"),
        ({"source_table": "sampels"}, "did you mean 'lakesight.samples'"),
        ({"id_column": "di"}, "did you mean 'id'"),
        ({"image_column": "foto"}, "did you mean 'photo'"),
        ({"image_column": "id"}, "holds no pictures.*type int"),
        ({"where": "id <"}, "condition cannot be used"),
        ({"where": "size > 3"}, "condition cannot be used"),
        ({"source_version": 99}, "the newest is 0"),
        ({"prompt": "a very long question about it"}, "leaves no room"),
    ],
)
def test_an_invalid_caption_request_raises_a_user_error(
    spark: SparkSession,
    platform: Platform,
    model: ModelFiles,
    one_photo: str,
    wrong: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        caption(spark, platform, model, request(one_photo).model_copy(update=wrong))


@pytest.mark.parametrize("ids", [(1, 1), (1, None)])
def test_a_table_with_null_or_duplicate_ids_is_refused(
    spark: SparkSession, platform: Platform, model: ModelFiles, tmp_path: Path, ids: tuple[int | None, ...]
) -> None:
    table = write(spark, tmp_path / "photos", [(identity, picture(1)) for identity in ids])
    with pytest.raises(UserError, match="the ids of the rows to caption are not unique"):
        caption(spark, platform, model, request(table))
