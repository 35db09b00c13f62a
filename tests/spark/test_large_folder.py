"""Tests of the listing of a folder source: the driver holds no rows of a large captions file, and errors are short."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pictures import png, write_csv
from pyspark.sql import SparkSession

from pipelines.config import DataConfig
from pipelines.driver.ingest.run import ingest
from pipelines.driver.ingest.sources import folder
from pipelines.errors import StageFailed
from pipelines.platform import Platform


@contextmanager
def rows_on_the_driver(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Record the number of rows of each query that sends its rows to the driver, and of each table that the driver
    sends to Spark."""
    sizes: list[int] = []
    frame = type(spark.range(1))

    def record(owner: type, name: str, *, sent: bool) -> None:
        call = getattr(owner, name)

        def recorded(self: object, *args: object, **options: object) -> object:
            result = call(self, *args, **options)
            sizes.append(len(args[0] if sent else result))  # type: ignore[arg-type]
            return result

        patch.setattr(owner, name, recorded)

    with monkeypatch.context() as patch:
        record(frame, "collect", sent=False)
        record(frame, "toArrow", sent=False)
        record(type(spark), "createDataFrame", sent=True)
        yield sizes


def test_a_folder_of_pictures_that_executors_lack_fails_the_listing_with_a_short_message(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    (tmp_path / "drive").mkdir()
    write_csv(tmp_path / "captions.csv", [["0.png", "text"]], header=("file_name", "text"))
    settings = {"kind": "folder", "path": str(tmp_path / "drive"), "captions": "../captions.csv"}
    with pytest.raises(StageFailed, match=r"the input could not be opened.*FileNotFoundError.*empty or missing on"):
        ingest(spark, platform, source, DataConfig.model_validate({"source": settings}))


@pytest.mark.matrix  # six ingests
def test_the_driver_receives_as_many_rows_of_a_large_folder_of_few_pictures_as_of_many(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = []
    for count in (10, 160):
        path, name = tmp_path / str(count), f"{source}-{count}"
        path.mkdir()
        for number in range(count):
            (path / f"{number}.png").write_bytes(png(number % 7))
        for number in range(9):
            (path / f"unnamed {number}.png").write_bytes(b"no row refers to this file")
        rows = [[f"{number}.png", f"text {number}"] for number in range(count)]
        write_csv(path / "captions.csv", rows, header=("file_name", "text"))
        data = DataConfig.model_validate(
            {"source": {"kind": "folder", "path": str(path), "captions": "captions.csv"}, "near_duplicates": False}
        )
        small = ingest(spark, platform, f"{name}-small", data)
        with rows_on_the_driver(spark, monkeypatch) as sizes:
            monkeypatch.setattr(folder, "SMALL_CAPTIONS_BYTES", 0)
            large = ingest(spark, platform, name, data)
            monkeypatch.setattr(folder, "NAMED_FILES", 5)
            os.utime(path / "3.png", (1, 1))
            changed = ingest(spark, platform, name, data)
            monkeypatch.undo()
        differ = {"source", "ingest_id", "seconds", "dataset_version"}
        assert large.model_dump(exclude=differ) == small.model_dump(exclude=differ)
        assert (large.items, large.rows_in) == (count, count)
        assert (changed.items, changed.unchanged, changed.rows_in, changed.new) == (1, count - 1, 1, 0)
        assert changed.passed_over_count == {"not_named": 9}
        assert changed.passed_over == {"not_named": [f"unnamed {number}.png" for number in range(5)]}
        largest.append(max(sizes))
    assert largest[0] == largest[1]
