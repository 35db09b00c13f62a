"""Data-parallel training with DDP or FSDP, and reductions of tensors over ranks.

DDP keeps the whole model on each rank and averages the gradients. FSDP keeps a shard of each parameter, gradient and
optimizer moment on each rank and gathers the parameters of one block at a time. FSDP is for models that do not fit into
the memory of a rank. DDP and FSDP compute the same training steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

Parallel = Literal["ddp", "fsdp"]


def world_size() -> int:
    """Return the number of ranks in the process group, or 1 without a process group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a model in DDP if there are several ranks. A sharded model is returned unchanged."""
    if world_size() == 1 or isinstance(model, FSDPModule):
        return model
    on_gpu = device.type == "cuda"
    # Every trainable parameter gets a gradient, so DDP need not search for unused parameters. However, without a search
    # for unused parameters, DDP rebuilds its gradient buckets after the first step. With three or more ranks, a resumed
    # run would therefore sum gradients in a different order than an uninterrupted run. On CPUs, the weights of a
    # resumed run and of an uninterrupted run must be equal bit for bit. The search for unused parameters has no
    # measurable cost on CPUs, so DDP searches for these parameters on CPUs.
    return DistributedDataParallel(
        model,
        device_ids=[device] if on_gpu else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=not on_gpu,
    )


def unwrap_ddp(model: nn.Module) -> nn.Module:
    """Return the model inside the wrapper of `wrap_ddp`."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def gradient_sync(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Enable or disable the reduction of gradients over ranks in the `with` block.

    While the reduction is disabled, each rank accumulates its own gradients."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        yield
    elif not enabled and isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on all ranks. All ranks must call this function together. Return a plain tensor
    unchanged.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def global_sum(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, as a new tensor."""
    total = values.detach().clone()
    if world_size() > 1:
        distributed.all_reduce(total)
    return total


def global_max(values: Tensor) -> Tensor:
    """Return the elementwise maximum of a tensor over all ranks, as a new tensor."""
    largest = values.detach().clone()
    if world_size() > 1:
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return largest


def from_rank_0(number: int, device: torch.device) -> int:
    """Return, on every rank, the number that rank 0 passes. All ranks must call this function together.

    Args:
        number: number that rank 0 sends; the numbers of all other ranks are ignored.
        device: device of the tensor that ranks exchange.
    """
    sent = torch.tensor(number, device=device)
    if world_size() > 1:
        distributed.broadcast(sent, src=0)
    return int(sent)


def to_host(values: Tensor) -> list[float]:
    """Copy a vector, which may be sharded, to the host. On a GPU, this call waits until earlier reductions are done."""
    return [float(value) for value in full_tensor(values).tolist()]
