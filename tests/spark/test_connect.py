"""All stages on a Spark Connect session write the same rows, shards and captions as on a classic session.

The Spark Connect session refuses all Spark settings, because serverless compute of Databricks refuses nearly all
settings.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import connect_stages
import pytest
from connect_stages import CATALOG, REPEATED, SCENES, SPEED, open_workspace, run_stages
from deltalake import DeltaTable
from lakesight_command import lakesight
from processes import TEST_PATH
from pyspark.sql import SparkSession

from pipelines.formats.table_schema import Table
from pipelines.formats.tables import EVALUATIONS, GENERATED_CAPTIONS, INGESTED, QUARANTINE, SAMPLES
from pipelines.platform import Platform
from pipelines.scenes import write_scenes

ROWS = 40
DIFFERENT = {
    *("ingested_at", "quarantined_at", "replayed_at", "captioned_at", "evaluated_at"),
    *("ingest_id", "item", "state", "source_table", "source_file", "read_at"),
    *("filled_commit", "refused_commit", "source_commit"),
}
"""Columns that differ between two ingests of equal files: times, ids of commits, and values that depend on a path or a
schema."""


@pytest.fixture(scope="module")
def server(spark: SparkSession) -> Iterator[str]:
    """Start a Spark Connect server in the JVM of the classic session. Return the address of the server."""
    context, jvm = spark.sparkContext, spark.sparkContext._jvm
    assert jvm is not None
    settings = jvm.org.apache.spark.SparkEnv.get().conf()
    settings.set("spark.connect.grpc.binding.address", "127.0.0.1")
    settings.set("spark.connect.grpc.binding.port", "0")  # the system chooses a free port
    service = getattr(getattr(jvm.org.apache.spark.sql.connect.service, "SparkConnectService$"), "MODULE$")
    none = getattr(getattr(jvm.scala, "None$"), "MODULE$")
    service.start(context._jsc.sc())
    yield f"sc://127.0.0.1:{service.localPort()}"
    service.stop(none, none)


def run_on_connect(server: str, schema: str, folder: Path) -> Any:
    """Run the stages in a separate process, because a process has either classic or Connect sessions."""
    command = [sys.executable, connect_stages.__file__, schema, str(folder)]
    environment = os.environ | {"SPARK_REMOTE": server, "PYTHONPATH": TEST_PATH}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def rows(spark: SparkSession, schema: str, table: Table) -> list[dict[str, Any]]:
    stored = spark.table(f"{CATALOG}.{schema}.{table.name}").select([n for n in table.names if n not in DIFFERENT])
    found = [row.asDict(recursive=True) for row in stored.collect()]
    return sorted((row for row in found if row.get("metric") != SPEED), key=repr)


@pytest.mark.matrix
@pytest.mark.timeout(1800)  # the test runs every stage twice
def test_every_stage_has_equal_results_on_a_spark_connect_session_that_refuses_settings(
    spark: SparkSession, server: str, tmp_path: Path
) -> None:
    for schema in ("classic", "connected"):
        spark.sql(f"CREATE SCHEMA {CATALOG}.{schema}")
    on_classic = run_stages(spark, open_workspace("classic", tmp_path / "classic"), tmp_path / "classic")
    on_connect = run_on_connect(server, "connected", tmp_path / "connected")
    assert on_connect == json.loads(json.dumps(on_classic))
    for table in (SAMPLES, QUARANTINE, INGESTED, GENERATED_CAPTIONS, EVALUATIONS):
        found = rows(spark, "connected", table)
        assert found == rows(spark, "classic", table), table.name
        assert found, table.name
    first, more = on_connect["ingest"]
    assert (first["rows_in"], more["merged"]) == (SCENES, REPEATED)
    assert len(on_connect["mistakes"]) == 6


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_commands_of_a_laptop_run_on_a_spark_connect_server_without_a_jvm_of_their_own(
    server: str, platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAVA_HOME", "/nonexistent")
    write_scenes(tmp_path / "scenes" / "scenes.csv", ROWS, seed=3)
    options = ["--json", "--set", f"platform.spark.master={server}", "--set", f"data.source.path={tmp_path}/scenes"]
    reports = []
    for command in ("ingest", "ingest", "shard"):
        done = lakesight(platform.root, command, *options)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout))
    first, again, shards = reports
    assert (first["rows_in"], again["rows_in"], again["unchanged"]) == (ROWS, 0, 1)
    assert platform.tables
    stored = DeltaTable(platform.tables / "samples").to_pyarrow_table(
        columns=["ingest_id"], filters=[("source", "=", "demo")]
    )
    assert first["new"] == stored["ingest_id"].to_pylist().count(first["ingest_id"]) > 0
    assert sum(split["num_rows"] for split in shards.values()) == stored.num_rows


@pytest.mark.matrix
def test_a_spark_connect_server_that_cannot_serve_the_home_folder_or_a_setting_is_reported(
    server: str, platform: Platform, tmp_path: Path
) -> None:
    options = ["--json", "--set", f"platform.spark.master={server}", "--set", "data.source.path=scenes:10:0"]
    refused = lakesight(tmp_path / "other", "ingest", *options)
    assert "schema lakesight of the catalog belongs to another home folder" in refused.stderr.splitlines()[-1]
    conf = ("--set", "platform.spark.conf.spark.executor.memory=s3cret")
    refused = lakesight(platform.root, "shard", *options, *conf, "--set", "data.shards.rows=3")
    assert "refuses a setting. Where: platform.spark.conf: spark.executor.memory" in refused.stderr.splitlines()[-1]
    assert (refused.returncode, "s3cret" in refused.stderr) == (2, False)
