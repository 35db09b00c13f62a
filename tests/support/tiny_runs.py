"""Helpers that write tiny run folders and shards without Spark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from processes import TEST_PATH

from pipelines.config import (
    AugmentConfig,
    Chosen,
    CsvSourceConfig,
    DataConfig,
    LocalPlatformConfig,
    OptimizerConfig,
    RunConfig,
    TextWeights,
    TrainConfig,
)
from pipelines.formats.run_folder import Metrics, Result, RunFile, RunFolder, write_json
from pipelines.formats.shards import (
    Manifest,
    ShardRequest,
    Shards,
    encode_pixels,
    shard_schema,
    write_manifest,
    write_shard_file,
)
from pipelines.platform import Platform
from vlm import text
from vlm.config import Config, ModelConfig
from vlm.text.base import Tokenizer

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from vlm.model import VisionLanguageModel

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}


def no_spark() -> SparkSession:
    """Fail the test. A test passes this function to `launch` to check that ranks on the driver's host start no Spark
    session.
    """
    raise AssertionError("ranks on the driver's host need no Spark session")


def tiny_model_config() -> ModelConfig:
    """Return the config of a model with a few thousand weights, with dropout and stochastic depth."""
    transformer = {
        "width": 16,
        "depth": 1,
        "attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8},
        "mlp": {"kind": "plain", "mlp_width": 32},
        "dropout": 0.1,
        "stochastic_depth": 0.1,
    }
    return ModelConfig.model_validate(
        {
            "image": {"size": 16},
            "text": {"kind": "chars", "alphabet": " abcdefghijklmnopqrstuvwxyz"},
            "vision": {"stem": {"kind": "patch", "patch_size": 8}, "transformer": transformer},
            "decoder": {"context": 32, "transformer": transformer},
            "generation": {"max_new_tokens": 16},
        }
    )


def tiny_run(
    *, steps: int = 12, ranks: int = 2, model: object = None, cache_gib: float = 0, **train: object
) -> RunConfig:
    """Return the config of a run that takes a few seconds; the arguments `train` override train settings."""
    settings: dict[str, object] = {
        "steps": steps,
        "batch_size": 4,
        "log_every": 2,
        "validate_every": 6,
        "validate_rows": 5,
        "checkpoint_every": 4,
        "caption_samples": 2,
        "optimizer": OptimizerConfig(warmup_steps=2),
        "max_restarts": 0,
    }
    return RunConfig(
        name="tiny",
        chosen=Chosen(model="tiny", data="tiny", train="tiny", platform="local"),
        model=ModelConfig.model_validate(model) if model else tiny_model_config(),
        data=DataConfig(source=CsvSourceConfig(path="none")),
        train=TrainConfig.model_validate(settings | train),
        platform=LocalPlatformConfig(ranks=ranks, cache_gib=cache_gib),
    )


def write_shards(
    folder: Path,
    *,
    rows: int,
    texts: int = 1,
    repeats: int = 0,
    rows_per_file: int = 8,
    size: int = 16,
    seed: int = 0,
    text_weights: TextWeights = "frequency",
) -> Shards:
    """Write shards with the executors' functions. Each picture has one of four colours, and its text contains the name
    of the colour.

    Every second picture repeats its first text `repeats` more times.
    """
    request = ShardRequest(
        table="none",
        table_id="none",
        table_version=0,
        source="tiny",
        split="train",
        image=tiny_model_config().image.model_copy(update={"size": size}),
        encoding="raw",
        rows=rows_per_file,
        seed=0,
        text_weights=text_weights,
    )
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    names = list(COLOURS)
    content = []
    for index in range(rows):
        name = names[index % len(names)]
        pixels = np.clip(np.array(COLOURS[name]) + rng.integers(-20, 20, (size, size, 3)), 0, 255).astype(np.uint8)
        said = [{"prompt": "", "text": f"{name} {'x' * number}".strip()} for number in range(texts)]
        said = said[:1] * (repeats * (index % 2)) + said
        content.append({"image_id": f"tiny/{index}", "pixels": encode_pixels(pixels, "raw"), "texts": said})
    files = []
    for number in range(-(-rows // rows_per_file)):
        part = content[number * rows_per_file : (number + 1) * rows_per_file]
        batch = pa.RecordBatch.from_pylist(part, shard_schema(request))
        files.append(write_shard_file(folder, number, request, [batch]))
    write_manifest(folder, Manifest(request=request, files=tuple(files)))
    return Shards.open(folder)


def global_batches(
    shards: Shards,
    tokenizer: Tokenizer,
    steps: range,
    *,
    world_size: int = 1,
    workers: int = 0,
    augment: AugmentConfig | None = None,
) -> list[list[tuple[bytes, str]]]:
    """Return pixels and text of the eight rows of each global batch, joined from the batches of all ranks."""
    from pipelines.worker.data.augment import Augmenter
    from pipelines.worker.data.batches import Collator, training_batches
    from vlm.batch import IGNORE

    slices = [
        training_batches(
            shards,
            Collator(tokenizer, tiny_model_config()),
            steps=steps,
            rank=rank,
            world_size=world_size,
            batch_size=8,
            seed=1,
            workers=workers,
            augmenter=Augmenter(augment, 1) if augment else None,
        )
        for rank in range(world_size)
    ]
    return [
        [
            (pixels_HWC.numpy().tobytes(), tokenizer.decode(labels_T[labels_T != IGNORE].tolist()))
            for (batch,) in batches
            for pixels_HWC, labels_T in zip(batch.pixels_PHWC, batch.labels_BT, strict=True)
        ]
        for batches in zip(*slices, strict=True)
    ]


def write_run(folder: Path, config: RunConfig, train: Shards, validate: Shards) -> RunFolder:
    """Write a run folder with the files that the driver writes before the start of ranks."""
    run = RunFolder(folder)
    file = RunFile(
        config=config,
        code_version="test",
        train_shards=str(train.folder),
        validate_shards=str(validate.folder),
        dataset_version=0,
        content_hash=train.manifest.content_hash,
        world_size=config.platform.ranks,
    )
    write_json(run.run_file, file)
    text.save(text.learn(config.model.text, train.texts()), run.tokenizer)
    return run


def log_step(run: RunFolder, step: int) -> None:
    """Write the metrics of a step as rank 0 does."""
    write_json(run.metrics(step), Metrics(step=step, time=1_700_000_000 + step, values={"loss": 1 / (step + 1)}))


def save_random_model(folder: Path) -> None:
    """Save a small model with random weights, which are the same in every call."""
    import torch

    from vlm.checkpoint import save_model
    from vlm.factory import build_model

    config = tiny_model_config()
    torch.manual_seed(3)
    tokenizer = text.learn(config.text, [])
    save_model(folder, build_model(config, tokenizer.vocab_size), tokenizer)


def save_checkpoint(folder: Path, model: VisionLanguageModel, tokenizer: Tokenizer) -> None:
    """Write a checkpoint folder of a run, with the file files.json."""
    from vlm.checkpoint import atomic_folder, save_model

    with atomic_folder(folder) as temporary:
        save_model(temporary, model, tokenizer)


def finished_run(platform: Platform, folder: Path) -> tuple[RunFolder, Shards]:
    """Write shards with four rows below a folder, and a run that has trained on them into the platform's home folder.

    Returns:
        the run, whose config is that of `tiny_run`, and its shards.
    """
    shards = write_shards(folder / "shards", rows=4)
    run = write_run(platform.folder("runs") / "tiny-0123", tiny_run(), shards, shards)
    finish_run(run)
    return run, shards


def finish_run(run: RunFolder, *, blind_gap: float = 0.5) -> None:
    """Write the last checkpoint, with random weights, and the result of a successful training."""
    import torch

    from vlm.factory import build_model

    tokenizer = text.load(run.tokenizer)
    torch.manual_seed(0)
    save_checkpoint(run.checkpoint(12), build_model(run.read_run().config.model, tokenizer.vocab_size), tokenizer)
    metrics = {"train/loss": 1.4, "val/loss": 1.5, "val/blind_gap": blind_gap}
    write_json(
        run.result,
        Result(status="ok", step=12, world_size=2, checkpoint=str(run.checkpoint(12)), metrics=metrics, seconds=1.0),
    )


MakeRun = Callable[..., RunFolder]
"""Function that writes and returns a run folder, given the folder's name, an optional fault and train settings."""


def runs_in(folder: Path, patch: pytest.MonkeyPatch) -> MakeRun:
    """Return a function that writes folders of tiny runs with common shards; ranks can import tests/support."""
    patch.setenv("PYTHONPATH", TEST_PATH)
    train, validate = write_shards(folder / "train", rows=21), write_shards(folder / "val", rows=6)

    def make(name: str = "run", fault: Config | None = None, **settings: Any) -> RunFolder:
        run = write_run(folder / name, tiny_run(**settings), train, validate)
        if fault:
            write_json(run.path / "fault.json", fault)
        return run

    return make
