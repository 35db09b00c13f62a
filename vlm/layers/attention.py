"""Multi-head self-attention and cross-attention, based on the fused kernel of torch.

The fused kernel returns no attention weights. `record_weights` makes layers compute the attention explicitly and keep
the weights.

Letters in tensor names: batch (B), queries (T), keys (S), heads (H), key-value heads (K), query heads of a key-value
head (G), width of a head (D), width (W).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.layers.cache import KVCache
from vlm.layers.position import Angles, apply_rotary


class Attention(nn.Module):
    """Self-attention with grouped key-value heads, rotary positions, a sliding window, a soft cap and a cache.

    One weight matrix computes queries, keys and values, in this order. The attention scores are multiplied by `scale`,
    which is 1 / sqrt(head_dim) by default. `qk_norms` normalise the queries and the keys of each head. The layer only
    stores `window`. The decoder reads `window`, and passes a mask that restricts the attention to the window.

    Attributes:
        recorded: list to which each forward pass appends its attention weights (B, H, T, S), or None to discard them.
    """

    recorded: list[Tensor] | None = None

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
        qk_norms: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.dropout, self.window, self.soft_cap = dropout, window, soft_cap
        self.scale = scale if scale is not None else head_dim**-0.5
        self.qkv = nn.Linear(width, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias)
        self.out = nn.Linear(num_heads * head_dim, width, bias=out_bias)
        self.q_norm: nn.Module | None
        self.k_norm: nn.Module | None
        self.q_norm, self.k_norm = qk_norms or (None, None)

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
            mask: tensor that broadcasts to (B, H, T, S), or None. A bool tensor is True where query t attends to key s.
                The numbers of a float tensor are added to the attention scores.
            causal: whether attention is causal if `mask` is None; if False, every position attends to every position.
            angles: rotary angles of the positions of x.
            cache: keys and values of earlier positions; this call adds the keys and values of the new positions.
            layer: index of this layer in the cache.
            last_only: whether to compute only the output of the last position.

        Returns:
            Output of shape (B, T, W), or (B, 1, W) with `last_only`.
        """
        B, T, _ = x_BTW.shape
        q_BHTD, k_BKTD, v_BKTD = self._queries_keys_values(x_BTW)
        if angles is not None:
            q_BHTD, k_BKTD = apply_rotary(q_BHTD, angles), apply_rotary(k_BKTD, angles)
        if cache is not None:
            k_BKTD, v_BKTD = cache.extend(layer, k_BKTD, v_BKTD)
        if last_only:
            q_BHTD, T = q_BHTD[:, :, -1:], 1
            mask = mask[:, :, -1:] if mask is not None else None
        # torch.compile requires that `causal` is a constant, so an if statement sets it
        if mask is not None or T == 1:
            causal = False
        if self.soft_cap is None and self.recorded is None:
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
            weights_BHTS = attention_weights(q_BHTD, k_BKTD, mask, self.scale, self.soft_cap, causal=causal)
            if self.recorded is not None:
                self.recorded.append(weights_BHTS)
            weights_BHTS = F.dropout(weights_BHTS, self.dropout, self.training)
            out_BHTD = weighted_sum(weights_BHTS, v_BKTD)
        return self.out(out_BHTD.transpose(1, 2).reshape(B, T, -1))

    def _queries_keys_values(self, x_BTW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the queries (B, H, T, D), the keys (B, K, T, D) and the values (B, K, T, D)."""
        B, T, _ = x_BTW.shape
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q_BHTD, k_BKTD, v_BKTD = (
            part.view(B, T, -1, self.head_dim).transpose(1, 2)
            for part in self.qkv(x_BTW).split([n * self.head_dim for n in heads], dim=-1)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BHTD, k_BKTD = self.q_norm(q_BHTD), self.k_norm(k_BKTD)
        return q_BHTD, k_BKTD, v_BKTD


class CrossAttention(nn.Module):
    """Cross-attention from x (B, T, width) to a memory (B, S, memory_width), with output (B, T, width).

    Attributes:
        recorded: list to which each forward pass appends its attention weights (B, H, T, S), or None to discard them.
    """

    recorded: list[Tensor] | None = None

    def __init__(self, width: int, memory_width: int, *, num_heads: int, head_dim: int, bias: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(width, num_heads * head_dim, bias=bias)
        self.kv = nn.Linear(memory_width, 2 * num_heads * head_dim, bias=bias)
        self.out = nn.Linear(num_heads * head_dim, width, bias=bias)

    def keys_values(self, memory_BSW: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys (B, H, S, D) and values (B, H, S, D) of the memory. Later queries can use the same keys and
        values.
        """
        B, S, _ = memory_BSW.shape
        k_BSE, v_BSE = self.kv(memory_BSW).chunk(2, dim=-1)
        k_BHSD, v_BHSD = (part.view(B, S, -1, self.head_dim).transpose(1, 2) for part in (k_BSE, v_BSE))
        return k_BHSD, v_BHSD

    def forward(self, x_BTW: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """Compute attention from x to a memory, given its keys and values. `Attention.forward` describes `mask`."""
        B, T, _ = x_BTW.shape
        q_BHTD = self.q(x_BTW).view(B, T, -1, self.head_dim).transpose(1, 2)
        if self.recorded is None:
            out_BHTD = F.scaled_dot_product_attention(q_BHTD, *keys_values, attn_mask=mask)
        else:
            k_BHSD, v_BHSD = keys_values
            weights_BHTS = attention_weights(q_BHTD, k_BHSD, mask, self.head_dim**-0.5)
            self.recorded.append(weights_BHTS)
            out_BHTD = weighted_sum(weights_BHTS, v_BHSD)
        return self.out(out_BHTD.transpose(1, 2).reshape(B, T, -1))


def attention_weights(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    mask: Tensor | None,
    scale: float,
    soft_cap: float | None = None,
    *,
    causal: bool = False,
) -> Tensor:
    """Compute the attention weights (B, H, T, S). Each key-value head serves H / K adjacent query heads.

    Args:
        q_BHTD: queries.
        k_BKSD: keys.
        mask: mask as in `Attention.forward`, or None for all keys.
        scale: factor by which the scores are multiplied.
        soft_cap: bound of the scores, which tanh limits to (-soft_cap, soft_cap), or None for no limit.
        causal: whether attention is causal, which requires that `mask` is None.
    """
    B, H, T, D = q_BHTD.shape
    if causal:
        mask = torch.ones(T, T, dtype=torch.bool, device=q_BHTD.device).tril()
    q_BKGTD = q_BHTD.view(B, k_BKSD.shape[1], -1, T, D) * scale
    scores_BHTS = (q_BKGTD @ k_BKSD[:, :, None].mT).reshape(B, H, T, -1)
    if soft_cap is not None:
        scores_BHTS = soft_cap * torch.tanh(scores_BHTS / soft_cap)
    if mask is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores_BHTS + mask
    return torch.softmax(scores_BHTS, dim=-1, dtype=torch.float32).to(k_BKSD.dtype)


def weighted_sum(weights_BHTS: Tensor, v_BKSD: Tensor) -> Tensor:
    """Sum the values with the attention weights, and return the result (B, H, T, D)."""
    B, H, T, S = weights_BHTS.shape
    return (weights_BHTS.view(B, v_BKSD.shape[1], -1, T, S) @ v_BKSD[:, :, None]).view(B, H, T, -1)


@contextmanager
def record_weights(layers: Sequence[Attention | CrossAttention]) -> Iterator[list[list[Tensor]]]:
    """Make layers compute attention explicitly, and yield one list for each layer.

    In the `with` block, each forward pass of a layer appends attention weights (B, H, T, S) to the layer's list.
    """
    recorded: list[list[Tensor]] = [[] for _ in layers]
    for layer, weights in zip(layers, recorded, strict=True):
        layer.recorded = weights
    try:
        yield recorded
    finally:
        for layer in layers:
            layer.recorded = None
