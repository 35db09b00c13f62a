"""Optimizer state and step number of a training checkpoint, stored as safetensors and JSON.

training.safetensors   optimizer state; the name of each tensor is `<parameter>:<key>`
training.json          number of the next step

A checkpoint is written from a copy of the tensors (a snapshot), so that training can continue during the write.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm.checkpoint import TensorRows
from vlm.errors import CheckpointError
from vlm.files import read_training_step, write_training_step
from vlm.training.sharded import rows_of, shard_rows, written_tensors

STATE = "training.safetensors"


@dataclass(frozen=True)
class TrainingSnapshot:
    """Copy of the training state in host memory. Later training steps do not change the copy.

    If the model is sharded, the copy of a rank holds only the tensors and rows that `written_tensors` selects.

    Attributes:
        weights: weights of the whole model or of its adapter, as a dict from name to tensor.
        state: tensors of the optimizer state; each name has the form `<parameter>:<key>`, such as
            `decoder.norm.weight:exp_avg`.
        step: number of completed steps, which is also the number of the next step.
    """

    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    step: int


def snapshot_training(
    weights: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> TrainingSnapshot:
    """Copy the weights and the optimizer state that this rank writes (`written_tensors`) to host memory.

    Args:
        weights: weights to copy, as a dict from name to tensor, such as the result of `model_weights(model)`.
        model: model without its DDP wrapper.
        optimizer: optimizer that updates the model's parameters.
        step: number of completed steps.
    """
    return TrainingSnapshot(_copy_to_host(weights), _copy_to_host(_optimizer_tensors(model, optimizer)), step)


def save_state(folder: Path, snapshot: TrainingSnapshot) -> None:
    """Write the optimizer state and the number of the next step into a folder."""
    save_file(snapshot.state, folder / STATE)
    write_training_step(folder, snapshot.step)


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the optimizer state of a training checkpoint, and return the number of the next step.

    Raises:
        CheckpointError: the training state cannot be read.
    """
    names = {parameter: name for name, parameter in _parameters(model).items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    packed = optimizer.state_dict()
    try:
        step = read_training_step(folder)
        with safe_open(folder / STATE, framework="pt") as file:
            keys = _keys_by_parameter(file.keys())
            packed["state"] = {
                index: {key: _read_state(file, f"{names[p]}:{key}", p) for key in keys.get(names[p], ())}
                for index, p in enumerate(parameters)
            }
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            "the training state cannot be read",
            where=str(folder),
            got=f"{type(error).__name__}: {error}",
            fix="remove this folder to continue from an earlier checkpoint",
        ) from None
    optimizer.load_state_dict(packed)  # load_state_dict also moves each tensor to its parameter's device
    return step


def _keys_by_parameter(names: Iterable[str]) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = {}
    for name in names:
        parameter, _, key = name.rpartition(":")
        keys.setdefault(parameter, []).append(key)
    return keys


def _read_state(file: Any, name: str, parameter: nn.Parameter) -> Tensor:
    """Read a tensor of the optimizer state from an open safetensors file.

    If the parameter is sharded and the tensor has the parameter's shape, read only the rows of this rank."""
    part, stored = rows_of(parameter.detach()), file.get_slice(name)
    if not isinstance(part, TensorRows) or tuple(stored.get_shape()) != tuple(part.shape):
        return file.get_tensor(name)
    rows = stored[part.first : part.first + len(part.rows)] if len(part.rows) else torch.empty_like(part.rows)
    return shard_rows(rows.to(part.rows.device, copy=True), parameter)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return a dict from `<parameter>:<key>` to each tensor of the optimizer state. The state of AdamW holds only
    tensors.
    """
    return {
        f"{name}:{key}": value.contiguous()
        for name, parameter in _parameters(model).items()
        if parameter in optimizer.state  # looking up the state of a frozen parameter would create a state
        for key, value in optimizer.state[parameter].items()
    }


def _copy_to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in written_tensors(tensors).items()}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())
