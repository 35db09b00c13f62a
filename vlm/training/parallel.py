"""Ranks, as the training loop sees them: gradients averaged, sums taken over all of them.

DDP keeps all of the model on each rank and adds up gradients. FSDP keeps a slice of each parameter, gradient and moment
on each rank and gathers a block's parameters when it is their turn: for models that do not fit otherwise. Both compute
the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vlm.layers.block import iterate_blocks

Parallel = Literal["ddp", "fsdp"]


def world_size() -> int:
    """Ranks of the running group; 1 without one."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def shard_parameters(model: nn.Module) -> None:
    """Leave each rank its slice of every parameter, in place; a rank alone keeps all.

    After this the model is called as before, on every rank at once; its own methods cannot be.
    """
    if world_size() == 1:
        return
    mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
    for block in iterate_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """The model under DDP where there are several ranks; a sharded one as it is."""
    if world_size() == 1 or isinstance(model, FSDPModule):
        return model
    on_gpu = device.type == "cuda"
    # Every parameter that learns has a gradient, so nobody need look for those without. But DDP groups gradients anew
    # after its first step unless it looks, and then with three ranks or more a resumed run adds them in another order
    # than the uninterrupted one did. On CPUs, where the two are equal bit for bit, looking costs nothing measurable.
    return DistributedDataParallel(
        model,
        device_ids=[device] if on_gpu else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=not on_gpu,
    )


def unwrap_ddp(model: nn.Module) -> nn.Module:
    """The model without what `wrap` put around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def gradient_sync(model: nn.Module, *, here: bool) -> Iterator[None]:
    """Add up gradients on each rank alone while the block runs, or over all ranks where `here` is false."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not here)
        yield
    elif here and isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that ranks hold slices of, from all of them; any other as it is. Every rank calls this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that every rank has, cut as another one of its shape is."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def global_sum(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks; a new tensor."""
    total = values.detach().clone()
    if world_size() > 1:
        distributed.all_reduce(total)
    return total


def global_max(values: Tensor) -> Tensor:
    """The largest values of a tensor on any rank; a new tensor."""
    largest = values.detach().clone()
    if world_size() > 1:
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return largest


def to_host(values: Tensor) -> list[float]:
    """The values of a vector that other ranks have a part in. On a GPU this, not the sum, is where a rank waits."""
    return [float(value) for value in full_tensor(values).tolist()]
