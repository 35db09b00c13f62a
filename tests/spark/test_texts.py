"""Tests of plain text with Spark and Delta: each row is counted and stored once, and shards hold each text once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from pipelines.config import DataConfig
from pipelines.driver.ingest.finished import find_finished
from pipelines.driver.ingest.replay import replay
from pipelines.driver.ingest.run import ingest
from pipelines.driver.ingest.texts.report import write_text_report
from pipelines.driver.ingest.totals import IngestReport
from pipelines.driver.shard.run import find_finished as find_finished_shards
from pipelines.driver.shard.run import shard_texts
from pipelines.errors import UserError
from pipelines.formats.shards import Shards
from pipelines.platform import Platform


def config(path: Path, **changes: Any) -> DataConfig:
    return DataConfig.model_validate(
        {
            "source": {"kind": "text", "path": str(path), "rows": "paragraph"},
            "split": {"kind": "hash", "val": 0.3, "test": 0.0},
            "limits": {"max_text_chars": 40},
            "shards": {"rows": 8},
        }
        | changes
    )


def parts(report: IngestReport) -> tuple[int, int, int, int]:
    return report.rows_in, report.new, report.duplicates, report.quarantined


@pytest.mark.matrix  # a dozen commits
def test_plain_text_is_ingested_once_and_its_shards_hold_each_text_of_a_split_once(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    folder = tmp_path / "plays"
    folder.mkdir()
    speeches = [f"Speech {n}:\nto be or not" for n in range(30)]
    (folder / "one.txt").write_text("\n\n".join([*speeches[:20], "x" * 50]))
    (folder / "two.txt").write_text("\n\n".join([*speeches[20:], speeches[3]]))
    (folder / "notes.pdf").write_text("no text")
    data = config(folder)
    first = ingest(spark, platform, source, data)
    assert parts(first) == (32, 30, 1, 1)
    assert first.reasons == {"text_too_long": 1}
    assert first.passed_over == {"other_kind": ["notes.pdf"]}
    assert sum(first.splits.values()) == 30
    page = write_text_report(spark, platform, first)
    assert page.figures.chars == {"16-31": 30}
    assert "text_too_long" in Path(page.page).read_text()

    again = ingest(spark, platform, source, data)
    assert (parts(again), again.unchanged, again.dataset_version) == ((0, 0, 0, 0), 2, first.dataset_version)
    found = find_finished(platform, source, data)
    assert found
    compared = {"seconds": 0.0}
    assert found.model_copy(update=compared) == write_text_report(spark, platform, again).model_copy(update=compared)
    (folder / "one.txt").write_text("\n\n".join([*speeches[:20], "a new speech", "x" * 50]))
    changed = ingest(spark, platform, source, data)
    assert (parts(changed), changed.unchanged) == ((22, 1, 21, 0), 1)
    assert find_finished_shards(platform, source, data, None, "train") is None

    train = shard_texts(spark, platform, source, data, "train")
    held_out = shard_texts(spark, platform, source, data, "val")
    stored = [list(Shards.open(Path(report.folder)).texts()) for report in (train, held_out)]
    assert sorted([*stored[0], *stored[1]]) == sorted([*speeches, "a new speech"])
    assert [len(texts) for texts in stored] == [changed.splits["train"], changed.splits["val"]]
    assert stored[0] != sorted(stored[0]), "the shards are shuffled"
    assert shard_texts(spark, platform, source, data, "train").reused
    reused = find_finished_shards(platform, source, data, None, "train")
    assert reused
    assert (reused.folder, reused.num_rows, reused.reused) == (train.folder, train.num_rows, True)

    refreshed = ingest(spark, platform, source, data, refresh=True)
    assert (refreshed.new, refreshed.updated, refreshed.quarantined) == (0, 31, 1)
    assert refreshed.splits == changed.splits
    assert refreshed.replaced == {"texts": 31, "quarantine": 1}
    remade = shard_texts(spark, platform, source, data, "train")
    assert (remade.content_hash, remade.reused) == (train.content_hash, False)
    with pytest.raises(UserError, match=r"the test split has no rows.*in train, .*in val"):
        shard_texts(spark, platform, source, data, "test")
    with pytest.raises(UserError, match="refused rows of plain text are not replayed"):
        replay(spark, platform, source, data, ["text_too_long"])
