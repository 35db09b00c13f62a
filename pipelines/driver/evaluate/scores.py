"""Scores of every row of a split by one model version: made once by executors, then a file.

The file's folder is named by what determines its content (model version, pictures, how scoring works), so the same
question finds it again and no model runs. Beside each row's score stands what the nearest neighbour would have said:
the text of the training picture that looks most alike, 8 x 8 colours by 8 x 8 colours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import SparkSession

from pipelines.config import short_hash
from pipelines.driver.delta.map_in_arrow import spark_schema, task_threads
from pipelines.driver.delta.spark_errors import translate_spark_errors
from pipelines.driver.evaluate.metrics import ScoredRow
from pipelines.driver.model_files import ModelFiles
from pipelines.executor.evaluate import LOOK_SCHEMA, SCORE_SCHEMA, ScoreJob, look_batches, score_batches
from pipelines.formats.shards import Shards
from pipelines.platform import Platform
from vlm.files import atomic_write

SCORING = 2
"""Raised when the same model and pictures would be scored differently."""
ROWS_PER_TASK = 128
MAX_NEIGHBOURS = 20_000
"""Training pictures that are looked at. Shards are shuffled, so the first are a fair sample."""
BLOCK_ROWS = 512
SCORES = "scores.parquet"

Looks = npt.NDArray[np.float32]
Looked = tuple[str, bytes, str]
"""image_id, look and text of a picture."""


def scores_hash(model: ModelFiles, shards: Shards, train: Shards) -> str:
    """Equal for equal scores."""
    pictures = [each.manifest.content_hash for each in (shards, train)]
    return short_hash(SCORING, model.name, model.version, model.run_id, pictures)


def evaluation_folder(platform: Platform, model: ModelFiles, shards: Shards, train: Shards) -> Path:
    """Where all that is known of a version on a split lies."""
    request = shards.manifest.request
    name = f"{model.name}-{model.version}-{request.source}-{request.split}-{scores_hash(model, shards, train)}"
    return platform.folder("reports") / name


def score(spark: SparkSession, model: ModelFiles, shards: Shards, train: Shards, folder: Path) -> list[ScoredRow]:
    """Scores of all rows, in order: made now, or those that `folder` has.

    Raises:
        StageFailed: an executor failed.
    """
    file = folder / SCORES
    if not file.exists():
        with translate_spark_errors(
            "the model could not be evaluated", where=f"model {model.name} version {model.version}"
        ):
            rows = _score(spark, model, shards)
            texts = _neighbours(spark, train, shards)
        scored = [ScoredRow(**row, neighbour=texts.get((row["image_id"], row["prompt"]))) for row in rows]
        write_scores(file, scored)
    return read_scores(file)


def read_scores(file: Path) -> list[ScoredRow]:
    """The rows of a scores file."""
    rows = pq.read_table(file).to_pylist()
    return [ScoredRow(**{**row, "references": tuple(row["references"])}) for row in rows]


def write_scores(file: Path, scored: Iterable[ScoredRow]) -> None:
    """Write a scores file, whole or not at all; the folder is created."""
    schema = pa.schema([*SCORE_SCHEMA, pa.field("neighbour", pa.string())])
    assert set(schema.names) == {field.name for field in fields(ScoredRow)}
    with atomic_write(file) as temporary:
        pq.write_table(pa.Table.from_pylist([asdict(item) for item in scored], schema), temporary)


def _score(spark: SparkSession, model: ModelFiles, shards: Shards) -> list[dict[str, Any]]:
    job = ScoreJob(
        model_folder=model.folder,
        remote=model.remote,
        shards_folder=str(shards.folder),
        threads=task_threads(spark),
    )
    tasks = max(spark.sparkContext.defaultParallelism, -(-len(shards) // ROWS_PER_TASK))
    rows = spark.range(0, len(shards), 1, min(tasks, len(shards)))
    table = rows.mapInArrow(partial(score_batches, job), spark_schema(SCORE_SCHEMA))
    return sorted((row.asDict() for row in table.collect()), key=lambda row: (row["row"], row["prompt"]))


# ------------------------------------------------------------------------------------------------ neighbours


def _neighbours(spark: SparkSession, train: Shards, shards: Shards) -> dict[tuple[str, str], str]:
    """By picture and prompt, the text of the training picture that looks most alike and has that prompt.

    Where none has it, of any that looks most alike; of a picture that is in the training split itself, of another one.
    """
    known = min(len(train), MAX_NEIGHBOURS)
    ids = spark.range(-known, len(shards), 1, min(spark.sparkContext.defaultParallelism, known + len(shards)))
    folders = (str(shards.folder), str(train.folder))
    looks = ids.mapInArrow(partial(look_batches, folders), spark_schema(LOOK_SCHEMA)).orderBy("place").collect()
    asked: dict[str, list[Looked]] = defaultdict(list)
    answers: dict[str, list[Looked]] = defaultdict(list)
    for row in looks:
        for prompt, text in {pair["prompt"]: pair["text"] for pair in reversed(row["texts"])}.items():
            (asked if row["place"] >= 0 else answers)[prompt].append((row["image_id"], row["look"], text))
    anything = [answer for answers_of_one in answers.values() for answer in answers_of_one]
    found = {}
    for prompt, rows in asked.items():
        for (image_id, _, _), text in zip(rows, _nearest(rows, answers[prompt] or anything), strict=True):
            if text is not None:
                found[image_id, prompt] = text
    return found


def _nearest(rows: Sequence[Looked], answers: Sequence[Looked]) -> Iterable[str | None]:
    """For each row the text of the nearest answer of another picture; None where there is none."""
    if not answers:
        return [None] * len(rows)
    there, names = _as_array(answers), np.array([image_id for image_id, _, _ in answers])
    lengths = (there**2).sum(axis=1)
    nearest: list[str | None] = []
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        distances = lengths - 2 * _as_array(block) @ there.T  # less what is the same for all answers
        distances[np.array([image_id for image_id, _, _ in block])[:, None] == names] = np.inf
        for place, best in enumerate(distances.argmin(axis=1)):
            nearest.append(answers[best][2] if np.isfinite(distances[place, best]) else None)
    return nearest


def _as_array(rows: Sequence[Looked]) -> Looks:
    return np.stack([np.frombuffer(look, np.uint8) for _, look, _ in rows]).astype(np.float32)
