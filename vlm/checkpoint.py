"""Model checkpoints, stored as safetensors and JSON. Loading a checkpoint never executes code from a file.

model.safetensors   every parameter; tied parameters are stored once, under their first name
                    the metadata of the file contains the version of this format (`lakesight_format`)
config.json         the ModelConfig as JSON
tokenizer.json      the tokenizer as JSON
files.json          size and SHA-256 of every other file in the folder, to detect incomplete writes and changed bytes;
                    only in training checkpoints

Names and shapes of the tensors must match the model exactly. It is an error if the file lacks a tensor of the model, or
if the model lacks a tensor of the file. The module `vlm.training.state` saves the optimizer state of a training
checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm import text
from vlm.config import ModelConfig, Precision, read_error_message
from vlm.errors import CheckpointError
from vlm.factory import construct_model
from vlm.files import MANIFEST, atomic_write, file_digest, find_damage, open_regular, read_small
from vlm.layers.meta import EmptyOnMeta, replace_parameters
from vlm.model import VisionLanguageModel
from vlm.precision import join_weight, set_compute_dtype, split_weight, weight_templates
from vlm.text.base import Tokenizer

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
ADAPTER = "adapter.safetensors"
MODEL_FILES = (WEIGHTS, CONFIG, TOKENIZER)
FORMAT_KEY, FORMAT = "lakesight_format", 2
"""Version of the checkpoint format. A file without a version counts as version 0.

In version 2 of the format, the learned query of `vision.select: attention` reads only the patches. In versions 0 and 1
of the format, the learned query also reads the class token and the registers.
"""
PRECISION_KEY = "lakesight_precision"
"""Key in the metadata of a file of converted weights. The value is the precision of the weights, such as int8."""


def save_model(folder: Path, model: VisionLanguageModel, tokenizer: Tokenizer) -> None:
    """Write the weights, the config and the tokenizer of a model into a folder. Create the folder if it is missing."""
    save_weights(folder, model_weights(model), model.config, tokenizer)


def save_weights(folder: Path, weights: Mapping[str, Tensor], config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Write the same files as `save_model`, from a dict of tensors in which tied weights appear once."""
    _write_weights(folder / WEIGHTS, weights, {FORMAT_KEY: str(FORMAT)})
    save_config(folder, config, tokenizer)


def _write_weights(path: Path, weights: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file. A process that has mapped the file before this write keeps the old weights."""
    with atomic_write(path) as temporary:
        save_file(dict(weights), temporary, metadata)


def save_config(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Write the config and the tokenizer of a model into a folder."""
    (folder / CONFIG).write_text(config.model_dump_json(indent=2), encoding="utf-8")
    text.save(tokenizer, folder / TOKENIZER)


def model_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a dict from name to parameter. Only a parameter that is not contiguous in memory is copied.

    Tied parameters appear once, as in `named_parameters`.
    """
    return {name: p.detach().contiguous() for name, p in model.named_parameters()}


def best_device() -> torch.device:
    """Return the current GPU as a torch device, or the CPU if this process has no GPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def find_checkpoint(folder: Path) -> Path:
    """Return the checkpoint folder inside a run folder or a model version's MLflow folder. Return any other folder,
    such as a checkpoint folder, unchanged.

    If a run folder contains several checkpoints, choose the checkpoint with the highest step number.

    Raises:
        CheckpointError: the checkpoint has an adapter, but no whole model.
    """
    steps = [path for path in folder.glob("checkpoints/step_*") if path.name.removeprefix("step_").isdigit()]
    logged = folder / "artifacts"
    found = logged if (logged / WEIGHTS).is_file() else folder
    if steps:
        found = max(steps, key=lambda path: int(path.name.removeprefix("step_")))
    if (found / ADAPTER).is_file() and not (found / WEIGHTS).is_file():
        raise CheckpointError(
            "the checkpoint has only an adapter, and no whole model",
            where=str(found),
            got=f"{ADAPTER} without {WEIGHTS}",
            fix="train the run to its last step: only the last checkpoint of a run with an adapter has a whole model",
        )
    return found


def load_model(folder: Path, device: torch.device | str = "cpu") -> tuple[VisionLanguageModel, Tokenizer]:
    """Load the model and the tokenizer of a checkpoint folder. The loaded model is in evaluation mode.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not match the config.
    """
    if (folder / WEIGHTS).is_file():
        check_format(folder / WEIGHTS)
    model, tokenizer = _construct_on_meta(folder)
    allocated = {
        name: torch.empty(weight.shape, dtype=torch.float32, device=device) for name, weight in model.named_parameters()
    }
    replace_parameters(model, allocated)
    load_weights(model.to(device), folder / WEIGHTS)
    return model.eval(), tokenizer


def map_model(folder: Path, precision: Precision = Precision.FP32) -> tuple[VisionLanguageModel, Tokenizer]:
    """Load a model on the CPU without copying its weights, which stay in the memory-mapped file.

    All processes that map the same file share one copy of the weights in memory. While a process uses the model, the
    file may be removed or replaced, but the bytes of the file must not change. The model is in evaluation mode.

    Args:
        folder: checkpoint folder, or folder of `save_converted`.
        precision: precision of the weights in the file, as `stored_precision` returns it.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not match the config and the precision.
        UserError: the precision needs a library that is not installed.
    """
    path = folder / WEIGHTS
    model, tokenizer = _construct_on_meta(folder)
    _check_pooling(path, check_format(path), model.config)
    templates = weight_templates(model, precision)
    expected = {key: part for name, weight in templates.items() for key, part in split_weight(name, weight).items()}
    _check_shapes(expected, path)
    with safe_open(path, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in expected}
    problems = [
        f"{name} has type {tensor.dtype}, expected {expected[name].dtype}"
        for name, tensor in stored.items()
        if tensor.dtype != expected[name].dtype
    ]
    if problems:
        raise _mismatch(path, problems)
    model.requires_grad_(not precision.quantized)
    replace_parameters(model, {name: join_weight(name, template, stored) for name, template in templates.items()})
    set_compute_dtype(model, precision)
    return model.eval(), tokenizer


def _construct_on_meta(folder: Path) -> tuple[VisionLanguageModel, Tokenizer]:
    """Construct the model of a checkpoint folder without allocating memory for the weights, and read the tokenizer."""
    config = load_config(folder)
    tokenizer = text.load(folder / TOKENIZER)
    with EmptyOnMeta(), torch.device("cpu"):
        return construct_model(config, tokenizer.vocab_size), tokenizer


def stored_precision(folder: Path) -> Precision | None:
    """Return the precision in which a model can use the weights of a folder without converting them.

    For the folder of `save_converted`, the result is the precision of the conversion. For any other folder, the result
    is fp32 if all weights are fp32, and None otherwise.

    Raises:
        CheckpointError: the weights cannot be read.
    """
    check_format(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        converted = (file.metadata() or {}).get(PRECISION_KEY)
        types = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    if converted is not None:
        return Precision(converted)
    return Precision.FP32 if types == {"F32"} else None


def save_converted(folder: Path, model: VisionLanguageModel, tokenizer: Tokenizer, precision: Precision) -> None:
    """Write a model with weights that `set_precision` has converted. `map_model` can load the model from the folder."""
    weights = {
        key: part.contiguous()
        for name, weight in model.named_parameters()
        for key, part in split_weight(name, weight.detach()).items()
    }
    _write_weights(folder / WEIGHTS, weights, {FORMAT_KEY: str(FORMAT), PRECISION_KEY: precision})
    save_config(folder, model.config, tokenizer)


def check_format(path: Path) -> int:
    """Check that this version of Lakesight can read a weights file, and return the file's format version.

    Raises:
        CheckpointError: a newer version of Lakesight wrote the file, or the file cannot be read.
    """
    try:
        open_regular(path).close()  # if the path is a pipe, safe_open would wait forever for a writer
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get(FORMAT_KEY, "0")
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    if not (found.isdecimal() and int(found) <= FORMAT):
        raise CheckpointError(
            "the checkpoint was written by a newer version of Lakesight",
            where=str(path),
            got=f"format {found}, and this version reads formats up to {FORMAT}",
            fix="install a newer version of Lakesight",
        )
    return int(found)


def _check_pooling(path: Path, version: int, config: ModelConfig) -> None:
    vision = config.vision
    if (
        not config.text_only
        and version < 2
        and vision.select == "attention"
        and (vision.class_token or vision.registers)
    ):
        raise CheckpointError(
            "the checkpoint is from an older version of Lakesight, in which attention pooling computed other features",
            where=str(path),
            got=f"format {version}, in which the pooling query also read the class token and the registers",
            fix="train the model again, or import its published weights again",
        )


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        "the weights cannot be read",
        where=str(path),
        got=str(error),
        fix="restore the file, which is damaged or not in safetensors format",
    )


def load_config(folder: Path) -> ModelConfig:
    """Read the config of a checkpoint folder.

    Raises:
        CheckpointError: the config file is missing or does not hold a valid model config.
    """
    try:
        return ModelConfig.model_validate_json(read_small(folder / CONFIG))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "the model's config cannot be read",
            where=str(folder / CONFIG),
            got=read_error_message(error, ModelConfig),
            fix="choose a checkpoint folder, which contains " + ", ".join(MODEL_FILES),
        ) from None


def load_weights(model: VisionLanguageModel, path: Path) -> None:
    """Load a safetensors file into a model. The file's tensors and the model's parameters must agree in name and shape.

    Raises:
        CheckpointError: the file cannot be read, or a tensor is missing, is unexpected or has the wrong shape; the
            message lists all tensors with such a problem.
    """
    fill_weights(model.config, model_weights(model), path)


def fill_weights(config: ModelConfig, weights: Mapping[str, Tensor | TensorRows], path: Path) -> None:
    """Check the format version of a weights file, and copy the weights into existing tensors with `fill_tensors`.

    Raises:
        CheckpointError: the file cannot be used, for one of the reasons that `load_weights` lists.
    """
    _check_pooling(path, check_format(path), config)
    fill_tensors(weights, path)


class TensorRows(NamedTuple):
    """Part of a sharded tensor: the rows (indices of the first dimension) that one rank stores.

    Attributes:
        rows: tensor of the consecutive rows that this rank stores; the tensor may have zero rows.
        shape: shape of the whole tensor.
        first: index of the first row of `rows`, counted in the whole tensor.
    """

    rows: Tensor
    shape: torch.Size
    first: int


def fill_tensors(tensors: Mapping[str, Tensor | TensorRows], path: Path) -> None:
    """Copy the tensors of a safetensors file into existing tensors of the same names and shapes, one by one.

    Args:
        tensors: dict from the name of a tensor to the tensor, whose values are overwritten in place. For a TensorRows,
            only the rows of this rank are read from the file.
        path: path of the safetensors file.

    Raises:
        CheckpointError: the file cannot be read, or a tensor is missing, is unexpected or has the wrong shape; the
            message lists all tensors with such a problem.
    """
    _check_shapes(tensors, path)
    with torch.no_grad(), safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            if isinstance(tensor, TensorRows):
                if len(tensor.rows):
                    tensor.rows.copy_(file.get_slice(name)[tensor.first : tensor.first + len(tensor.rows)])
            else:
                tensor.copy_(file.get_tensor(name))


def _check_shapes(tensors: Mapping[str, Tensor | TensorRows], path: Path) -> None:
    """Check that a file holds tensors with exactly these names and shapes."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    problems = [f"missing {name}" for name in tensors if name not in shapes]
    problems += [f"unexpected {name}" for name in shapes if name not in tensors]
    problems += [
        f"{name} has shape {shapes[name]}, the model needs {tuple(tensors[name].shape)}"
        for name in tensors
        if name in shapes and shapes[name] != tuple(tensors[name].shape)
    ]
    if problems:
        raise _mismatch(path, problems)


def _mismatch(path: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(
        "the weights do not match the model config",
        where=str(path),
        got=problems,
        fix="use the config that was saved with the weights",
    )


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` when the `with` block ends without an error.

    Before the rename, this function adds files.json to the folder and flushes every file to disk. If the host crashes,
    the new folder is therefore either complete or absent. An older folder of the same name is deleted before the
    rename, so a crash can leave a part of the older folder. Each call uses another temporary name, so that two
    processes never write into the same folder. The temporary folder, `.NAME.*.tmp`, remains only if the process is
    killed or the host crashes.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        written = sorted(temporary.iterdir())
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in written}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for path in (*written, temporary / MANIFEST):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def verify_folder(folder: Path) -> None:
    """Check the size and the SHA-256 of every file that is listed in the files.json of a folder.

    Raises:
        CheckpointError: files.json cannot be read, or a file is missing, truncated or changed; the message lists all
            these files.
    """
    if problems := find_damage(folder):
        raise CheckpointError(
            "the checkpoint is damaged",
            where=str(folder),
            got=problems,
            fix="remove this folder to continue from an earlier checkpoint",
        )
