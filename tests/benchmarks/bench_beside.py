"""Speed of ingest compared with Daft and Hugging Face datasets, on the same rows and cores.

    pip install daft datasets
    python tests/benchmarks/bench_beside.py

Each tool reads a CSV file of base64 pictures, and decodes the base64 text and the picture. Each tool then writes bytes,
SHA-256, format, width, height and text of the picture. Daft and datasets run the same minimal Python function on each
row and write Parquet. Lakesight's ingest also refuses bad rows, finds duplicates and near duplicates, compares the
input with existing rows, and commits to Delta. Each tool runs twice: first on a few rows, then on all rows. Only the
second run is measured, so the start-up time is excluded. The benchmark prints wall seconds, and the CPU seconds of all
processes together.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import daft  # type: ignore[import-not-found]
import datasets  # type: ignore[import-not-found]
from bench_ingest import Took, ingested, took
from measure import make
from PIL import Image

from pipelines.config import LocalPlatformConfig
from pipelines.platform import local

KINDS = {
    "photo, 640 x 480 JPEG": (6000, {"side": 640, "height": 480, "kind": "JPEG"}),
    "field, 1024 x 1024 PNG": (300, {"side": 1024, "kind": "PNG"}),
    "emoji, 72 x 72 PNG": (12000, {"side": 72, "kind": "PNG"}),
}
FEW = 40
FIELDS = {"image": bytes, "sha256": str, "format": str, "width": int, "height": int}
CORES = len(os.sched_getaffinity(0))


def row(text: str) -> dict[str, Any]:
    """Decode a picture and return the columns that each tool writes in addition to the text."""
    data = base64.b64decode(text)
    image = Image.open(io.BytesIO(data))
    format_ = str(image.format)
    width, height = image.convert("RGB").size
    digest = hashlib.sha256(data).hexdigest()
    return {"image": data, "sha256": digest, "format": format_, "width": width, "height": height}


def by_daft(path: Path, out: Path) -> None:
    """Run Daft. Daft decides whether the Python function runs in threads or in processes."""
    struct = daft.DataType.struct({name: daft.DataType.infer_from_type(type_) for name, type_ in FIELDS.items()})
    decoded = daft.func(row, return_dtype=struct)
    frame = daft.read_csv(str(path)).into_batches(64)
    frame = frame.select(decoded(daft.col("b64string_images")).alias("row"), "caption")
    columns = [daft.col("row").get(name).alias(name) for name in FIELDS]
    frame.select(*columns, "caption").write_parquet(str(out))


def by_datasets(path: Path, out: Path) -> None:
    """Run Hugging Face datasets with one process per core."""
    rows = datasets.load_dataset("csv", data_files=str(path), split="train", cache_dir=str(out))
    mapped = rows.map(
        row, input_columns="b64string_images", remove_columns="b64string_images", num_proc=CORES, writer_batch_size=64
    )
    mapped.to_parquet(str(out / "rows.parquet"), batch_size=64)


def main() -> None:
    """Measure every tool on every kind of picture and print the times."""
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LAKESIGHT_HOME"] = folder
        platform = local(LocalPlatformConfig())
        spark = platform.open_spark()
        for name, (count, options) in KINDS.items():
            few, many = (Path(folder) / f"{name[:5]}-{number}.csv" for number in (FEW, count))
            for path, number in ((few, FEW), (many, count)):
                make(path, number, **options)  # type: ignore[arg-type]
            tools: dict[str, Callable[[Path], Took]] = {
                "daft": lambda path: took(lambda: by_daft(path, Path(folder) / f"daft-{path.stem}")),
                "datasets": lambda path: took(lambda: by_datasets(path, Path(folder) / f"hf-{path.stem}")),
                "lakesight": lambda path: ingested(spark, platform, path),
            }
            print(f"{name}, {count} of them, {CORES} cores")
            for tool, run in tools.items():
                run(few)
                wall, processor, _ = run(many)
                print(f"  {tool:10}{wall:6.1f} s, {processor:6.1f} s of CPU time", flush=True)
        spark.stop()


if __name__ == "__main__":
    main()
