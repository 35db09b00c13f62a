"""What a training goes on from besides its weights: the optimizer's state and the step, as safetensors and JSON.

training.safetensors   optimizer state as `<parameter>:<key>`
training.json          the number of the next step

A training checkpoint is written from a copy of its tensors, so that training can go on meanwhile.
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
from vlm.training.parallel import full_tensor, shard_like

STATE, STEP = "training.safetensors", "training.json"


@dataclass(frozen=True)
class TrainingSnapshot:
    """What a training goes on from, in host memory of its own: the loop may take further steps while it is written.

    Attributes:
        weights: by name: of the whole model, or of the part of it that learns.
        state: of the optimizer, as `<parameter>:<key>`.
        step: steps taken, the number of the next step.
    """

    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    step: int


def snapshot_training(
    weights: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> TrainingSnapshot:
    """Copy weights and optimizer state as they are now, whole; every rank calls this where ranks hold slices.

    Args:
        weights: what of the model is to be kept; `model_weights(model)` is all of it.
        model: without its DDP wrapper.
        optimizer: over the model's parameters.
        step: steps taken.
    """
    return TrainingSnapshot(_on_host(weights), _on_host(_optimizer_tensors(model, optimizer)), step)


def save_state(folder: Path, copy: TrainingSnapshot) -> None:
    """Write what a training goes on with besides weights: the optimizer's state and the number of the next step."""
    save_file(copy.state, folder / STATE)
    (folder / STEP).write_text(json.dumps({"step": copy.step}), encoding="utf-8")


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Fill an optimizer from a training checkpoint; returns the number of the next step.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    try:
        state = load_file(folder / STATE)
        step = int(json.loads((folder / STEP).read_text(encoding="utf-8"))["step"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            "the training state cannot be read",
            where=str(folder),
            got=f"{type(error).__name__}: {error}",
            fix="resume from an earlier checkpoint: remove this folder",
        ) from None
    names = {parameter: name for name, parameter in _parameters(model).items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    packed = optimizer.state_dict()
    packed["state"] = {
        index: {key: shard_like(value, p) for key, value in _under(f"{names[p]}:", state).items()}
        for index, p in enumerate(parameters)
    }
    optimizer.load_state_dict(packed)  # moves each tensor to its parameter's device
    return step


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as `<parameter>:<key>` to tensor. AdamW's state is tensors only."""
    return {
        f"{name}:{key}": value.contiguous()
        for name, parameter in _parameters(model).items()
        if parameter in optimizer.state  # a frozen one has none, and asking would make it one
        for key, value in optimizer.state[parameter].items()
    }


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: full_tensor(tensor.detach()).to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())
