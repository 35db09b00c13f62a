"""AdamW, its parameter groups and its schedules; what learns, how fast each part, and its average over steps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from vlm.config import ScheduleConfig
from vlm.errors import ConfigError

FREE = ("bias", "position", "_token")
"""How the names of parameters end that never decay, whatever their shape."""
AVERAGE = "average"
"""Of a parameter over steps, in the optimizer's state: it is saved, resumed and cut into slices with its moments."""


def set_trainable(model: nn.Module, rates: Mapping[str, float]) -> None:
    """Freeze what matches a pattern of rate zero, or no pattern; what else was frozen before learns again.

    Args:
        model: its parameters' names are matched, whole, with each pattern in turn; the first match counts.
        rates: learning rate by pattern.

    Raises:
        ConfigError: a pattern is the first match of no parameter.
    """
    matched = {name: _first_match(name, rates) for name, _ in model.named_parameters()}
    if idle := [pattern for pattern in rates if pattern not in matched.values()]:
        raise ConfigError(
            "a pattern is the first to match of no parameter",
            where="train.stages",
            got=", ".join(idle),
            fix="it must match a whole name, and come before a wider one; there are: "
            + ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in matched)),
        )
    for name, parameter in model.named_parameters():
        pattern = matched[name]
        parameter.requires_grad_(pattern is not None and rates[pattern] > 0)


def parameter_groups(
    model: nn.Module, weight_decay: float, rates: Mapping[str, float] | None = None
) -> list[dict[str, object]]:
    """What learns, two groups a rate: matrices decay; vectors (norms, biases), positions and token tables do not.

    Args:
        model: the parameters that need a gradient are grouped.
        weight_decay: of matrices.
        rates: learning rate by pattern, as in `set_trainable`; all the same without.

    Returns:
        Groups with `lr_share`: their learning rate in shares of the largest one.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in _trainable(model):
        is_matrix = parameter.ndim >= 2 and id(parameter) not in tables and not name.endswith(FREE)
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
    """AdamW (Loshchilov and Hutter, 2017), one fused kernel a group, over what learns."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay, rates), lr=lr, betas=betas, fused=True)


@torch.no_grad()
def update_average(optimizer: torch.optim.Optimizer, decay: float, step: int) -> None:
    """Take the weights after a step into their exponential moving average (Polyak and Juditsky, 1992).

    Args:
        optimizer: has just taken the step.
        decay: share of an average of many steps that stays. A young one moves faster, else it would be fresh weights.
        step: of this optimizer, from 0.
    """
    learning = [p for p in _learning(optimizer) if optimizer.state.get(p)]  # without state: it never had a gradient
    for parameter in learning:
        optimizer.state[parameter].setdefault(AVERAGE, parameter.detach().clone())
    averages = [optimizer.state[parameter][AVERAGE] for parameter in learning]
    torch._foreach_lerp_(averages, [p.detach() for p in learning], 1 - min(decay, (1 + step) / (10 + step)))


@torch.no_grad()
def swap_average(optimizer: torch.optim.Optimizer) -> None:
    """Exchange what learns with its average; what has none stays."""
    for parameter in _learning(optimizer):
        if AVERAGE in optimizer.state.get(parameter, ()):
            average = optimizer.state[parameter][AVERAGE]
            learned = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(learned)


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The model has its averaged weights inside the block, where they are kept, and the optimizer those that learn."""
    swap_average(optimizer)
    try:
        yield
    finally:
        swap_average(optimizer)


def schedule(config: ScheduleConfig, step: int, *, steps: int, warmup_steps: int) -> float:
    """Learning rate of a step in shares of its peak: a straight line up to it, then as the kind says.

    Args:
        config: the kind.
        step: 0 <= step < steps.
        steps: in all; the last one is at the floor.
        warmup_steps: the peak is at this step.
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


def _first_match(name: str, rates: Mapping[str, float]) -> str | None:
    return next((pattern for pattern in rates if re.fullmatch(pattern, name)), None)


def _learning(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
