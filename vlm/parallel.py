"""Ranks, as the training loop sees them: gradients averaged by DDP, sums taken over all of them."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


def world_size() -> int:
    """Ranks of the running group; 1 without one."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model under DDP where there are several ranks."""
    if world_size() == 1:
        return model
    # Not static_graph: it regroups the gradients after the first step, so with three ranks or more a resumed run adds
    # them in another order than the uninterrupted one did.
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=True,
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model without what `wrap` put around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def global_sum(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks; a new tensor."""
    total = values.detach().clone()
    if world_size() > 1:
        distributed.all_reduce(total)
    return total


def to_host(values: Tensor) -> list[float]:
    """The values of a vector that other ranks have a part in. On a GPU this, not the sum, is where a rank waits."""
    return [float(value) for value in values.tolist()]
