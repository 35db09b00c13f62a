"""Script that captions a table of pictures with a randomly initialised model. Tests kill the process of this script.

LAKESIGHT_HOME=HOME python caption_job.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from pictures import png
from pyspark.sql import SparkSession
from tiny_runs import save_random_model

import pipelines.driver.caption.run as stage
from pipelines.config import LocalPlatformConfig
from pipelines.driver.caption.run import CaptionReport, CaptionRequest, caption
from pipelines.driver.model_files import ModelFiles
from pipelines.platform import Platform, local

ROWS, BAD = 96, 5
ROWS_PER_FILE = 12
"""Number of rows per caption file. With 12 rows per file, eight Spark tasks caption the 96 rows of the table."""


def prepare(folder: Path) -> None:
    """Write a randomly initialised model and a table of pictures. The last BAD pictures of the table are invalid."""
    pictures = [png(number) for number in range(ROWS - BAD)] + [b"no picture"] * BAD
    table = pa.table({"id": [f"{number:02}" for number in range(ROWS)], "photo": pictures})
    write_deltalake(folder / "photos", table)
    save_random_model(folder / "model")


def caption_table(spark: SparkSession, platform: Platform, folder: Path, version: str) -> CaptionReport:
    """Caption the table in many small tasks."""
    stage.ROWS_PER_FILE = ROWS_PER_FILE
    model = ModelFiles(folder=folder / "model", name=f"m-{folder.name}", version=version, run_id="r")
    request = CaptionRequest(source_table=f"delta.`{folder}/photos`", id_column="id", image_column="photo")
    return caption(spark, platform, model, request)


def read_captions(home: Path, folder: Path, version: str) -> list[dict[str, Any]]:
    """Return a model version's caption rows, sorted by picture id, without columns that differ between jobs."""
    of_version = [("model_name", "=", f"m-{folder.name}"), ("model_version", "=", version)]
    columns = ["image_id", "caption", "error", "sha256", "num_tokens", "settings_hash"]
    table = DeltaTable(home / "warehouse" / "generated_captions").to_pyarrow_table(columns=columns, filters=of_version)
    return sorted(table.to_pylist(), key=lambda row: str(row["image_id"]))


if __name__ == "__main__":
    local_platform = local(LocalPlatformConfig())
    session = local_platform.open_spark()
    (local_platform.root / "started").touch()
    caption_table(session, local_platform, Path(sys.argv[1]), "1")
    session.stop()
