"""On Spark, each generation setting has the same effect on captions as in `vlm`, in caption jobs and in evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from generation_cases import CASES, PICTURES, CaptionedPictures
from pyspark.sql import SparkSession

from pipelines.driver.caption.run import CaptionRequest, caption
from pipelines.driver.evaluate.run import evaluate
from pipelines.driver.model_files import ModelFiles
from pipelines.formats.shards import write_manifest
from pipelines.formats.tables import GENERATED_CAPTIONS
from pipelines.platform import Platform
from vlm.config import GenerationConfig

pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> CaptionedPictures:
    return CaptionedPictures(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def model(world: CaptionedPictures) -> ModelFiles:
    return ModelFiles(folder=world.folder / "checkpoint", name="settings-on-spark", version="1", run_id="r")


@pytest.fixture(scope="module")
def table(spark: SparkSession, world: CaptionedPictures) -> str:
    rows = [(index, file.read_bytes()) for index, file in enumerate(world.files)]
    folder = world.folder / "photos"
    spark.createDataFrame(rows, "id INT, photo BINARY").write.format("delta").save(str(folder))
    return f"delta.`{folder}`"


@pytest.fixture(scope="module")
def shards(spark: SparkSession, world: CaptionedPictures) -> Path:
    """Write a Delta table with the pictures of the shards, and put its name into the manifest of the shards."""
    folder = world.folder / "samples"
    ids = [world.shards.row(index).image_id for index in range(PICTURES)]
    rows = [(image_id, "photos", file.read_bytes()) for image_id, file in zip(ids, world.files, strict=True)]
    schema = "image_id STRING, source STRING, image BINARY"
    frame = spark.createDataFrame(rows, schema).selectExpr("*", "'PNG' AS format", "16 AS width", "16 AS height")
    frame.write.format("delta").save(str(folder))
    request = world.shards.manifest.request.model_copy(
        update={"table": f"delta.`{folder}`", "source": "photos", "split": "test"}
    )
    write_manifest(world.shards.folder, world.shards.manifest.model_copy(update={"request": request}))
    return world.shards.folder


def settings_of(world: CaptionedPictures, name: str) -> tuple[GenerationConfig, list[str | None]]:
    """Return settings with the case of one setting (see `CASES`), and the captions of `vlm` with these settings."""
    needed, value = CASES[name]
    changes: dict[str, Any] = needed | {name: value}
    expected, before = world.expected(changes), world.expected(needed)
    assert expected != before
    return world.captioner.settings(**changes), expected


@pytest.mark.parametrize("name", CASES)
def test_a_caption_job_follows_the_generation_setting(
    name: str, spark: SparkSession, platform: Platform, world: CaptionedPictures, model: ModelFiles, table: str
) -> None:
    chosen, expected = settings_of(world, name)
    request = CaptionRequest.model_validate(
        {"source_table": table, "id_column": "id", "image_column": "photo", "settings": chosen}
    )
    report = caption(spark, platform, model, request)
    assert (report.considered, report.captioned, report.errors) == (PICTURES, PICTURES, 0)
    stored = spark.table(platform.table(GENERATED_CAPTIONS.name))
    rows = stored.where((stored.model_name == model.name) & (stored.settings_hash == report.settings_hash)).collect()
    captions = {row["image_id"]: row["caption"] for row in rows}
    assert [captions[str(index)] for index in range(PICTURES)] == expected


@pytest.mark.parametrize("name", CASES)
def test_an_evaluation_follows_the_generation_setting(
    name: str, spark: SparkSession, platform: Platform, world: CaptionedPictures, model: ModelFiles, shards: Path
) -> None:
    chosen, expected = settings_of(world, name)
    report = evaluate(spark, platform, model.model_copy(update={"settings": chosen}), shards, shards)
    assert report.settings == chosen
    ids = [world.shards.row(index).image_id for index in range(PICTURES)]
    captions = {row.image_id: row.caption for row in report.scores()}
    assert [captions[image_id] for image_id in ids] == expected
