"""Helpers for tests of caption jobs: pictures, tables of pictures, requests, and stored captions."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image
from pyspark.sql import SparkSession

from pipelines.driver.caption.run import CaptionReport, CaptionRequest
from pipelines.driver.model_files import ModelFiles
from pipelines.formats.tables import GENERATED_CAPTIONS
from pipelines.platform import Platform

MAPPED = "TBLPROPERTIES ('delta.columnMapping.mode' = 'name')"
VECTORS = "TBLPROPERTIES ('delta.enableDeletionVectors' = 'true')"


def create(spark: SparkSession, folder: Path, schema: str, properties: str) -> str:
    table = f"delta.`{folder}`"
    spark.sql(f"CREATE TABLE {table} ({schema}) USING delta {properties}")
    return table


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    image = Image.effect_mandelbrot((24, 24), (-2, -1.5, 1, 1.5), 10 + number).convert("RGB")
    Image.blend(image, Image.new("RGB", (24, 24), (number * 53 % 256, 80, number * 91 % 256)), 0.7).save(buffer, "PNG")
    return buffer.getvalue()


def write(spark: SparkSession, folder: Path, rows: list[tuple[Any, ...]], schema: str = "id INT, photo BINARY") -> str:
    spark.createDataFrame(rows, schema).write.format("delta").mode("append").save(str(folder))
    return f"delta.`{folder}`"


def request(table: str, **more: object) -> CaptionRequest:
    return CaptionRequest.model_validate({"source_table": table, "id_column": "id", "image_column": "photo"} | more)


def stored(spark: SparkSession, platform: Platform, model: ModelFiles) -> dict[str, Any]:
    table = spark.table(platform.table(GENERATED_CAPTIONS.name))
    rows = table.where(table.model_name == model.name).collect()
    assert len(rows) == len({tuple(row[name] for name in GENERATED_CAPTIONS.key) for row in rows})
    return {row["image_id"]: row for row in rows}


def numbers(report: CaptionReport) -> tuple[int, int, int, int]:
    return report.considered, report.already, report.captioned, report.errors
