"""Tests of the retention time of tables: how long VACUUM keeps old files, and how long old versions can be read."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pictures import png
from pyspark.sql import SparkSession

from pipelines.config import DataConfig
from pipelines.driver.caption.source_table import open_source_table
from pipelines.driver.delta.maintain import LOG_RETENTION, maintain_table
from pipelines.driver.delta.spark_errors import RETENTION, translate_spark_errors
from pipelines.driver.delta.tables import table_properties
from pipelines.driver.ingest.ledger import items_table
from pipelines.driver.ingest.sources.open import open_source
from pipelines.errors import StageFailed, UserError
from pipelines.formats.delta_files import commit_id
from pipelines.platform import Platform


def write_versions(folder: Path, hours: tuple[float, ...], properties: dict[str, str]) -> list[Path]:
    """Write a table with one version per entry of `hours`. Each version replaces the only row of the table.

    Args:
        folder: folder of the table.
        hours: ages of the versions in hours, oldest version first.
        properties: table properties.

    Returns:
        The data file of each version.
    """
    files: list[Path] = []
    for version, age in enumerate(hours):
        row = pa.Table.from_pylist([{"id": str(version), "image": png(version), "text": f"picture {version}"}])
        write_deltalake(folder, row, mode="overwrite", configuration=properties if version == 0 else None)
        (name,) = DeltaTable(folder).file_uris()
        files.append(Path(name))
        log = folder / "_delta_log" / f"{version:020}.json"
        then = time.time() - age * 3600
        actions = [json.loads(line) for line in log.read_text().splitlines()]
        for removed in (action["remove"] for action in actions if "remove" in action):
            removed["deletionTimestamp"] = int(then * 1000)
        log.write_text("\n".join(map(json.dumps, actions)) + "\n")
        for path in (log, files[-1]):
            os.utime(path, (then, then))
    return files


@pytest.mark.matrix
def test_files_of_table_versions_within_the_retention_time_are_kept_and_their_versions_can_be_read(
    spark: SparkSession, tmp_path: Path
) -> None:
    old, new = write_versions(tmp_path, (300, 200), {})
    name = f"delta.`{tmp_path}`"

    assert maintain_table(spark, name, {}, 1000).removed == 0
    assert old.exists()
    assert spark.sql(f"SELECT id FROM {name} VERSION AS OF 0").collect()[0]["id"] == "0"
    assert {table_properties(spark, name)[key] for key in (RETENTION, LOG_RETENTION)} == {"interval 1000 hours"}
    assert maintain_table(spark, name, {}, None).removed == 0, "the table keeps its retention time"

    assert maintain_table(spark, name, {}, 168).removed == 1
    assert (old.exists(), new.exists()) == (False, True)
    properties = table_properties(spark, name)
    assert (properties[RETENTION], properties[LOG_RETENTION]) == ("interval 168 hours", "interval 1000 hours")


def test_the_error_for_a_version_beyond_the_retention_time_names_the_table_property(
    spark: SparkSession, platform: Platform, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_versions(tmp_path, (5, 4, 0), {RETENTION: "interval 1 hours", "delta.enableChangeDataFeed": "true"})
    name, fix = f"delta.`{tmp_path}`", rf"the table property {RETENTION} to a longer time"

    with pytest.raises(UserError, match=rf"cannot be read at version 0.*{fix}"):
        open_source_table(spark, platform, name, 0, columns=("id", "image"), where="")
    source = {"kind": "table", "path": str(tmp_path), "columns": {"id": "id"}}
    with pytest.raises(UserError, match=rf"cannot be read as a Delta table.*{fix}"):
        open_source(
            spark,
            platform,
            "retention",
            DataConfig.model_validate({"source": source | {"version": 0}}),
            items_table([]),
        )
    with (
        pytest.raises(StageFailed, match=fix),
        translate_spark_errors("a table could not be restored", where=name),
    ):
        spark.sql(f"RESTORE TABLE {name} TO VERSION AS OF 0").collect()

    ingested = items_table([(str(DeltaTable(tmp_path).metadata().id), f"version 0 {commit_id(tmp_path, 0)}")])
    with caplog.at_level("INFO"):
        opened = open_source(spark, platform, "retention", DataConfig.model_validate({"source": source}), ingested)
    assert opened.rows is not None
    assert [row["used_0"] for row in opened.rows.frame.collect()] != []
    assert "so all rows are read: Delta reads only the newest version" in caplog.text
