"""Tests of pictures that crash or hang their decoder: the error names the bad row, and no other row is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from crashing_decoder import CrashingImage, CrashingLimits, crashing_picture, hanging_picture
from pictures import as_base64, png, write_csv
from pyspark.sql import SparkSession

from pipelines.config import DataConfig
from pipelines.driver.ingest.run import ingest
from pipelines.driver.shard.run import shard
from pipelines.errors import StageFailed
from pipelines.platform import Platform


def config(path: Path) -> DataConfig:
    data = DataConfig.model_validate({"source": {"path": str(path)}, "near_duplicates": False})
    return data.model_copy(update={"limits": CrashingLimits(max_decode_seconds=1.5)})


@pytest.mark.matrix
def test_a_picture_that_crashes_or_hangs_its_decoder_is_quarantined_at_ingest_and_named_in_the_shard_error(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    good = [[as_base64(png(5000 + n)), f"picture {n}"] for n in range(40)]
    hanging = [as_base64(hanging_picture()), "endless"]
    rows = [*good[:33], [as_base64(crashing_picture()), "deadly"], hanging, *good[33:], ["?", "bad"]]
    data = config(write_csv(tmp_path / "a.csv", rows))
    report = ingest(spark, platform, source, data)
    assert (report.rows_in, report.new) == (43, 40)
    assert report.reasons == {"bad_base64": 1, "decode_timeout": 1, "decoder_crash": 1}
    refused = spark.table(platform.table("quarantine")).where(f"source = '{source}' AND reason = 'decoder_crash'")
    [row] = refused.collect()
    assert row["detail"] == "the process that decoded the picture was ended by SIGSEGV"
    assert as_base64(crashing_picture()) in row["payload"]

    table = platform.table("samples")
    victim = spark.table(table).where(f"source = '{source}' AND split = 'train'").first()["image_id"]  # type: ignore[index]
    spark.sql(f"UPDATE {table} SET image = X'{crashing_picture().hex()}' WHERE image_id = '{victim}'").collect()
    with pytest.raises(
        StageFailed, match=f"crashes the process that decodes the picture.*{victim}.*SIGSEGV.*delete"
    ) as caught:
        shard(spark, platform, source, data, CrashingImage(size=8), "train")
    assert "\n" not in str(caught.value)
