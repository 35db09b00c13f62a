"""The pre-norm transformer block, the same for encoder and decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm.layers.attention import Attention
from vlm.layers.cache import KVCache
from vlm.layers.position import Angles


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the residual stream is never normalised in place.

    A branch's output may pass a second norm (`post_norms`, one a branch) and a learned factor a channel that starts
    from `layer_scale`.

    Attributes:
        recompute: in training, keep a block's input alone and compute the block once more in the backward pass.
        compiled: in training, compute with kernels that torch makes for it.
    """

    recompute = False
    compiled = False

    def __init__(
        self,
        attention: Attention,
        mlp: nn.Module,
        norms: tuple[nn.Module, nn.Module],
        dropout: float,
        *,
        width: int,
        post_norms: tuple[nn.Module, nn.Module] | None = None,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = norms[0], attention
        self.mlp_norm, self.mlp = norms[1], mlp
        self.attention_post_norm: nn.Module | None
        self.mlp_post_norm: nn.Module | None
        self.attention_post_norm, self.mlp_post_norm = post_norms or (None, None)
        self.attention_scale = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None
        self.mlp_scale = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BTW: Tensor,
        *,
        mask: Tensor | None,
        causal: bool,
        angles: Angles | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        last_only: bool = False,
    ) -> Tensor:
        """One block; arguments as in `Attention.forward`."""
        kernels = _compiled() if self.compiled and self.training else Block._compute
        compute = partial(
            kernels, self, mask=mask, causal=causal, angles=angles, cache=cache, layer=layer, last_only=last_only
        )
        if self.recompute and self.training:
            again: Tensor = checkpoint(compute, x_BTW, use_reentrant=False)
            return again
        return compute(x_BTW)

    def _compute(self, x_BTW: Tensor, *, last_only: bool, **how: Any) -> Tensor:
        seen = self.attention(self.attention_norm(x_BTW), last_only=last_only, **how)
        if last_only:
            x_BTW = x_BTW[:, -1:]
        x_BTW = x_BTW + self._finish(seen, self.attention_post_norm, self.attention_scale)
        thought = self.mlp(self.mlp_norm(x_BTW))
        return x_BTW + self._finish(thought, self.mlp_post_norm, self.mlp_scale)

    def _finish(self, branch: Tensor, post_norm: nn.Module | None, scale: Tensor | None) -> Tensor:
        if post_norm is not None:
            branch = post_norm(branch)
        if scale is not None:
            branch = branch * scale
        return self.dropout(branch)


def iterate_blocks(model: nn.Module) -> Iterator[Block]:
    """All blocks of a model, the encoder's and the decoder's."""
    return (part for part in model.modules() if isinstance(part, Block))


def recompute_blocks(model: nn.Module) -> None:
    """Trade time for memory in all blocks of a model (Chen et al., 2016): about a third more compute, a block's
    activations at a time."""
    for block in iterate_blocks(model):
        block.recompute = True


def compile_blocks(model: nn.Module) -> None:
    """Have torch.compile make kernels for the training of all blocks of a model, when each shape is first met.

    What is no training (validation, captions with their caches) stays as it is.
    """
    for block in iterate_blocks(model):
        block.compiled = True


@cache
def _compiled() -> Callable[..., Tensor]:
    """One for all blocks: blocks of a shape share their kernels. Made when it is needed, as the compiler is large."""
    return torch.compile(Block._compute)
