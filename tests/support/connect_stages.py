"""Function that runs all stages of the pipeline, and a script that runs the stages on a Spark Connect session.

Like a program on serverless compute of Databricks, the script is a Spark Connect client whose session refuses Spark
settings. The script prints the reports as JSON:

SPARK_REMOTE=sc://HOST:PORT python connect_stages.py SCHEMA FOLDER
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession
from refused_settings import refuse_settings
from tiny_runs import save_random_model, tiny_model_config, tiny_run

from pipelines.config import DatabricksPlatformConfig, DataConfig
from pipelines.driver.caption.run import CaptionRequest, caption
from pipelines.driver.delta.maintain import maintain
from pipelines.driver.delta.versions import read_versions
from pipelines.driver.evaluate.run import evaluate
from pipelines.driver.ingest.quarantine_report import inspect_quarantine, select_with_spark
from pipelines.driver.ingest.replay import replay
from pipelines.driver.ingest.report import write_report
from pipelines.driver.ingest.run import ingest
from pipelines.driver.model_files import ModelFiles
from pipelines.driver.shard.run import ShardReport, shard
from pipelines.driver.train.run import launch, prepare
from pipelines.errors import UserError
from pipelines.formats.shards import Shards
from pipelines.platform import Platform, databricks, is_connect
from pipelines.scenes import write_scenes

CATALOG = "spark_catalog"
SCENES, REPEATED = 300, 20
SPEED = "captions_per_second"
"""Metric that differs between two evaluations, because the metric is a measured speed."""


def open_workspace(schema: str, folder: Path) -> Platform:
    """Return the platform of a workspace whose Volume is a folder and whose Spark session is already running."""
    config = DatabricksPlatformConfig.model_validate(
        {"kind": "databricks", "catalog": CATALOG, "schema": schema, "volume": "files", "ranks": 2, "use_gpu": False}
    )
    return replace(databricks(config), root=folder / "volume")


def rounded(figures: Mapping[str, float]) -> dict[str, float]:
    """Round sums of rows, whose last digits depend on the order in which Spark's tasks end."""
    return {name: round(value, 6) for name, value in figures.items()}


def run_stages(spark: SparkSession, platform: Platform, folder: Path) -> dict[str, Any]:
    """Run every stage that needs Spark, and return the stage reports without values that differ between home folders.

    Args:
        spark: Spark session.
        platform: location of the tables and folders.
        folder: empty folder for the input and the model.
    """
    pictures = folder / "pictures"
    write_scenes(pictures / "scenes.csv", SCENES, seed=0)
    data = DataConfig.model_validate({"source": {"path": str(pictures)}, "split": {"kind": "hash", "val": 0.15}})
    first = write_report(spark, platform, ingest(spark, platform, "scenes", data))
    _repeat_with_other_texts(pictures)
    more = ingest(spark, platform, "scenes", data)
    image = tiny_model_config().image
    splits = {split: shard(spark, platform, "scenes", data, image, split) for split in ("train", "val")}
    model = random_model(folder / "model")
    evaluation = evaluate(spark, platform, model, Path(splits["val"].folder), Path(splits["train"].folder))
    captions = [
        caption(spark, platform, model, CaptionRequest(where="split = 'val'", remove_deleted=True)) for _ in range(2)
    ]
    replayed = replay(spark, platform, "scenes", data, ["empty_text"])
    refused = inspect_quarantine(select_with_spark(spark, platform), platform, [], rows=2, pictures=True)
    return {
        "ingest": [report.model_dump(exclude={"seconds", "page", "ingest_id"}) for report in (first, more)],
        "last change of another source": read_versions(spark, platform, "another").last_change,
        "shards": {split: Shards.open(Path(report.folder)).manifest.content_hash for split, report in splits.items()},
        "train": train(spark, platform, splits["train"], splits["val"]),
        "evaluation": {name: value for name, value in evaluation.values().items() if name != SPEED},
        "caption": [
            (report.considered, report.already, report.captioned, report.errors, rounded(report.figures))
            for report in captions
        ],
        "replay": replayed.model_dump(exclude={"seconds"}),
        "quarantine": [(row.source_row, row.reason, row.payload) for row in refused.rows],
        "mistakes": describe_mistakes(spark, platform, model, data),
        "maintain": [table.table.rpartition(".")[2] for table in maintain(spark, platform).tables],
    }


def _repeat_with_other_texts(pictures: Path) -> None:
    with (pictures / "scenes.csv").open(newline="") as file:
        header, *rows = list(csv.reader(file))[: REPEATED + 1]
    with (pictures / "texts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *([number, picture, f"{said} again"] for number, picture, said in rows)])


def train(spark: SparkSession, platform: Platform, training: ShardReport, validation: ShardReport) -> list[object]:
    """Train on two ranks that TorchDistributor starts on executors, and return metrics and a hash of the weights."""
    run = prepare(tiny_run(steps=6), platform, training, validation)
    result = launch(run, platform, lambda: spark)
    weights = hashlib.sha256((Path(result.checkpoint) / "model.safetensors").read_bytes()).hexdigest()
    return [result.step, result.world_size, result.metrics["val/loss"], weights]


def random_model(folder: Path) -> ModelFiles:
    """Save a model with random weights, and return its files."""
    save_random_model(folder)
    return ModelFiles(folder=folder, name="compared", version="1", run_id="r")


def describe_mistakes(spark: SparkSession, platform: Platform, model: ModelFiles, data: DataConfig) -> list[str]:
    """Make typical mistakes of users, such as wrong names, and return the first part of each error message."""
    selected = data.model_copy(update={"shards": data.shards.model_copy(update={"where": "no_column = 1"})})
    table = DataConfig.model_validate({"source": {"kind": "table", "table": f"{platform.namespace}.missing"}})
    mistakes: list[Callable[[], object]] = [
        lambda: caption(spark, platform, model, CaptionRequest(where="no_column = 1")),
        lambda: caption(spark, platform, model, CaptionRequest(where="split = ")),
        lambda: caption(spark, platform, model, CaptionRequest(source_table="missing")),
        lambda: caption(spark, platform, model, CaptionRequest(source_version=10_000)),
        lambda: shard(spark, platform, "scenes", selected, tiny_model_config().image, "train"),
        lambda: ingest(spark, platform, "missing", table),
    ]
    found = []
    for make in mistakes:
        try:
            make()
        except UserError as error:
            found.append(error.what.replace(platform.namespace, "SCHEMA"))
    return found


if __name__ == "__main__":
    from pyspark.sql.connect.conf import RuntimeConf

    workspace = open_workspace(sys.argv[1], Path(sys.argv[2]))
    session = workspace.open_spark()
    assert is_connect(session)
    with pytest.MonkeyPatch.context() as patch:
        refuse_settings(patch, RuntimeConf)
        print(json.dumps(run_stages(session, workspace, Path(sys.argv[2]))))
