"""Construction of models whose parameters are sharded over the ranks with FSDP, and access to the rows of the tensors.

A rank never holds the whole model. The model is constructed on the meta device, and each rank allocates only its rows
(indices of the first dimension) of each parameter. Initial weights are drawn one parameter at a time, with the same
random numbers as for a model that is not sharded. When weights and optimizer state are read or written, each rank reads
or writes only its rows of the sharded tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.overrides import TorchFunctionMode

from vlm.checkpoint import TensorRows
from vlm.config import ModelConfig
from vlm.factory import construct_model, initialize_weights
from vlm.layers.block import iterate_blocks
from vlm.layers.meta import RANDOM_INIT, EmptyOnMeta, draw_like, initialized_tensor
from vlm.model import VisionLanguageModel
from vlm.training.parallel import world_size

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
"""Layers of torch whose initial weights are ones and zeros. `initialize_weights` does not change the weights of these
layers.
"""


def build_sharded(config: ModelConfig, vocab_size: int, device: torch.device, *, draw: bool) -> VisionLanguageModel:
    """Build a model whose parameters are sharded over the ranks. All ranks must call this function together.

    Afterwards, all ranks must call the model together. Among the methods that use parameters, ranks may call only
    `forward`, `encode`, `prefill` and `step`. In any other method, each parameter would have only the rows of this
    rank.

    Args:
        config: config of the model.
        vocab_size: number of rows of the token embedding table.
        device: device of the model.
        draw: whether to initialize the weights from torch's global random generator. All ranks must use the same seed,
            so that the weights equal the weights that `build_model` draws. If `draw` is False, the caller must load
            weights.
    """
    with EmptyOnMeta(draw=draw):
        model = construct_model(config, vocab_size)
    mesh = init_device_mesh(device.type, (world_size(),))
    for block in iterate_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _allocate(model, device)
    if draw:
        for module in model.modules():
            if isinstance(module, NORMS):
                module.reset_parameters()
        with _DrawRows():
            initialize_weights(model)
    for name in ("encode", "prefill", "step"):
        register_fsdp_forward_method(model, name)
    # All ranks use the logits of rank 0, so that all ranks choose the same tokens and run equally many forward passes.
    for name in ("prefill", "step"):
        setattr(model, name, _with_values_of_rank_0(getattr(model, name)))
    return model


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Allocate meta tensors on a device, and move the other tensors to the device."""
    model._apply(  # type: ignore[no-untyped-call]
        lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
    )


class _DrawRows(TorchFunctionMode):
    """Context in which random initialisation draws a whole sharded tensor, and keeps only the rows of this rank."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in RANDOM_INIT or not isinstance(tensor := initialized_tensor(args, kwargs), DTensor):
            return func(*args, **kwargs)
        drawn = draw_like(tensor, func, args, kwargs)
        part = rows_of(tensor.detach())
        assert isinstance(part, TensorRows)
        part.rows.copy_(drawn[part.first : part.first + len(part.rows)])
        return tensor


def _with_values_of_rank_0(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        logits_BV = method(*args, **kwargs).contiguous()
        distributed.broadcast(logits_BV, src=0)
        return logits_BV

    return call


def rows_of(tensor: Tensor) -> Tensor | TensorRows:
    """Return this rank's rows of a sharded tensor, without a copy. If the tensor is not sharded, return it
    unchanged."""
    if not isinstance(tensor, DTensor):
        return tensor
    assert tensor.placements == (Shard(0),), "parameters are sharded along their first dimension, by this module"
    per_rank = -(-tensor.shape[0] // tensor.device_mesh.size())
    first = min(per_rank * tensor.device_mesh.get_local_rank(), tensor.shape[0])
    return TensorRows(tensor.to_local(), tensor.shape, first)


def shard_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Join the rows of all ranks into a sharded tensor that has the shape and the sharding of the tensor `like`."""
    assert isinstance(like, DTensor)
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def written_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select, without copying, the tensors that this rank writes into its part of a checkpoint.

    Each rank writes its rows of each sharded tensor, and rank 0 also writes all tensors that are not sharded. Without a
    process group, this process writes all tensors.
    """
    writes_plain = not distributed.is_initialized() or distributed.get_rank() == 0
    return {
        name: part.rows if isinstance(part, TensorRows) else part
        for name, part in ((name, rows_of(tensor.detach())) for name, tensor in tensors.items())
        if writes_plain or isinstance(part, TensorRows)
    }
