"""AdamW, its parameter groups and its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

FREE = ("bias", "position", "_token")
"""How the names of parameters end that never decay, whatever their shape."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices decay; vectors (norms, biases, stacks of biases), positions and token tables do not."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in _trainable(model):
        is_matrix = parameter.ndim >= 2 and id(parameter) not in tables and not name.endswith(FREE)
        (decayed if is_matrix else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def build_adamw(model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2017), one fused kernel a group."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, fused=True)


def cosine_lr(step: int, *, lr: float, steps: int, warmup_steps: int, final_lr_fraction: float) -> float:
    """Learning rate of a step: linear warmup, then half a cosine down to `lr * final_lr_fraction` at the last step."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return lr * (final_lr_fraction + (1 - final_lr_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
