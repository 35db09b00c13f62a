"""AdamW and its parameter groups, learning rate schedules, frozen parameters and the moving average of the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from vlm.config import ScheduleConfig
from vlm.errors import ConfigError

NO_DECAY_SUFFIXES = ("bias", "position", "_token", "frequency")
"""A parameter whose name ends with one of these suffixes has no weight decay, regardless of the parameter's shape."""
AVERAGE = "average"
"""Key of a parameter's moving average in the optimizer state.

Checkpoints and sharding treat the moving average in the same way as the AdamW moments."""


def set_trainable(model: nn.Module, rates: Mapping[str, float]) -> None:
    """Make a parameter trainable if the first pattern that matches its name has a rate above zero. Freeze all other
    parameters.

    Args:
        model: model whose parameters become trainable or frozen.
        rates: dict from a pattern to the learning rate of the parameters whose whole name matches the pattern; if
            several patterns match a name, the first pattern decides.

    Raises:
        ConfigError: a pattern has no effect (see `match_patterns`).
    """
    matched = match_patterns([name for name, _ in model.named_parameters()], rates)
    for name, parameter in model.named_parameters():
        pattern = matched[name]
        parameter.requires_grad_(pattern is not None and rates[pattern] > 0)


def match_patterns(names: Iterable[str], rates: Mapping[str, float]) -> dict[str, str | None]:
    """For each parameter name, find the first pattern of `rates` that matches the whole name.

    Returns:
        Dict from each parameter name to its pattern, or to None if no pattern matches the name.

    Raises:
        ConfigError: a pattern has no effect, because the pattern matches no parameter, or because an earlier pattern
        decides for all parameters that the pattern matches.
    """
    matched = {name: _first_match(name, rates) for name in names}
    if unused := [pattern for pattern in rates if pattern not in matched.values()]:
        raise ConfigError(
            "a pattern in train.stages has no effect, because it is not the first match of any parameter",
            where="train.stages",
            got=", ".join(unused),
            fix="put the pattern before wider patterns; the pattern must match the whole of one of these names: "
            + ", ".join(collapse_names(matched)),
        )
    return matched


def parameter_groups(
    model: nn.Module, weight_decay: float, rates: Mapping[str, float] | None = None
) -> list[dict[str, object]]:
    """Group the trainable parameters by learning rate and weight decay.

    Matrices and other tensors with at least two dimensions have weight decay. Vectors, such as the weights of norms,
    have no weight decay. Biases, embedding tables, position embeddings, rotary frequencies and the class token have no
    weight decay, whatever their dimensions.

    Args:
        model: model whose trainable parameters are grouped.
        weight_decay: weight decay of the parameters that have weight decay.
        rates: dict from a pattern to a learning rate, as in `set_trainable`, or None if all learning rates are equal.

    Returns:
        Parameter groups for the optimizer. `lr_share` is the learning rate of a group divided by the largest rate.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in _trainable(model):
        is_matrix = parameter.ndim >= 2 and id(parameter) not in tables and not name.endswith(NO_DECAY_SUFFIXES)
        pattern = _first_match(name, rates) if rates else None
        share = rates[pattern] / max(rates.values()) if rates and pattern else 1.0
        groups.setdefault((share, is_matrix), []).append(parameter)
    return [
        {"params": groups[share, decays], "weight_decay": weight_decay if decays else 0.0, "lr_share": share}
        for share, decays in sorted(groups, reverse=True)
    ]


def build_adamw(
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    rates: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """Build a fused AdamW (Loshchilov and Hutter, 2017) for the trainable parameters."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay, rates), lr=lr, betas=betas, fused=True)


@torch.no_grad()
def update_average(optimizer: torch.optim.Optimizer, decay: float, step: int) -> None:
    """Update the exponential moving average of the weights after a step (Polyak and Juditsky, 1992).

    Args:
        optimizer: optimizer that has just taken the step.
        decay: largest factor by which the old average is multiplied; the first steps use a smaller factor, so that the
            average forgets the model's initial weights.
        step: number of the step of this optimizer; the first step has number 0.
    """
    # A parameter that never had a gradient has no optimizer state and needs no average.
    parameters = [p for p in _parameters(optimizer) if optimizer.state.get(p)]
    for parameter in parameters:
        optimizer.state[parameter].setdefault(AVERAGE, parameter.detach().clone())
    averages = [optimizer.state[parameter][AVERAGE] for parameter in parameters]
    torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - min(decay, (1 + step) / (10 + step)))


@torch.no_grad()
def swap_average(optimizer: torch.optim.Optimizer) -> None:
    """Swap the value of each parameter with its moving average. A parameter without an average does not change."""
    for parameter in _parameters(optimizer):
        if AVERAGE in optimizer.state.get(parameter, ()):
            average = optimizer.state[parameter][AVERAGE]
            learned = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(learned)


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Use the averaged weights in the `with` block, and restore the trained weights afterwards.

    Inside the block, the optimizer state holds the trained weights in place of the averages.
    """
    swap_average(optimizer)
    try:
        yield
    finally:
        swap_average(optimizer)


def schedule(config: ScheduleConfig, step: int, *, steps: int, warmup_steps: int) -> float:
    """Return the learning rate of a step relative to the peak rate. Linear warm-up precedes the configured schedule.

    Args:
        config: config section with the kind and the parameters of the schedule.
        step: number of the step in its stage, 0 <= step < steps.
        steps: number of steps of the stage, or of a run without stages. The rate of the last step is `floor`.
            Exceptions are a constant schedule, and fewer than two steps after the warm-up.
        warmup_steps: number of warm-up steps; the last warm-up step and the step after the warm-up have the peak rate.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    match config.kind:
        case "cosine":
            return config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return 1 - (1 - config.floor) * progress
        case "constant":
            return 1.0
        case "warmup_stable_decay":
            return 1 - (1 - config.floor) * max(0.0, progress - (1 - config.decay)) / config.decay


def collapse_names(names: Iterable[str]) -> list[str]:
    """Replace block numbers in parameter names by N, and drop repeated names, so that a deep model is listed in few
    lines.
    """
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names))


def _first_match(name: str, rates: Mapping[str, float]) -> str | None:
    return next((pattern for pattern in rates if re.fullmatch(pattern, name)), None)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
