"""Decoder, a transformer that reads the embeddings of pictures and tokens and predicts the next token.

Letters in tensor names: batch (B), positions (T), key positions (S), width (W), vocabulary (V).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlm.fusion import GatedCrossBlock, Media
from vlm.layers.block import Block
from vlm.layers.cache import KVCache
from vlm.layers.mask import apply_window
from vlm.layers.position import Angles, Rotary


class Decoder(nn.Module):
    """Transformer with token embeddings, learned or rotary positions, blocks, a final norm and an output head.

    In a model with cross-attention, a gated cross-attention block runs before every n-th block, starting with the first
    block.
    """

    def __init__(
        self,
        tokens: nn.Embedding,
        blocks: Sequence[Block],
        norm: nn.Module,
        head: nn.Linear,
        *,
        position: nn.Embedding | None,
        rotary: Rotary | None,
        dropout: float,
        embedding_scale: float = 1.0,
        soft_cap: float | None = None,
        cross_blocks: Sequence[GatedCrossBlock] = (),
    ) -> None:
        super().__init__()
        self.tokens, self.position, self.rotary = tokens, position, rotary
        self.embedding_scale, self.soft_cap = embedding_scale, soft_cap
        self.dropout = nn.Dropout(dropout)
        self.windows = [block.attention.window for block in blocks]
        self.blocks = nn.ModuleList(blocks)
        self.cross_blocks = nn.ModuleList(cross_blocks)
        self.norm, self.head = norm, head

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (..., W) of token ids. An image slot has a negative id and gets an arbitrary finite
        vector, which the fusion later replaces.
        """
        vectors = self.tokens(tokens.clamp(min=0))
        return vectors * self.embedding_scale if self.embedding_scale != 1 else vectors

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits (..., V) of hidden states, and apply the soft cap if the model has a soft cap."""
        logits = self.head(hidden)
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)

    def forward(
        self,
        x_BTW: Tensor,
        *,
        mask: Tensor | None,
        positions_BT: Tensor | None = None,
        media: Media | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Compute the hidden states (B, T, W) after the final norm, which are the input of `logits`.

        Args:
            x_BTW: embeddings of the new positions.
            mask: bool mask (B, 1, T, S), True where query t attends to key s, or None for a causal mask.
            positions_BT: position of each token, or None if the new positions of every row follow the cached positions.
            media: picture features for cross-attention. None if the cache already has the keys and values of the
                pictures, or if the model has no cross-attention.
            cache: keys and values of earlier positions; this call adds the keys and values of the new positions.
            last_only: whether to return only the hidden state of the last position, with shape (B, 1, W).
        """
        T = x_BTW.shape[1]
        start = cache.length if cache is not None else 0
        positions = positions_BT if positions_BT is not None else slice(start, start + T)
        if self.position is not None:
            x_BTW = x_BTW + self.position.weight[positions]
        angles: Angles | None = self.rotary(positions, x_BTW.dtype) if self.rotary is not None else None
        masks = self._masks(mask, x_BTW, start + T)
        if media is not None and cache is not None:
            cache.media = [self._cross_block(i).keys_values(media) for i in range(len(self.cross_blocks))]
            cache.media_mask = media.mask_BTS[:, None, -1:]
        x_BTW = self.dropout(x_BTW)
        every = len(self.blocks) // len(self.cross_blocks) if len(self.cross_blocks) else 0
        for layer, block in enumerate(self.blocks):
            if every and layer % every == 0:
                x_BTW = self._cross_attend(x_BTW, layer // every, media, cache)
            x_BTW = block(
                x_BTW,
                mask=masks[self.windows[layer]],
                causal=True,
                angles=angles,
                cache=cache,
                layer=layer,
                last_only=last_only and layer == len(self.blocks) - 1,
            )
        if cache is not None:
            cache.advance(T)
        return self.norm(x_BTW)

    def _masks(self, mask: Tensor | None, x_BTW: Tensor, keys: int) -> dict[int | None, Tensor | None]:
        """Build one attention mask for each window size that occurs in the blocks, and return a dict from size
        to mask.
        """
        masks: dict[int | None, Tensor | None] = {}
        for window in set(self.windows):
            if window is None or keys <= window:
                masks[window] = mask
            else:
                masks[window] = apply_window(mask, window, queries=x_BTW.shape[1], keys=keys, device=x_BTW.device)
        return masks

    def _cross_attend(self, x_BTW: Tensor, index: int, media: Media | None, cache: KVCache | None) -> Tensor:
        block = self._cross_block(index)
        if cache is not None:
            assert cache.media_mask is not None, "the first pass with a cache needs the pictures"
            mask = media.mask_BTS[:, None] if media is not None else cache.media_mask
            return block(x_BTW, cache.media[index], mask)
        assert media is not None, "cross-attention needs pictures"
        return block(x_BTW, block.keys_values(media), media.mask_BTS[:, None])

    def _cross_block(self, index: int) -> GatedCrossBlock:
        block = self.cross_blocks[index]
        assert isinstance(block, GatedCrossBlock)
        return block
