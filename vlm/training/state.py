"""Optimizer state and step number of a training checkpoint, stored as safetensors and JSON.

training.safetensors   optimizer state; the name of each tensor is `<parameter>:<key>`
training.json          number of the next step

A checkpoint is written from a snapshot of its tensors, so that training can continue during the write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlm.errors import CheckpointError
from vlm.files import TRAINING_STEP, read_training_step
from vlm.training.parallel import full_tensor, shard_like

STATE = "training.safetensors"


@dataclass(frozen=True)
class TrainingSnapshot:
    """Copy of the training state in host memory. Later training steps do not change the copy.

    Attributes:
        weights: weights of the whole model or of its adapter, by name.
        state: tensors of the optimizer state, by names of the form `<parameter>:<key>`.
        step: number of completed steps, which is also the number of the next step.
    """

    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    step: int


def snapshot_training(
    weights: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> TrainingSnapshot:
    """Copy the weights and the optimizer state to host memory. If the model is sharded, all ranks must call this
    function.

    Args:
        weights: weights to copy, by name, such as the result of `model_weights(model)` for the whole model.
        model: model without its DDP wrapper.
        optimizer: optimizer of the model's parameters.
        step: number of completed steps.
    """
    return TrainingSnapshot(_copy_to_host(weights), _copy_to_host(_optimizer_tensors(model, optimizer)), step)


def save_state(folder: Path, snapshot: TrainingSnapshot) -> None:
    """Write the optimizer state and the number of the next step into a folder."""
    save_file(snapshot.state, folder / STATE)
    (folder / TRAINING_STEP).write_text(json.dumps({"step": snapshot.step}), encoding="utf-8")


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the optimizer state of a training checkpoint, and return the number of the next step.

    Raises:
        CheckpointError: the training state cannot be read.
    """
    try:
        state = load_file(folder / STATE)
        step = read_training_step(folder)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            "the training state cannot be read",
            where=str(folder),
            got=f"{type(error).__name__}: {error}",
            fix="remove this folder to continue from an earlier checkpoint",
        ) from None
    names = {parameter: name for name, parameter in _parameters(model).items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    packed = optimizer.state_dict()
    packed["state"] = {
        index: {key: shard_like(value, p) for key, value in _strip_prefix(f"{names[p]}:", state).items()}
        for index, p in enumerate(parameters)
    }
    optimizer.load_state_dict(packed)  # load_state_dict also moves each tensor to its parameter's device
    return step


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors of the optimizer state by names `<parameter>:<key>`. The state of AdamW holds only tensors."""
    return {
        f"{name}:{key}": value.contiguous()
        for name, parameter in _parameters(model).items()
        if parameter in optimizer.state  # looking up the state of a frozen parameter would create a state
        for key, value in optimizer.state[parameter].items()
    }


def _copy_to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: full_tensor(tensor.detach()).to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _strip_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())
