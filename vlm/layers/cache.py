"""Keys and values of the past, in memory reserved once. The caller owns it; the model only fills it.

Letters: B batch, K kv heads, S key positions, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of every layer for up to `context` positions.

    Memory: 2 * depth * B * K * context * D elements.

    Attributes:
        length: positions stored, the same in every row.
        padding_B: how many of a row's first positions are padding; None: none in any row.
        media: keys and values of the pictures, a pair a cross-attention layer, and who is seen from here on; empty
            where pictures enter as slots.
        media_mask: bool, broadcastable to (B, H, 1, S).
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
        """Store the new positions of one layer and return all of that layer's, old and new: (B, K, S, D) each.

        `advance` moves on once every layer has stored the same positions.
        """
        end = self.length + k_BKTD.shape[2]
        assert end <= self._keys.shape[3], f"{end} positions in a cache of {self._keys.shape[3]}"
        self._keys[layer, :, :, self.length : end] = k_BKTD
        self._values[layer, :, :, self.length : end] = v_BKTD
        return self._keys[layer, :, :, :end], self._values[layer, :, :, :end]

    def advance(self, positions: int) -> None:
        """Count `positions` as stored in every layer."""
        self.length += positions

    def repeat(self, times: int) -> None:
        """Each row becomes `times` rows, side by side."""
        self._keys = self._keys.repeat_interleave(times, dim=1)
        self._values = self._values.repeat_interleave(times, dim=1)
        if self.padding_B is not None:
            self.padding_B = self.padding_B.repeat_interleave(times)
        self.media = [(k.repeat_interleave(times, dim=0), v.repeat_interleave(times, dim=0)) for k, v in self.media]
        if self.media_mask is not None:
            self.media_mask = self.media_mask.repeat_interleave(times, dim=0)

    def keep_rows(self, going: Sequence[bool]) -> list[int]:
        """Leave out the rows that do not go on; returns which row each one was.

        The last rows move into the gaps: nothing is allocated, and a row that ends costs one row's copy.
        """
        count = sum(going)
        movers = (row for row in range(count, len(going)) if going[row])
        kept = [row if going[row] else next(movers) for row in range(count)]
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
        """From position `start` on, row i becomes what row `rows_B[i]` was; what stands before is the same in both."""
        for stored in (self._keys, self._values):
            stored[:, :, :, start : self.length] = stored[:, rows_B, :, start : self.length]
