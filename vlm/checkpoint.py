"""Weights on disk: safetensors and JSON, strict in both directions. Nothing here can execute what it loads.

model.safetensors   every parameter once (tied ones by their first name)
config.json         the ModelConfig
tokenizer.json      the tokenizer
files.json          size and SHA-256 of each other file, in training checkpoints only: it tells a checkpoint from what a
                    torn write, a full disk or a flipped bit has left

What a training checkpoint holds besides is in `vlm.training.state`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlm import text
from vlm.build import build_model
from vlm.config import Config, ModelConfig, read_error_message
from vlm.errors import CheckpointError
from vlm.files import file_digest
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
FILES = "files.json"
MODEL_FILES = (WEIGHTS, CONFIG, TOKENIZER)


def save_model(folder: Path, model: VisionLanguageModel, tokenizer: Tokenizer) -> None:
    """Write the three files a model is rebuilt from. The folder is created."""
    save_weights(folder, model_weights(model), model.config, tokenizer)


def save_weights(folder: Path, weights: Mapping[str, Tensor], config: ModelConfig, tokenizer: Tokenizer) -> None:
    """`save_model` of weights that have left their model, by name, tied ones once."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), folder / WEIGHTS)
    (folder / CONFIG).write_text(config.model_dump_json(indent=2), encoding="utf-8")
    text.save(tokenizer, folder / TOKENIZER)


def model_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, tied ones once (torch's `named_parameters` drops repeats); no copies."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters()}


def load_model(folder: Path, device: torch.device | str = "cpu") -> tuple[VisionLanguageModel, Tokenizer]:
    """The model of a checkpoint folder, in evaluation mode, and its tokenizer.

    Raises:
        CheckpointError: a file is missing or damaged, or weights and config do not match name by name.
    """
    config = load_config(folder)
    tokenizer = text.load(folder / TOKENIZER)
    with torch.random.fork_rng(devices=[]):  # the fresh weights are overwritten: leave the caller's generator alone
        model = build_model(config, tokenizer.vocab_size)
    load_weights(model, folder / WEIGHTS)
    return model.to(device).eval(), tokenizer


def load_config(folder: Path) -> ModelConfig:
    """The config of a checkpoint folder.

    Raises:
        CheckpointError: it is missing or not a model's config.
    """
    try:
        return ModelConfig.model_validate_json((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            "the model's config cannot be read",
            where=str(folder / CONFIG),
            got=read_error_message(error),
            fix="a checkpoint folder holds " + ", ".join(MODEL_FILES),
        ) from None


def load_weights(model: VisionLanguageModel, path: Path) -> None:
    """Fill a model from a safetensors file: every parameter, every key, equal shapes.

    Raises:
        CheckpointError: lists all that is missing, left over or of another shape.
    """
    fill_tensors(model_weights(model), path)


def fill_tensors(own: Mapping[str, Tensor], path: Path) -> None:
    """Copy a safetensors file into tensors of the same names and shapes: every tensor, every key.

    Raises:
        CheckpointError: lists all that is missing, left over or of another shape.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "the weights cannot be read", where=str(path), got=str(error), fix="the file is damaged or not safetensors"
        ) from None
    problems = [f"missing {name}" for name in own if name not in shapes]
    problems += [f"left over {name}" for name in shapes if name not in own]
    problems += [
        f"{name} has shape {shapes[name]}, the model {tuple(own[name].shape)}"
        for name in own
        if name in shapes and shapes[name] != tuple(own[name].shape)
    ]
    if problems:
        raise CheckpointError(
            "the weights are of another model",
            where=str(path),
            got="; ".join(problems),
            fix="use the config that was saved beside them",
        )
    loaded = load_file(path)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(loaded[name])


class ManifestEntry(Config):
    """One line of files.json."""

    bytes: int
    sha256: str


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder to write into; when the block ends well it takes `folder`'s name and place, with a files.json.

    All of it is on the disk before it has its name: a host that loses its power leaves a whole checkpoint, or none.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    written = sorted(temporary.iterdir())
    facts = {path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in written}
    (temporary / FILES).write_text(json.dumps(facts, indent=2), encoding="utf-8")
    for path in (*written, temporary / FILES):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def verify_folder(folder: Path) -> None:
    """Compare every file with what was written, byte for byte.

    Raises:
        CheckpointError: lists the files that are missing, cut or changed.
    """
    try:
        listed = json.loads((folder / FILES).read_text(encoding="utf-8"))
        problems = [
            found for name, facts in listed.items() if (found := _damage(folder / name, ManifestEntry(**facts)))
        ]
    except (OSError, ValueError, TypeError, AttributeError) as error:  # pydantic's and json's are ValueErrors
        problems = [f"{FILES} cannot be read ({type(error).__name__}: {error})"]
    if problems:
        raise CheckpointError(
            "the checkpoint is damaged",
            where=str(folder),
            got="; ".join(problems),
            fix="go on from an earlier one: remove this folder",
        )


def _damage(path: Path, facts: ManifestEntry) -> str:
    """What is wrong with a file; empty if nothing is."""
    if not path.is_file():
        return f"{path.name} is missing"
    if (size := path.stat().st_size) != facts.bytes:
        return f"{path.name} has {size} bytes, {facts.bytes} were written"
    return "" if file_digest(path) == facts.sha256 else f"{path.name} has other bytes than were written"
