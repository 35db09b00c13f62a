"""Multi-head attention on torch's fused kernel, with grouped key-value heads, rotary positions and a cache.

Letters: B batch, T query, S key, H heads, K kv heads, D head width, W width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vlm.cache import KVCache
from vlm.layers.position import Rotary


class Attention(nn.Module):
    """Scaled dot-product attention; scores are divided by sqrt(head_dim), never by sqrt(width).

    Queries, keys and values come from one matrix, heads in that order.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        dropout: float,
        rotary: Rotary | None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.dropout = dropout
        self.qkv = nn.Linear(width, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias)
        self.out = nn.Linear(num_heads * head_dim, width, bias=bias)
        self.rotary = rotary

    def forward(
        self, x_BTW: Tensor, *, mask: Tensor | None, causal: bool, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """Attend.

        Args:
            x_BTW: input.
            mask: bool, broadcastable to (B, H, T, S), True where seen; None: all of the past and present.
            causal: a position sees itself and what came before (used when there is no mask).
            cache: keys and values of earlier positions, extended in place.
            layer: which layer of the cache is ours.

        Returns:
            (B, T, W).
        """
        B, T, _ = x_BTW.shape
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q_BHTD, k_BKTD, v_BKTD = (
            part.view(B, T, -1, self.head_dim).transpose(1, 2)
            for part in self.qkv(x_BTW).split([n * self.head_dim for n in heads], dim=-1)
        )
        start = cache.length if cache is not None else 0
        if self.rotary is not None:
            q_BHTD, k_BKTD = self.rotary(q_BHTD, start), self.rotary(k_BKTD, start)
        if cache is not None:
            k_BKTD, v_BKTD = cache.extend(layer, k_BKTD, v_BKTD)
        out_BHTD = F.scaled_dot_product_attention(
            q_BHTD,
            k_BKTD,
            v_BKTD,
            attn_mask=mask,
            is_causal=causal and mask is None and T > 1,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.out(out_BHTD.transpose(1, 2).reshape(B, T, -1))
