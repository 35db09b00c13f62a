"""Key-value cache for generation. The caller creates the cache, and the model fills the cache.

Letters in tensor names: batch (B), key-value heads (K), key positions (S), width of a head (D).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of all layers for up to `context` positions.

    The cache stores 2 * depth * B * K * context * D numbers.

    Attributes:
        length: number of stored positions, which is the same in all rows.
        padding_B: number of padding positions at the start of each row, or None if no row is padded.
        media: keys and values of the pictures for each cross-attention block; empty without cross-attention.
        media_mask: bool mask, broadcastable to (B, H, 1, S), True for the picture features that later tokens attend to;
            None without cross-attention.
    """

    def __init__(
        self,
        *,
        depth: int,
        batch: int,
        num_kv_heads: int,
        context: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (depth, batch, num_kv_heads, context, head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.padding_B: Tensor | None = None
        self.media: list[tuple[Tensor, Tensor]] = []
        self.media_mask: Tensor | None = None

    def extend(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values of a layer, and return all keys (B, K, S, D) and values (B, K, S, D) of that layer.

        The caller calls `advance` once after all layers have stored their new positions.
        """
        end = self.length + k_BKTD.shape[2]
        assert end <= self._keys.shape[3], f"{end} positions in a cache of {self._keys.shape[3]}"
        self._keys[layer, :, :, self.length : end] = k_BKTD
        self._values[layer, :, :, self.length : end] = v_BKTD
        return self._keys[layer, :, :, :end], self._values[layer, :, :, :end]

    def advance(self, positions: int) -> None:
        """Increase `length` by the number of new positions, after every layer has stored its keys and values."""
        self.length += positions

    def repeat(self, times: int) -> None:
        """Replace each row by `times` adjacent copies of the row."""
        self._keys = self._keys.repeat_interleave(times, dim=1)
        self._values = self._values.repeat_interleave(times, dim=1)
        if self.padding_B is not None:
            self.padding_B = self.padding_B.repeat_interleave(times)
        self.media = [(k.repeat_interleave(times, dim=0), v.repeat_interleave(times, dim=0)) for k, v in self.media]
        if self.media_mask is not None:
            self.media_mask = self.media_mask.repeat_interleave(times, dim=0)

    def keep_rows(self, active: Sequence[bool]) -> list[int]:
        """Drop the rows that are not active, and return the old index of each remaining row.

        The last active rows replace dropped rows. In the preallocated tensors, dropping a row therefore copies the keys
        and values of at most one row and allocates no memory. The keys and values of pictures are copied for all
        remaining rows.
        """
        count = sum(active)
        movable = (row for row in range(count, len(active)) if active[row])
        kept = [row if active[row] else next(movable) for row in range(count)]
        for row, source in enumerate(kept):
            if row != source:
                self._keys[:, row, :, : self.length] = self._keys[:, source, :, : self.length]
                self._values[:, row, :, : self.length] = self._values[:, source, :, : self.length]
        self._keys, self._values = self._keys[:, :count], self._values[:, :count]
        if self.padding_B is not None:
            self.padding_B = self.padding_B[kept]
        self.media = [(k[kept], v[kept]) for k, v in self.media]
        if self.media_mask is not None:
            self.media_mask = self.media_mask[kept]
        return kept

    def reorder(self, rows_B: Tensor, start: int) -> None:
        """In each row i, replace the positions from `start` to the end by the same positions of the old row
        `rows_B[i]`.

        The positions before `start` must already be equal in row i and in row `rows_B[i]`.
        """
        for stored in (self._keys, self._values):
            stored[:, :, :, start : self.length] = stored[:, rows_B, :, start : self.length]
