"""Tests that a version number alone never counts as "already done".

A table that is written anew, or restored from a copy and then changed, has the same version numbers, but different
rows.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pictures import as_base64, png, write_csv
from pyspark.sql import SparkSession
from tiny_runs import save_random_model

from pipelines.config import DataConfig
from pipelines.driver.caption.finished import find_finished as find_captioned
from pipelines.driver.caption.run import CaptionRequest, caption
from pipelines.driver.delta.tables import ensure_tables
from pipelines.driver.delta.versions import read_versions
from pipelines.driver.ingest.finished import find_finished as find_ingested
from pipelines.driver.ingest.report import Figures, page_path
from pipelines.driver.ingest.run import ingest
from pipelines.driver.ingest.totals import IngestReport
from pipelines.driver.model_files import ModelFiles
from pipelines.driver.shard.run import find_finished as find_sharded
from pipelines.driver.shard.run import shard
from pipelines.formats.run_folder import write_json
from pipelines.formats.shards import Shards
from pipelines.formats.table_schema import Table
from pipelines.formats.tables import QUARANTINE, SAMPLES
from pipelines.platform import Platform
from vlm.config import ImageConfig

SOURCE = "restored"
IMAGE = ImageConfig(size=16)


@pytest.fixture(scope="module")
def empty_home(spark: SparkSession, platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with all tables, without rows. Tests copy the folder, because creating tables takes seconds."""
    root = tmp_path_factory.mktemp("empty") / "home"
    ensure_tables(spark, replace(platform, namespace="empty", root=root, tables=root / "tables"))
    return root


@pytest.fixture
def home(platform: Platform, empty_home: Path, tmp_path: Path) -> Platform:
    """A platform with a home folder of its own, so that a test may replace its tables."""
    root = shutil.copytree(empty_home, tmp_path / "home")
    return replace(platform, namespace=f"n{tmp_path.name}", root=root, tables=root / "tables")


def forget_snapshots(spark: SparkSession) -> None:
    """Make Delta read all tables from the disk again, as a new process does."""
    spark._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()  # type: ignore[union-attr]


def run_ingest(spark: SparkSession, platform: Platform, source: str, config: DataConfig) -> IngestReport:
    """Run an ingest, and write an empty report page. If the page were missing, the check for a finished ingest would
    start Spark."""
    report = ingest(spark, platform, source, config)
    page = page_path(platform, report)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_json(page.with_suffix(".json"), Figures(formats={}, sides={}, texts={}, chars={}))
    page.write_text("<p>", encoding="utf-8")
    return report


def write_table(folder: Path, *shades: int) -> None:
    """Append a commit with one row for each shade. The rows of a table have the ids 1, 2 and so on."""
    first = DeltaTable(folder).to_pyarrow_table().num_rows if DeltaTable.is_deltatable(str(folder)) else 0
    rows = [{"id": first + n, "photo": png(shade), "text": f"shade {shade}"} for n, shade in enumerate(shades, 1)]
    schema = pa.schema([("id", pa.int64()), ("photo", pa.binary()), ("text", pa.string())])
    write_deltalake(folder, pa.Table.from_pylist(rows, schema), mode="append")


@pytest.mark.parametrize("change", [pytest.param("written anew", marks=pytest.mark.matrix), "restored"])
def test_a_table_whose_version_number_returns_with_other_pictures_is_captioned_again(
    spark: SparkSession, platform: Platform, tmp_path: Path, change: str
) -> None:
    save_random_model(tmp_path / "model")
    model = ModelFiles(folder=tmp_path / "model", name=f"m-{tmp_path.name}", version="1", run_id="r")
    table = tmp_path / "photos"
    request = CaptionRequest(source_table=f"delta.`{table}`", id_column="id", image_column="photo")

    write_table(table, 1, 2)
    shutil.copytree(table, tmp_path / "copy")
    if change == "restored":
        write_table(table, 3)
    captioned = caption(spark, platform, model, request).captioned
    assert captioned == (2 if change == "written anew" else 3)
    assert find_captioned(platform, model, request) is not None

    shutil.rmtree(table)
    if change == "written anew":
        write_table(table, 11, 12)
    else:
        shutil.copytree(tmp_path / "copy", table)
        write_table(table, 13)
    forget_snapshots(spark)
    assert find_captioned(platform, model, request) is None
    report = caption(spark, platform, model, request)
    assert (report.captioned, report.changed) == ((2, 2) if change == "written anew" else (1, 1))
    found = find_captioned(platform, model, request)
    assert found is not None
    assert found.already == captioned


@pytest.mark.matrix
def test_a_source_table_that_was_restored_and_changed_up_to_the_same_version_is_read_completely(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    table = tmp_path / "photos"
    columns = {"image": "photo", "text": "text", "id": "id"}
    config = DataConfig.model_validate(
        {"source": {"kind": "table", "path": str(table), "columns": columns}, "near_duplicates": False}
    )
    write_table(table, 21)
    shutil.copytree(table, tmp_path / "copy")
    write_table(table, 22, 23)
    assert run_ingest(spark, platform, source, config).new == 3
    assert find_ingested(platform, source, config) is not None

    shutil.rmtree(table)
    shutil.copytree(tmp_path / "copy", table)
    write_table(table, 24, 25)
    forget_snapshots(spark)
    assert find_ingested(platform, source, config) is None
    report = run_ingest(spark, platform, source, config)
    assert report.rows_in == 3
    rows = spark.table(platform.table(SAMPLES.name)).where(f"source = '{source}'").select("texts").collect()
    assert sorted(row["texts"][0]["text"] for row in rows) == ["shade 21", "shade 24", "shade 25"]
    assert find_ingested(platform, source, config) is not None


def make_folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    return data


def folder_config(data: Path, **settings: Any) -> DataConfig:
    """Return settings that ingest a folder of CSV files without a search for near duplicates."""
    return DataConfig.model_validate({"source": {"path": str(data)}, "near_duplicates": False} | settings)


def folder_of(home: Platform, table: Table) -> Path:
    assert home.tables
    return home.tables / table.name


def bring_back(spark: SparkSession, home: Platform, copy: Path, change: str, table: Table = SAMPLES) -> None:
    """Bring a table back to the state of a copy, in one of the ways in which users do this."""
    name, folder = home.table(table.name), folder_of(home, table)
    if change == "older copy":
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)
    elif change == "RESTORE":
        spark.sql(f"RESTORE TABLE {name} TO VERSION AS OF {DeltaTable(copy).version()}")
    elif change == "replace":
        spark.read.format("delta").load(str(copy)).write.format("delta").mode("overwrite").saveAsTable(name)
    elif change == "overwrite":
        spark.read.format("delta").load(str(copy)).write.format("delta").mode("overwrite").save(str(folder))
    else:
        spark.sql(f"DROP TABLE {name}")
        shutil.rmtree(folder)
    forget_snapshots(spark)


@pytest.mark.parametrize(
    "change",
    [
        "RESTORE",
        *(pytest.param(kind, marks=pytest.mark.matrix) for kind in ("older copy", "overwrite", "replace", "removed")),
    ],
)
def test_items_whose_rows_are_missing_after_a_restore_of_samples_are_read_again(
    spark: SparkSession, home: Platform, tmp_path: Path, change: str
) -> None:
    data = make_folder(tmp_path)
    config = folder_config(data, split={"kind": "hash", "val": 0.0, "test": 0.0})
    write_csv(data / "a.csv", [[as_base64(png(n)), f"a{n}"] for n in range(3)])
    run_ingest(spark, home, SOURCE, config)
    shutil.copytree(folder_of(home, SAMPLES), tmp_path / "copy")
    write_csv(data / "b.csv", [[as_base64(png(100 + n)), f"b{n}"] for n in range(4)])
    run_ingest(spark, home, SOURCE, config)
    assert find_ingested(home, SOURCE, config) is not None

    bring_back(spark, home, tmp_path / "copy", change)
    assert find_ingested(home, SOURCE, config) is None
    report = run_ingest(spark, home, SOURCE, config)
    assert report.new == (7 if change == "removed" else 4)
    assert report.items == (1 if change == "older copy" else 2), "files whose rows are in the copy are not read"
    assert report.splits == {"train": 7}
    assert find_ingested(home, SOURCE, config) is not None


@pytest.mark.matrix
@pytest.mark.parametrize("change", ["removed", "older copy", "RESTORE", "overwrite"])
def test_refused_rows_that_are_missing_after_a_restore_of_quarantine_come_back(
    spark: SparkSession, home: Platform, tmp_path: Path, change: str
) -> None:
    data = make_folder(tmp_path)
    config = folder_config(data, limits={"max_bad_share": 1.0})
    write_csv(data / "a.csv", [[as_base64(png(1)), "a"], [as_base64(b"no picture"), "bad a"]])
    run_ingest(spark, home, SOURCE, config)
    shutil.copytree(folder_of(home, QUARANTINE), tmp_path / "copy")
    write_csv(data / "b.csv", [[as_base64(png(2)), "b"], [as_base64(b"no picture"), "bad b"]])
    run_ingest(spark, home, SOURCE, config)
    write_csv(data / "c.csv", [[as_base64(png(3)), "c"]])
    run_ingest(spark, home, SOURCE, config)
    assert find_ingested(home, SOURCE, config) is not None

    bring_back(spark, home, tmp_path / "copy", change, QUARANTINE)
    assert find_ingested(home, SOURCE, config) is None
    report = run_ingest(spark, home, SOURCE, config)
    assert report.quarantined == (2 if change == "removed" else 1)
    assert report.items == (1 if change == "older copy" else 2), "files without lost rows are not read"
    assert (report.new, sum(report.splits.values())) == (0, 3)
    assert spark.table(home.table(QUARANTINE.name)).where(f"source = '{SOURCE}'").count() == 2
    assert find_ingested(home, SOURCE, config) is not None


@pytest.mark.matrix
def test_in_a_workspace_the_table_history_shows_that_samples_was_restored(
    spark: SparkSession, home: Platform, tmp_path: Path
) -> None:
    ensure_tables(spark, home)
    workspace = replace(home, tables=None)  # without a folder of tables, Spark reads every table and every history
    data = make_folder(tmp_path)
    config = folder_config(data)
    for name, shade in (("a.csv", 1), ("b.csv", 2)):
        write_csv(data / name, [[as_base64(png(shade)), name]])
        assert ingest(spark, workspace, SOURCE, config).new == 1

    samples = workspace.table(SAMPLES.name)
    spark.sql(f"RESTORE TABLE {samples} TO VERSION AS OF {read_versions(spark, workspace, SOURCE).newest - 1}")
    report = ingest(spark, workspace, SOURCE, config)
    assert (report.rows_in, report.new) == (2, 1)
    assert ingest(spark, workspace, SOURCE, config).rows_in == 0


@pytest.mark.matrix
def test_a_restored_samples_table_with_other_rows_at_the_same_version_gets_other_shards(
    spark: SparkSession, home: Platform, tmp_path: Path
) -> None:
    data = make_folder(tmp_path)
    config = folder_config(data, shards={"rows": 50}, split={"kind": "hash", "val": 0.0, "test": 0.0})
    write_csv(data / "a.csv", [[as_base64(png(1)), "a"]])
    run_ingest(spark, home, SOURCE, config)
    shutil.copytree(folder_of(home, SAMPLES), tmp_path / "copy")
    second = write_csv(data / "b.csv", [[as_base64(png(2)), "first"]])
    run_ingest(spark, home, SOURCE, config)
    before = shard(spark, home, SOURCE, config, IMAGE, "train")
    assert find_sharded(home, SOURCE, config, IMAGE, "train") is not None

    bring_back(spark, home, tmp_path / "copy", "older copy")
    second.unlink()
    write_csv(data / "c.csv", [[as_base64(png(3)), "second"]])
    run_ingest(spark, home, SOURCE, config)
    assert find_sharded(home, SOURCE, config, IMAGE, "train") is None
    after = shard(spark, home, SOURCE, config, IMAGE, "train")
    assert after.dataset_version == before.dataset_version, "the version numbers are equal"
    assert sorted(Shards.open(Path(after.folder)).texts()) == ["a", "second"]
