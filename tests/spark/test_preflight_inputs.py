"""Tests of the checks of the preflight that use Spark: writing to the tables, and the input of later tasks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from jobs.preflight import Inputs, check_captioned_table, check_source, check_tables
from pipelines.config import DataConfig, RunConfig, load_run
from pipelines.driver.delta.versions import newest_version
from pipelines.formats.tables import TABLES
from pipelines.platform import Platform


def newest_versions(spark: SparkSession, platform: Platform) -> list[int]:
    names = [platform.table(table.name) for table in TABLES]
    return [newest_version(spark, name, platform.table_location(name)) for name in names]


def test_the_check_of_the_tables_makes_no_new_version_of_a_table(spark: SparkSession, platform: Platform) -> None:
    before = newest_versions(spark, platform)
    assert check_tables(platform).status == "ok"
    assert newest_versions(spark, platform) == before


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        (Inputs(table="samples"), ""),
        (Inputs(table="no_such_table"), "cannot be read as a Delta table"),
        (Inputs(table="samples", image_column="photo"), "has no column 'photo'"),
        (Inputs(table="samples", id_column="sku"), "has no column 'sku'"),
        (Inputs(table="samples", where="no_such_column > 1"), "no_such_column"),
    ],
)
def test_the_preflight_names_what_is_wrong_with_the_table_of_a_caption_job(
    spark: SparkSession, platform: Platform, inputs: Inputs, found: str
) -> None:
    check = check_captioned_table(platform, inputs)
    assert check.status == ("fail" if found else "ok"), check
    assert found in check.found


def test_the_preflight_warns_if_the_picture_column_has_paths(
    spark: SparkSession, platform: Platform, tmp_path: Path
) -> None:
    rows = spark.createDataFrame([(1, "shop/1.jpg"), (2, None)], "id INT, photo STRING")
    rows.write.format("delta").save(str(tmp_path / "photos"))
    table = f"delta.`{tmp_path / 'photos'}`"
    check = check_captioned_table(platform, Inputs(table=table, id_column="id", image_column="photo"))
    assert (check.status, "shop/1.jpg" in check.found, "--image-root" in check.fix) == ("warn", True, True)
    given = Inputs(table=table, id_column="id", image_column="photo", image_root=str(tmp_path))
    assert check_captioned_table(platform, given).status == "ok"
    binary = Inputs(table="samples", image_root=str(tmp_path))
    assert "a string column of paths or URIs" in check_captioned_table(platform, binary).fix


def test_the_preflight_of_a_caption_job_neither_runs_the_condition_nor_needs_the_files_of_the_table(
    spark: SparkSession, platform: Platform, tmp_path: Path
) -> None:
    """A condition that fails at run time is the business of the caption task, which would read all rows."""
    rows = spark.createDataFrame([(1, "iVBORw0KGgo=" * 100_000)], "id INT, photo STRING")
    rows.coalesce(1).write.format("delta").save(str(tmp_path / "photos"))
    table = f"delta.`{tmp_path / 'photos'}`"
    failing = Inputs(table=table, id_column="id", image_column="photo", where="raise_error('read') IS NULL")
    assert check_captioned_table(platform, failing).status == "ok"
    (data,) = (tmp_path / "photos").glob("*.parquet")
    data.unlink()
    check = check_captioned_table(platform, failing)
    assert (check.status, "the first rows cannot be read" in check.found) == ("warn", True)


def config_of(*settings: str) -> RunConfig:
    return load_run("demo", overrides=[f"data.source.{setting}" for setting in settings])


def test_the_preflight_names_what_is_wrong_with_the_source_of_an_ingest(
    spark: SparkSession, platform: Platform, tmp_path: Path
) -> None:
    (tmp_path / "pictures.csv").write_text("b64string_images,caption\n")
    for path in (tmp_path, tmp_path / "pictures.csv", tmp_path / "*.csv", "scenes:100"):
        assert check_source(config_of(f"path={path}"), platform).status == "ok", path
    for path in ("absent", "absent/*.csv"):
        check = check_source(config_of(f"path={tmp_path / path}"), platform)
        assert (check.status, path in check.found) == ("fail", True), check
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o000)
    if not os.access(closed, os.R_OK):
        assert "Permission denied" in check_source(config_of(f"path={closed}"), platform).found


def test_the_preflight_checks_the_columns_of_a_table_that_is_ingested(spark: SparkSession, platform: Platform) -> None:
    assert platform.tables is not None
    for image, status in (("image", "ok"), ("photo", "fail")):
        columns = {"image": image, "text": "texts"}
        source = {"kind": "table", "path": str(platform.tables / "samples"), "columns": columns}
        data = DataConfig.model_validate({"source": source})
        check = check_source(config_of().model_copy(update={"data": data}), platform)
        assert (check.status, "no column photo" in check.found) == (status, status == "fail"), check
