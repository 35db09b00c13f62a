"""The pre-norm transformer block, the same for encoder and decoder."""

from __future__ import annotations

from torch import Tensor, nn

from vlm.cache import KVCache
from vlm.layers.attention import Attention


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the residual stream is never normalised in place."""

    def __init__(
        self, attention: Attention, mlp: nn.Module, attention_norm: nn.Module, mlp_norm: nn.Module, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_BTW: Tensor, *, mask: Tensor | None, causal: bool, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """One block; arguments as in `Attention.forward`."""
        seen = self.attention(self.attention_norm(x_BTW), mask=mask, causal=causal, cache=cache, layer=layer)
        x_BTW = x_BTW + self.dropout(seen)
        return x_BTW + self.dropout(self.mlp(self.mlp_norm(x_BTW)))
