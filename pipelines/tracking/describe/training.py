"""Description of a training run in MLflow: tags, parameters, datasets, and the text of the run's page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Param, Run, RunTag

from pipelines.config import RunConfig
from pipelines.formats.run_folder import RunFile, RunFolder
from pipelines.formats.shards import Manifest, Shards
from pipelines.platform import Platform
from pipelines.tracking.describe.datasets import shard_input
from pipelines.tracking.describe.figures import LEARNING_CURVE
from pipelines.tracking.describe.names import changed_settings, repeat_command
from pipelines.tracking.describe.notes import NOTE, code_block, picture, put_sections, read_sections, run_link

MAX_PARAM_CHARS = 500  # all tracking servers accept a parameter of this length
TRAINING = "Training"


def describe_training(client: MlflowClient, tracked: Run, run: RunFolder, config: RunConfig) -> None:
    """Log tags, run.json, datasets, the description, and the parameters that the MLflow run does not have yet.

    Parameters are immutable in MLflow.
    """
    run_id, file = tracked.info.run_id, run.read_run()
    manifests = {
        "training": Shards(run.shard_folder(file.train_shards)).manifest,
        "validation": Shards(run.shard_folder(file.validate_shards)).manifest,
    }
    params = {key: value[:MAX_PARAM_CHARS] for key, value in flatten(json.loads(config.to_json())).items()}
    tags = {
        "lakesight.run": config.name,
        "lakesight.run_folder": str(run.path),
        **{f"lakesight.{name}": value for name, value in file.code_tags().items()},
        "lakesight.content_hash": file.content_hash,
        NOTE: put_sections(
            tracked.data.tags.get(NOTE, ""), {TRAINING: training_text(config, file, manifests["training"])}
        ),
    }
    client.log_batch(
        run_id,
        params=[Param(key, value) for key, value in params.items() if key not in tracked.data.params],
        tags=[RunTag(key, value) for key, value in tags.items()],
    )
    client.log_artifact(run_id, str(run.run_file))
    client.log_inputs(run_id, [shard_input(manifest, context) for context, manifest in manifests.items()])


def show_learning_curve(client: MlflowClient, platform: Platform, run_id: str) -> None:
    """Add the learning curve, which is an artifact of a run, to the description of the run."""
    if shown := picture(platform, run_id, LEARNING_CURVE):
        add_sections(client, run_id, {"Learning curve": shown})


def add_sections(client: MlflowClient, run_id: str, sections: Mapping[str, str]) -> None:
    """Replace or append sections in the description of a run."""
    note = client.get_run(run_id).data.tags.get(NOTE, "")
    client.set_tag(run_id, NOTE, put_sections(note, sections))


def version_text(client: MlflowClient, platform: Platform, run_id: str, step: int) -> str:
    """Return the description of a new model version: step, link to the run, and the training section of the run."""
    tracked = client.get_run(run_id)
    link = run_link(platform, tracked.info.run_name, tracked.info.experiment_id, run_id)
    text = read_sections(tracked.data.tags.get(NOTE, "")).get(TRAINING, "")
    return put_sections("", {TRAINING: f"Step {step:,} of the run {link}.\n\n{text}"})


def training_text(config: RunConfig, file: RunFile, manifest: Manifest) -> str:
    """Describe a training in Markdown: model, data, steps, changed settings, and the command that repeats the run."""
    request, train = manifest.request, config.train
    start = "from scratch" if train.start_from is None else f"from {train.start_from}"
    ranks = f"{file.world_size} rank{'s' * (file.world_size > 1)}"
    rows, batch = ("texts", "windows") if config.model.text_only else ("pictures", "pictures")
    changes = ", ".join(f"`{key}={value}`" for key, value in changed_settings(config).items())
    sources = f"{manifest.num_rows:,} {rows} of source **{request.source}**"
    if manifest.parts:
        parts = (f"{part.rows:,} of **{part.source}** ({part.draws:,} drawn per epoch)" for part in manifest.parts)
        sources = f"{manifest.num_rows:,} {rows}: {', '.join(parts)}"
    steps = f"at most {train.steps:,}" if train.stop is not None else f"{train.steps:,}"
    return "\n\n".join(
        [
            f"Model **{config.chosen.model}**, trained {start} on {sources} "
            f"(table `{request.table}`, version {file.dataset_version}): {steps} steps of "
            f"{train.batch_size} {batch}, seed {train.seed}, {ranks}.",
            f"Changed settings: {changes or 'none'}",
            code_block(repeat_command(config)),
        ]
    )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten a nested mapping to a dict, whose keys are dotted names such as `train.steps`, and whose values are
    texts."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: str(value)}
    return flat
