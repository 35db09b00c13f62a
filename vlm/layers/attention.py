"""Multi-head self-attention and cross-attention, based on the fused kernel of torch.

Letters in tensor names: B batch, T query, S key, H heads, K kv heads, D head width, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.layers.cache import KVCache
from vlm.layers.position import Angles, apply_rotary


class Attention(nn.Module):
    """Self-attention with grouped key-value heads, rotary positions, a sliding window, a soft cap and a cache.

    One weight matrix computes queries, keys and values, in this order. The attention scores are multiplied by `scale`,
    which is 1 / sqrt(head_dim) by default.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        out_bias: bool,
        dropout: float,
        window: int | None = None,
        soft_cap: float | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.dropout, self.window, self.soft_cap = dropout, window, soft_cap
        self.scale = scale if scale is not None else head_dim**-0.5
        self.qkv = nn.Linear(width, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias)
        self.out = nn.Linear(num_heads * head_dim, width, bias=out_bias)

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
        """Compute attention from the positions of x to the cached positions and the positions of x.

        Args:
            x_BTW: input of the layer.
            mask: bool mask, broadcastable to (B, H, T, S), True where query t attends to key s; None to use `causal`.
            causal: True for causal attention if `mask` is None; False for attention from every position to every
                position.
            angles: rotary angles of the positions of x.
            cache: keys and values of earlier positions; this call adds the keys and values of the new positions.
            layer: index of this layer in the cache.
            last_only: True to compute only the output of the last position.

        Returns:
            Output of shape (B, T, W), or (B, 1, W) with `last_only`.
        """
        B, T, _ = x_BTW.shape
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q_BHTD, k_BKTD, v_BKTD = (
            part.view(B, T, -1, self.head_dim).transpose(1, 2)
            for part in self.qkv(x_BTW).split([n * self.head_dim for n in heads], dim=-1)
        )
        if angles is not None:
            q_BHTD, k_BKTD = apply_rotary(q_BHTD, angles), apply_rotary(k_BKTD, angles)
        if cache is not None:
            k_BKTD, v_BKTD = cache.extend(layer, k_BKTD, v_BKTD)
        if last_only:
            q_BHTD, T = q_BHTD[:, :, -1:], 1
            mask = mask[:, :, -1:] if mask is not None else None
        if mask is not None or T == 1:  # torch.compile needs a constant here, so this is an if statement
            causal = False
        if self.soft_cap is None:
            out_BHTD = F.scaled_dot_product_attention(
                q_BHTD,
                k_BKTD,
                v_BKTD,
                attn_mask=mask,
                is_causal=causal,
                dropout_p=self.dropout if self.training else 0.0,
                scale=self.scale,
                enable_gqa=self.num_kv_heads != self.num_heads,
            )
        else:
            out_BHTD = self._capped(q_BHTD, k_BKTD, v_BKTD, mask, causal=causal, soft_cap=self.soft_cap)
        return self.out(out_BHTD.transpose(1, 2).reshape(B, T, -1))

    def _capped(
        self,
        q_BHTD: Tensor,
        k_BKSD: Tensor,
        v_BKSD: Tensor,
        mask: Tensor | None,
        *,
        causal: bool,
        soft_cap: float,
    ) -> Tensor:
        """Compute attention with a soft cap, which the fused kernel does not support."""
        B, _, T, D = q_BHTD.shape
        grouped = q_BHTD.view(B, self.num_kv_heads, -1, T, D) * self.scale
        scores_BKGTS = soft_cap * torch.tanh(grouped @ k_BKSD[:, :, None].mT / soft_cap)
        if causal:
            mask = torch.ones(T, T, dtype=torch.bool, device=q_BHTD.device).tril()[None, None]
        if mask is not None:
            scores_BKGTS = scores_BKGTS.masked_fill(~mask[:, :, None], -torch.inf)
        weights_BKGTS = torch.softmax(scores_BKGTS, dim=-1, dtype=torch.float32).to(v_BKSD.dtype)
        weights_BKGTS = F.dropout(weights_BKGTS, self.dropout, self.training)
        return (weights_BKGTS @ v_BKSD[:, :, None]).flatten(1, 2)


class CrossAttention(nn.Module):
    """Cross-attention from x (B, T, width) to a memory (B, S, memory_width), with output (B, T, width)."""

    def __init__(self, width: int, memory_width: int, *, num_heads: int, head_dim: int, bias: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(width, num_heads * head_dim, bias=bias)
        self.kv = nn.Linear(memory_width, 2 * num_heads * head_dim, bias=bias)
        self.out = nn.Linear(num_heads * head_dim, width, bias=bias)

    def keys_values(self, memory_BSW: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys (B, H, S, D) and values (B, H, S, D) of the memory, which can be reused for later queries."""
        B, S, _ = memory_BSW.shape
        k_BSE, v_BSE = self.kv(memory_BSW).chunk(2, dim=-1)
        k_BHSD, v_BHSD = (part.view(B, S, -1, self.head_dim).transpose(1, 2) for part in (k_BSE, v_BSE))
        return k_BHSD, v_BHSD

    def forward(self, x_BTW: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """Compute attention from x to a memory, given its keys and values. The mask works as in `Attention.forward`."""
        B, T, _ = x_BTW.shape
        q_BHTD = self.q(x_BTW).view(B, T, -1, self.head_dim).transpose(1, 2)
        out_BHTD = F.scaled_dot_product_attention(q_BHTD, *keys_values, attn_mask=mask)
        return self.out(out_BHTD.transpose(1, 2).reshape(B, T, -1))
