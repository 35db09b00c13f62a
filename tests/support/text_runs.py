"""Helpers that write runs of a text-only model and their shards without Spark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from shard_reports import shard_report
from tiny_runs import tiny_model_config, tiny_run

from pipelines.config import RunConfig
from pipelines.driver.shard.run import ShardReport
from pipelines.executor.texts.shard import write_text_files
from pipelines.formats.shards import Manifest, ShardFile, ShardRequest, Shards, write_manifest

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran", "to", "the", "red", "house"]


def text_run(ranks: int = 1, **train: Any) -> RunConfig:
    """Return the config of a run of a text-only model that takes a few seconds."""
    changes = {
        "model": tiny_model_config().model_dump() | {"text_only": True},
        "data": {"source": {"kind": "text", "path": "none"}},
    }
    return RunConfig.model_validate(tiny_run(ranks=ranks, **train).model_dump(by_alias=True) | changes)


def random_texts(count: int) -> list[str]:
    """Return texts of nine random words."""
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, 9)) for _ in range(count)]


def write_texts(folder: Path, texts: Sequence[str]) -> ShardReport:
    """Write shards of text with the executors' function."""
    request = ShardRequest(
        table="texts",
        table_id="t",
        table_version=1,
        source="tiny",
        split="train",
        image=None,
        encoding="raw",
        rows=8,
        seed=0,
    )
    folder.mkdir(parents=True)
    rows = {"file": [n // 8 for n in range(len(texts))], "text_id": [str(n) for n in range(len(texts))], "text": texts}
    batch = pa.RecordBatch.from_pydict(rows)
    files = [
        ShardFile(**row)
        for written in write_text_files(iter([batch]), request, str(folder))
        for row in written.to_pylist()
    ]
    write_manifest(folder, Manifest(request=request, files=tuple(files)))
    shards = Shards.open(folder)
    assert list(shards.texts()) == list(texts)
    return shard_report(shards, dataset_version=1)
