"""Keys and values of the past, in memory reserved once. The caller owns it; the model only fills it.

Letters: B batch, K kv heads, S key positions, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of every layer for up to `context` positions.

    Memory: 2 * depth * B * K * context * D elements.
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
