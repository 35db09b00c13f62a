"""The language model: blocks over a sequence of embeddings, whatever they stand for.

Letters: B batch, T positions, W width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vlm.cache import KVCache
from vlm.layers.block import Block


class Decoder(nn.Module):
    """Token table, learned positions (None when rotary), blocks, norm, output head."""

    def __init__(
        self,
        tokens: nn.Embedding,
        position: nn.Embedding | None,
        blocks: Sequence[Block],
        norm: nn.Module,
        head: nn.Linear,
        *,
        dropout: float,
    ) -> None:
        super().__init__()
        self.tokens, self.position = tokens, position
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = norm, head

    def forward(self, x_BTW: Tensor, *, mask: Tensor | None, cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, T, W), normalised, ready for `head`. Positions go on where the cache ends.

        Without a mask attention is causal.
        """
        T = x_BTW.shape[1]
        if self.position is not None:
            start = cache.length if cache is not None else 0
            x_BTW = x_BTW + self.position.weight[start : start + T]
        x_BTW = self.dropout(x_BTW)
        for layer, block in enumerate(self.blocks):
            x_BTW = block(x_BTW, mask=mask, causal=True, cache=cache, layer=layer)
        if cache is not None:
            cache.advance(T)
        return self.norm(x_BTW)
