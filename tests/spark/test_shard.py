"""Tests that shards contain all rows of a split of a Delta table, and do not depend on the table's partitioning."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import IMAGE as IMAGE_COLUMN
from pictures import TEXT as TEXT_COLUMN
from pictures import as_base64, encoded, picture, png, write_csv
from pyspark.sql import SparkSession

from pipelines.config import DataConfig
from pipelines.driver.delta.settings import spark_settings
from pipelines.driver.delta.versions import commit_note, source_note
from pipelines.driver.ingest.run import ingest
from pipelines.driver.shard.run import ShardReport, find_finished, shard
from pipelines.errors import StageFailed, UserError
from pipelines.formats.shards import MANIFEST, Shards
from pipelines.formats.tables import SAMPLES
from pipelines.platform import Platform
from vlm.config import ImageConfig
from vlm.image import to_pixels

IMAGE = ImageConfig(size=16)
LARGE = ImageConfig(size=96)
"""Image config with a size at which the pixels of a picture have more bytes than the encoded picture."""
COUNT = 150
SPLITS = ("train", "train", "val", "test")


def config(path: Path, **shards: Any) -> DataConfig:
    split = {"kind": "hash", "val": 0.2, "test": 0.0}
    usual = {"source": {"path": str(path)}, "split": split, "near_duplicates": False}
    return DataConfig.model_validate(usual | {"shards": {"rows": 50} | shards})


@pytest.fixture(scope="module")
def filled(spark: SparkSession, platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Ingest a source with COUNT pictures. Return the name and the file of the source."""
    rows = [[as_base64(png(1000 + n)), f"picture {n}"] for n in range(COUNT)]
    path = write_csv(tmp_path_factory.mktemp("filled") / "a.csv", rows)
    ingest(spark, platform, "test-filled", config(path))
    return "test-filled", path


def reorder(spark: SparkSession, platform: Platform, source: str) -> None:
    """Rewrite the rows of a source in a different order, in a commit that contains the name of a different source."""
    table = platform.table(SAMPLES.name)
    rows = spark.table(table).where(f"source = '{source}'").repartition(3, "sha256").sortWithinPartitions("sha256")
    with commit_note(spark, source_note("test-another")):
        rows.write.format("delta").mode("overwrite").option("replaceWhere", f"source = '{source}'").saveAsTable(table)


def remove(report: ShardReport) -> None:
    for path in Path(report.folder).iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(IMAGE, id="shuffled pixels"),
        pytest.param(LARGE, id="shuffled pictures", marks=pytest.mark.matrix),
    ],
)
def test_shards_contain_every_row_of_the_split_once_with_its_resized_picture(
    spark: SparkSession, platform: Platform, filled: tuple[str, Path], image: ImageConfig
) -> None:
    source, path = filled
    reports = {split: shard(spark, platform, source, config(path), image, split) for split in ("train", "val")}
    original = {f"picture {n}": to_pixels(picture(1000 + n), image) for n in range(COUNT)}
    seen = []
    for split, report in reports.items():
        shards = Shards.open(Path(report.folder))
        assert report.num_rows == len(shards)
        assert report.split == split
        assert [file.rows for file in shards.manifest.files[:-1]] == [50] * (len(shards.manifest.files) - 1)
        for row in map(shards.row, range(len(shards))):
            [(prompt, text)] = row.texts
            assert np.array_equal(row.pixels, original[text])
            assert prompt == ""
            seen.append(text)
    assert sorted(seen) == sorted(original)
    assert seen != sorted(seen, key=lambda text: int(text.split()[1])), "rows are shuffled"


def test_a_repeated_shard_request_finds_the_shard_folder_and_writes_nothing(
    spark: SparkSession, platform: Platform, filled: tuple[str, Path], tmp_path: Path
) -> None:
    source, path = filled
    first = shard(spark, platform, source, config(path, seed=1), IMAGE, "train")
    changed = {file.name: file.stat().st_mtime_ns for file in Path(first.folder).iterdir()}
    other = write_csv(tmp_path / "other.csv", [[as_base64(png(2000)), "another source"]])
    ingest(spark, platform, "test-filled-other", config(other))
    ingest(spark, platform, source, config(path))
    again = shard(spark, platform, source, config(path, seed=1), IMAGE, "train")
    assert (first.reused, again.reused) == (False, True)
    found = find_finished(platform, source, config(path, seed=1), IMAGE, "train")
    assert found is not None
    assert found.model_dump(exclude={"seconds"}) == again.model_dump(exclude={"seconds"})
    assert find_finished(platform, source, config(path, seed=99), IMAGE, "train") is None
    assert again.folder == first.folder
    assert again.content_hash == first.content_hash
    assert {file.name: file.stat().st_mtime_ns for file in Path(again.folder).iterdir()} == changed


def test_the_content_of_shards_does_not_depend_on_row_order_or_partitioning(
    spark: SparkSession, platform: Platform, filled: tuple[str, Path]
) -> None:
    source, path = filled
    data = config(path, seed=2)
    first = shard(spark, platform, source, data, IMAGE, "train")
    remove(first)
    reorder(spark, platform, source)
    with spark_settings(spark, {"spark.sql.shuffle.partitions": "7", "spark.sql.files.maxPartitionBytes": "20000"}):
        second = shard(spark, platform, source, data, IMAGE, "train")
    assert (second.reused, second.folder, second.content_hash) == (False, first.folder, first.content_hash)
    reseeded = shard(spark, platform, source, config(path, seed=3), IMAGE, "train")
    assert reseeded.content_hash != first.content_hash


def test_shuffling_encoded_pictures_writes_the_same_files_as_shuffling_decoded_pixels(
    spark: SparkSession, platform: Platform, filled: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = filled
    first = shard(spark, platform, source, config(path, seed=5), LARGE, "train")
    remove(first)
    monkeypatch.setattr("pipelines.driver.shard.write.SAMPLED_ROWS", 0)  # with 0, Spark shuffles decoded pixels
    second = shard(spark, platform, source, config(path, seed=5), LARGE, "train")
    assert (second.reused, second.folder, second.content_hash) == (False, first.folder, first.content_hash)


def test_a_shard_folder_that_a_crash_left_incomplete_is_emptied_and_written_again(
    spark: SparkSession, platform: Platform, filled: tuple[str, Path]
) -> None:
    source, path = filled
    data = config(path, seed=4)
    first = shard(spark, platform, source, data, IMAGE, "val")
    folder = Path(first.folder)
    (folder / MANIFEST).unlink()
    (folder / "shard-000000.arrow").write_bytes(b"half a file")
    old, fresh = folder / ".shard-000007.arrow.x.tmp", folder / ".shard-000008.arrow.y.tmp"
    for leftover in (old, fresh):
        leftover.write_bytes(b"half a file")
    os.utime(old, (time.time() - 7200,) * 2)
    second = shard(spark, platform, source, data, IMAGE, "val")
    assert (second.reused, second.content_hash) == (False, first.content_hash)
    assert not old.exists()
    assert fresh.exists(), "another process may be writing the recent file"


def test_new_rows_are_written_to_a_new_shard_folder_and_the_old_shard_folder_is_kept(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    rows = [[as_base64(png(3000 + n)), f"picture {n}"] for n in range(12)]
    path = write_csv(tmp_path / "a.csv", rows[:8])
    ingest(spark, platform, source, config(path))
    first = shard(spark, platform, source, config(path), IMAGE, "train")
    write_csv(path, rows)
    report = ingest(spark, platform, source, config(path))
    second = shard(spark, platform, source, config(path), IMAGE, "train")
    assert second.folder != first.folder
    assert second.dataset_version == report.dataset_version > first.dataset_version
    assert len(Shards.open(Path(first.folder))) == first.num_rows < second.num_rows


def test_shards_with_jpeg_pictures_are_smaller_than_raw_shards_and_have_nearly_the_same_pixels(
    spark: SparkSession, platform: Platform, filled: tuple[str, Path]
) -> None:
    source, path = filled
    size = ImageConfig(size=64)
    raw, jpeg = (
        Shards.open(Path(shard(spark, platform, source, config(path, encoding=encoding), size, "val").folder))
        for encoding in ("raw", "jpeg")
    )
    assert sum(file.bytes for file in jpeg.manifest.files) < sum(file.bytes for file in raw.manifest.files) / 2
    for index in range(len(raw)):
        assert jpeg.row(index).image_id == raw.row(index).image_id
        assert np.abs(jpeg.row(index).pixels.astype(int) - raw.row(index).pixels).mean() < 8


def test_shards_contain_only_rows_that_meet_the_condition_and_a_mix_adds_rows_of_a_second_source(
    spark: SparkSession, platform: Platform, source: str, filled: tuple[str, Path], tmp_path: Path
) -> None:
    photos = [[as_base64(encoded(picture(6000 + n, (90, 70)), "JPEG")), f"photo {n}"] for n in range(6)]
    path = write_csv(tmp_path / "a.csv", photos)
    everything = {"split": {"kind": "hash", "val": 0, "test": 0}, "validate_on": "val"}
    usual = config(path).model_dump() | everything
    ingest(spark, platform, source, DataConfig.model_validate(usual))
    chosen = {"where": "width = 90 OR int(substring(texts[0].text, 9)) < 100", "draft": True}
    data = DataConfig.model_validate(usual | {"shards": chosen, "mix": {filled[0]: 0.25}})
    first, again = (shard(spark, platform, source, data, IMAGE, "train") for _ in range(2))
    assert (first.reused, again.reused, again.folder) == (False, True, first.folder)

    shards = Shards.open(Path(first.folder))
    own, other = shards.manifest.parts
    assert (own.source, own.rows, other.source) == (source, 6, filled[0])
    assert other.draws == round((own.rows + other.rows) / 4) == own.rows + other.rows - own.draws
    rows = [shards.row(index) for index in range(len(shards))]
    said = [row.texts[0][1] for row in rows]
    assert sorted(said[:6]) == [f"photo {n}" for n in range(6)]
    assert 50 < len(said[6:]) < 100
    assert all(int(text.split()[1]) < 100 for text in said[6:])
    for row, text in zip(rows, said, strict=True):
        number = int(text.split()[1])
        whole = to_pixels(picture(6000 + number, (90, 70)) if "photo" in text else picture(1000 + number), IMAGE)
        difference = np.abs(row.pixels.astype(int) - whole)
        assert (difference.max() > 0, difference.mean() < 8) == ("photo" in text, True)

    wrong = DataConfig.model_validate(usual | {"shards": {"where": "widht > 3"}})
    with pytest.raises(UserError, match=r"data\.shards\.where.*widht"):
        shard(spark, platform, source, wrong, IMAGE, "train")


@pytest.mark.matrix  # two ingests
def test_a_mix_never_trains_on_a_near_copy_of_a_validation_picture_of_another_source(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    """In each source, one training picture is a copy (equal or re-encoded) of a validation picture of the other
    source."""

    def data(name: str, pictures: list[list[str]], **more: Any) -> DataConfig:
        rows = [[*row, split] for row, split in zip(pictures, SPLITS, strict=True)]
        path = write_csv(tmp_path / f"{name}.csv", rows, (IMAGE_COLUMN, TEXT_COLUMN, "split"))
        settings = {"source": {"path": str(path)}, "split": {"kind": "column", "column": "split"}}
        return DataConfig.model_validate(settings | more)

    def row(number: int, format_: str = "PNG") -> list[str]:
        return [as_base64(encoded(picture(number, (90, 70)), format_)), f"picture {number}"]

    other = f"{source}-other"
    ingest(spark, platform, other, data("other", [row(7001, "JPEG"), row(7002), row(7003), row(7004)]))
    config_ = data("own", [row(7003), row(7006), row(7001), row(7008, "JPEG")], mix={other: 0.5})
    ingest(spark, platform, source, config_)
    mixed, alone = (
        shard(spark, platform, source, each, IMAGE, "train")
        for each in (config_, config_.model_copy(update={"mix": {}}))
    )
    shards = Shards.open(Path(mixed.folder))
    said = [shards.row(index).texts[0][1] for index in range(len(shards))]
    assert sorted(said) == ["picture 7002", "picture 7006"]
    assert alone.num_rows == 2, "without a mix, no picture is left out"
    found = find_finished(platform, source, config_, IMAGE, "train")
    assert found
    assert (found.folder, found.num_rows) == (mixed.folder, 2), "the finished mix is found without Spark"


def test_sharding_an_empty_split_raises_an_error_that_names_the_splits_with_rows(
    spark: SparkSession, platform: Platform, filled: tuple[str, Path]
) -> None:
    source, path = filled
    with pytest.raises(UserError, match=r"the test split has no rows.* in train, .* in val"):
        shard(spark, platform, source, config(path), IMAGE, "test")
    with pytest.raises(UserError, match="no rows of this source at all"):
        shard(spark, platform, "test-never-ingested", config(path), IMAGE, "train")


@pytest.mark.parametrize(
    "rows", [pytest.param(50, id="shuffled pixels"), pytest.param(1, id="shuffled pictures", marks=pytest.mark.matrix)]
)
def test_the_shard_stage_fails_at_a_picture_that_cannot_be_decoded_and_the_error_names_the_picture(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path, rows: int
) -> None:
    path = write_csv(tmp_path / "a.csv", [[as_base64(png(4000 + n)), f"{n}"] for n in range(4)])
    ingest(spark, platform, source, config(path))
    spark.sql(f"UPDATE {platform.table(SAMPLES.name)} SET image = X'00' WHERE source = '{source}'").collect()
    with pytest.raises(StageFailed, match=f"a picture in table samples cannot be decoded.*{source}/") as caught:
        shard(spark, platform, source, config(path, rows=rows), IMAGE, "train")
    assert "\n" not in str(caught.value)
