"""Transformer block of encoder and decoder, with optional recomputation and compilation in training."""

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
    """Block that computes x + attention(norm(x)) and then x + mlp(norm(x)).

    If `norms` has no second norm, attention and MLP are parallel: the block computes x + attention(norm(x)) +
    mlp(norm(x)).

    The outputs of attention and MLP can go through a second norm (`post_norms`) and a learned scale per channel, whose
    initial value is `layer_scale`. In training, each branch of each row is skipped with probability `skip_probability`.
    A branch that is not skipped is scaled up, so that the expected output stays the same (stochastic depth, Huang et
    al., 2016).

    Attributes:
        recompute: whether training stores only the input of the block and computes the block again in the backward
            pass.
        compiled: whether to run the block through torch.compile in training.
    """

    recompute = False
    compiled = False

    def __init__(
        self,
        attention: Attention,
        mlp: nn.Module,
        norms: tuple[nn.Module, nn.Module | None],
        dropout: float,
        *,
        width: int,
        post_norms: tuple[nn.Module, nn.Module] | None = None,
        layer_scale: float | None = None,
        skip_probability: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = norms[0], attention
        self.mlp_norm: nn.Module | None
        self.mlp_norm, self.mlp = norms[1], mlp
        self.attention_post_norm: nn.Module | None
        self.mlp_post_norm: nn.Module | None
        self.attention_post_norm, self.mlp_post_norm = post_norms or (None, None)
        self.attention_scale = (
            nn.Parameter(torch.full((width,), layer_scale, dtype=torch.float32)) if layer_scale else None
        )
        self.mlp_scale = nn.Parameter(torch.full((width,), layer_scale, dtype=torch.float32)) if layer_scale else None
        self.dropout = nn.Dropout(dropout)
        self.skip_probability = skip_probability

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
        """Apply the block. The arguments are the same as in `Attention.forward`."""
        function = _compiled_compute() if self.compiled and self.training else Block._compute
        compute = partial(
            function, self, mask=mask, causal=causal, angles=angles, cache=cache, layer=layer, last_only=last_only
        )
        if self.recompute and self.training:
            output: Tensor = checkpoint(compute, x_BTW, use_reentrant=False)
            return output
        return compute(x_BTW)

    def _compute(self, x_BTW: Tensor, *, last_only: bool, **options: Any) -> Tensor:
        normed_BTW = self.attention_norm(x_BTW)
        attended = self.attention(normed_BTW, last_only=last_only, **options)
        if last_only:
            x_BTW, normed_BTW = x_BTW[:, -1:], normed_BTW[:, -1:]
        x_BTW = x_BTW + self._finish_branch(attended, self.attention_post_norm, self.attention_scale)
        transformed = self.mlp(normed_BTW if self.mlp_norm is None else self.mlp_norm(x_BTW))
        return x_BTW + self._finish_branch(transformed, self.mlp_post_norm, self.mlp_scale)

    def _finish_branch(self, branch: Tensor, post_norm: nn.Module | None, scale: Tensor | None) -> Tensor:
        if post_norm is not None:
            branch = post_norm(branch)
        if scale is not None:
            branch = branch * scale
        if self.skip_probability and self.training:
            keep = 1 - self.skip_probability
            branch = branch * (branch.new_empty(len(branch), 1, 1).bernoulli_(keep) / keep)
        return self.dropout(branch)


def iterate_blocks(model: nn.Module) -> Iterator[Block]:
    """Iterate over the transformer blocks of the encoder and the decoder."""
    return (part for part in model.modules() if isinstance(part, Block))


def recompute_blocks(model: nn.Module) -> None:
    """Enable activation recomputation in all blocks (Chen et al., 2016).

    With recomputation, a training step needs about a third more FLOPs, but stores only the input of each block and the
    activations of one block.
    """
    for block in iterate_blocks(model):
        block.recompute = True


def compile_blocks(model: nn.Module) -> None:
    """Enable torch.compile for all blocks in training. The first use of a new input shape may start a compilation.

    Evaluation and generation run the blocks without torch.compile.
    """
    for block in iterate_blocks(model):
        block.compiled = True


@cache
def _compiled_compute() -> Callable[..., Tensor]:
    """Return the compiled `Block._compute`. All blocks share the compiled function, so blocks of equal shape share
    kernels.

    The function is compiled on first use, because importing the compiler is slow.
    """
    return torch.compile(Block._compute)
