"""Scores of one model version for every row of a split, and its attention for the worst rows.

Executors compute scores and attention once, and the driver writes them to files.

The scores are in a folder whose name contains a hash of everything that determines the scores (model files, pictures,
scoring method). A second evaluation of the same model and pictures finds this folder and does not run the model. The
scores file also has the nearest-neighbour caption of each row: a human caption of the training picture whose grid of 8
x 8 colours is the most similar.
"""

from __future__ import annotations

import logging
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
from pipelines.driver.delta.map_in_arrow import spark_schema
from pipelines.driver.delta.spark_errors import translate_spark_errors
from pipelines.driver.evaluate.metrics import ScoredRow
from pipelines.driver.model_files import ModelFiles
from pipelines.executor.evaluate import (
    ATTENTION_SCHEMA,
    COLOUR_GRID_SCHEMA,
    ScoreJob,
    attention_batches,
    colour_grid_batches,
    score_batches,
)
from pipelines.formats.row_scores import SCORE_SCHEMA
from pipelines.formats.shards import Shards
from pipelines.pages.page import WordPicture
from pipelines.platform import Platform, default_parallelism, task_cpus
from vlm.config import ModelConfig
from vlm.config.size import num_attention_weights
from vlm.files import atomic_write

logger = logging.getLogger(__name__)

SCORING = 2
"""Version of the scoring method. Increase this number when a code change gives different scores for the same model and
pictures."""
ROWS_PER_TASK = 128
MAX_NEIGHBOURS = 20_000
"""Largest number of training pictures that are compared with a picture to find the most similar one. Only the first
training pictures of the shards are candidates. The first pictures are a random sample, because shards are shuffled.
"""
BLOCK_ROWS = 512
"""Number of evaluated rows in each block of the distance matrix between evaluated pictures and training pictures."""
SCORES = "scores.parquet"
ATTENTION = "attention.parquet"
ATTENTION_ROWS = 6
"""Number of worst rows for which the gallery shows the model's attention."""
MAX_ATTENTION_WEIGHTS = 2**28
"""Largest number of attention weights of one caption. This number of weights takes 1 GB in fp32. If a caption has more
weights, the gallery shows no attention."""

ColourGrids = npt.NDArray[np.float32]
GridAndText = tuple[str, bytes, str]
"""Tuple of the image_id, the colour grid and the text of a picture."""


def scores_hash(model: ModelFiles, shards: Shards, train: Shards) -> str:
    """Return a hash of everything that determines the scores of a model version on a split.

    For a model without a digest, the hash is the same as in Lakesight 0.1.0, which identified a model by its MLflow
    run.
    """
    pictures = [each.manifest.content_hash for each in (shards, train)]
    settings = model.settings and model.settings.hashed_settings()
    optional = filter(None, [model.digest, settings])
    return short_hash(SCORING, model.name, model.version, model.run_id, pictures, *optional)


def evaluation_folder(platform: Platform, model: ModelFiles, shards: Shards, train: Shards) -> Path:
    """Return the folder of the scores, the report and the pages of a model version on a split."""
    request = shards.manifest.request
    name = f"{model.name}-{model.version}-{request.source}-{request.split}-{scores_hash(model, shards, train)}"
    return platform.folder("reports") / name


def score_split(spark: SparkSession, model: ModelFiles, shards: Shards, train: Shards, folder: Path) -> list[ScoredRow]:
    """Return the scores of all rows, sorted by row and prompt. Compute the scores if `folder` has no scores file.

    Raises:
        StageFailed: an executor failed.
    """
    file = folder / SCORES
    if not file.exists():
        with translate_spark_errors(
            "the model could not be evaluated", where=f"model {model.name} version {model.version}"
        ):
            rows = _run_model(spark, model, shards)
            texts = _neighbour_captions(spark, train, shards)
        scored = [ScoredRow(**row, neighbour=texts.get((row["image_id"], row["prompt"]))) for row in rows]
        write_scores(file, scored)
    return read_scores(file)


def read_scores(file: Path) -> list[ScoredRow]:
    """Read a scores file."""
    rows = pq.read_table(file).to_pylist()
    return [ScoredRow(**{**row, "references": tuple(row["references"])}) for row in rows]


def write_scores(file: Path, scored: Iterable[ScoredRow]) -> None:
    """Create the folder of a scores file, and write the file atomically."""
    schema = pa.schema([*SCORE_SCHEMA, pa.field("neighbour", pa.string())])
    assert set(schema.names) == {field.name for field in fields(ScoredRow)}
    with atomic_write(file) as temporary:
        pq.write_table(pa.Table.from_pylist([asdict(item) for item in scored], schema), temporary)


def _score_job(spark: SparkSession, model: ModelFiles, shards: Shards) -> ScoreJob:
    """Return the settings with which executors run a model on the rows of a split."""
    return ScoreJob(
        model_folder=model.folder,
        model_digest=model.digest,
        remote=model.remote,
        shards_folder=str(shards.folder),
        threads=task_cpus(spark),
        settings=model.settings,
    )


def _run_model(spark: SparkSession, model: ModelFiles, shards: Shards) -> list[dict[str, Any]]:
    """Score all rows of a split on executors.

    Return one dict per row, with the keys of SCORE_SCHEMA, sorted by row and prompt.
    """
    tasks = max(default_parallelism(spark), -(-len(shards) // ROWS_PER_TASK))
    rows = spark.range(0, len(shards), 1, min(tasks, len(shards)))
    table = rows.mapInArrow(partial(score_batches, _score_job(spark, model, shards)), spark_schema(SCORE_SCHEMA))
    return sorted((row.asDict() for row in table.collect()), key=lambda row: (row["row"], row["prompt"]))


# ------------------------------------------------------------------------------------------------ attention


def draw_attention(
    spark: SparkSession, model: ModelFiles, shards: Shards, rows: Sequence[ScoredRow], folder: Path
) -> dict[tuple[str, str], tuple[WordPicture, ...]]:
    """For each word of the captions, draw where in the picture the model looked.

    If `folder` has no attention file, one executor draws the attention, and the file is written.

    Args:
        spark: Spark session.
        model: evaluated model version.
        shards: evaluated split.
        rows: rows for whose captions the attention is drawn.
        folder: folder of the evaluation.

    Returns:
        Dict from the key of a row to one picture per word. A row without words in its caption has no picture. The dict
        is empty if the attention weights of a caption take too much memory.

    Raises:
        StageFailed: the executor failed.
    """
    file = folder / ATTENTION
    if not file.exists():
        settings = model.settings or model.read_config().generation
        fits = can_show_attention(model.read_config(), settings.max_new_tokens)
        with atomic_write(file) as temporary:
            drawn = _run_attention(spark, model, shards, rows) if fits else []
            pq.write_table(pa.Table.from_pylist(drawn, ATTENTION_SCHEMA), temporary)
    keys = {(item.row, item.prompt): item.key for item in rows}
    return {
        keys[row["row"], row["prompt"]]: tuple(map(WordPicture, row["titles"], row["pictures"]))
        for row in pq.read_table(file).to_pylist()
        if (row["row"], row["prompt"]) in keys
    }


def can_show_attention(config: ModelConfig, max_new_tokens: int) -> bool:
    """Return whether the attention weights of a caption fit an executor's memory (at most MAX_ATTENTION_WEIGHTS)."""
    weights = num_attention_weights(config, max_new_tokens)
    if weights > MAX_ATTENTION_WEIGHTS:
        logger.info("the gallery shows no attention, because a caption has %d attention weights", weights)
    return weights <= MAX_ATTENTION_WEIGHTS


def _run_attention(
    spark: SparkSession, model: ModelFiles, shards: Shards, rows: Sequence[ScoredRow]
) -> list[dict[str, Any]]:
    """Draw the attention of the captions of rows in one task. Return dicts with the keys of ATTENTION_SCHEMA."""
    captions = [(item.row, item.prompt, item.caption) for item in rows]
    table = spark.createDataFrame(captions, "row bigint, prompt string, caption string").coalesce(1)
    draw = partial(attention_batches, _score_job(spark, model, shards))
    with translate_spark_errors(
        "the attention could not be drawn", where=f"model {model.name} version {model.version}"
    ):
        return [row.asDict() for row in table.mapInArrow(draw, spark_schema(ATTENTION_SCHEMA)).collect()]


# ------------------------------------------------------------------------------------------------ neighbours


def _neighbour_captions(spark: SparkSession, train: Shards, shards: Shards) -> dict[tuple[str, str], str]:
    """For each evaluated row, find a text of the most similar training picture.

    Return a dict from the image_id and prompt of the evaluated row to the text. Rows without a candidate are not in the
    dict. Candidates for a row are the training pictures with the same prompt. If no training picture has that prompt,
    all training pictures are candidates. An evaluated picture that is also in the training split gets the text of a
    different training picture.
    """
    known = min(len(train), MAX_NEIGHBOURS)
    ids = spark.range(-known, len(shards), 1, min(default_parallelism(spark), known + len(shards)))
    folders = (str(shards.folder), str(train.folder))
    grids = ids.mapInArrow(partial(colour_grid_batches, folders), spark_schema(COLOUR_GRID_SCHEMA))
    evaluated: dict[str, list[GridAndText]] = defaultdict(list)
    training: dict[str, list[GridAndText]] = defaultdict(list)
    for row in grids.orderBy("index").collect():
        texts: dict[str, list[str]] = defaultdict(list)
        for pair in row["texts"]:
            texts[pair["prompt"]].append(pair["text"])
        for prompt, choices in texts.items():
            text = choices[row["index"] % len(choices)]  # a row's index is random, because shards are shuffled
            (evaluated if row["index"] >= 0 else training)[prompt].append((row["image_id"], row["grid"], text))
    any_prompt = [item for items in training.values() for item in items]
    found = {}
    for prompt, rows in evaluated.items():
        for (image_id, _, _), text in zip(rows, _nearest_texts(rows, training[prompt] or any_prompt), strict=True):
            if text is not None:
                found[image_id, prompt] = text
    return found


def _nearest_texts(rows: Sequence[GridAndText], candidates: Sequence[GridAndText]) -> Iterable[str | None]:
    """For each row, return the text of the nearest candidate with another image_id, or None if there is no such
    candidate."""
    if not candidates:
        return [None] * len(rows)
    grids, names = _as_array(candidates), np.array([image_id for image_id, _, _ in candidates])
    squared_norms = (grids**2).sum(axis=1)
    nearest: list[str | None] = []
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        distances = (
            squared_norms - 2 * _as_array(block) @ grids.T
        )  # the row's own squared norm is left out, because it is equal for all candidates
        distances[np.array([image_id for image_id, _, _ in block])[:, None] == names] = np.inf
        for line, best in enumerate(distances.argmin(axis=1)):
            nearest.append(candidates[best][2] if np.isfinite(distances[line, best]) else None)
    return nearest


def _as_array(rows: Sequence[GridAndText]) -> ColourGrids:
    return np.stack([np.frombuffer(grid, np.uint8) for _, grid, _ in rows]).astype(np.float32)
