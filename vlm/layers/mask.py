"""Attention masks from two values per position, validity and an autoregressive mark (after big_vision's
`make_attn_mask`).

A query attends to itself, and to every valid (not padded) key whose cumulative sum of marks is not larger than its own:

    marks            mask
    1 1 1 1 1 1      causal: each position attends to itself and to earlier ones
    0 0 0 0 1 1      prefix-LM: the prefix attends to the whole prefix, the answer is causal
    0 0 0 0 0 0      full: every position attends to every other
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask(valid_BT: Tensor, marks_BT: Tensor) -> Tensor:
    """Build a boolean mask, True where query t attends to key s.

    Args:
        valid_BT: bool, False for padding.
        marks_BT: int, 1 if earlier positions must not attend to this one, else 0.

    Returns:
        Mask (B, 1, T, T), which broadcasts over heads.
    """
    order_BT = torch.cumsum(marks_BT, dim=1)
    allowed_BTS = order_BT[:, None, :] <= order_BT[:, :, None]
    # Padding attends to itself: the softmax of a query without any key would be NaN.
    identity_TS = torch.eye(valid_BT.shape[1], dtype=torch.bool, device=valid_BT.device)
    return (allowed_BTS & valid_BT[:, None, :] | identity_TS)[:, None]


def prefix_marks(prefix_lengths_B: Tensor, length: int) -> Tensor:
    """Return the marks (B, length) of a prefix-LM: 0 in the prefix of each row, 1 after it."""
    return (torch.arange(length, device=prefix_lengths_B.device)[None] >= prefix_lengths_B[:, None]).long()


def apply_window(mask: Tensor | None, window: int, *, queries: int, keys: int, device: torch.device) -> Tensor:
    """Restrict a mask to a sliding window: keys less than `window` positions before the query.

    Positions of a prefix, which attend to each other in both directions, do so at any distance, as in transformers.

    Args:
        mask: bool (B, 1, queries, keys); None: causal.
        window: number of keys in the window, including the query's own.
        queries: number of queries; they are the last of the `keys` positions.
        keys: number of keys.
        device: device of the result.

    Returns:
        Mask (1 or B, 1, queries, keys).
    """
    t = torch.arange(keys - queries, keys, device=device)[:, None]
    s = torch.arange(keys, device=device)[None]
    near = (t - s < window)[None, None]
    if mask is None:
        return near & (s <= t)
    return mask & (near | mask.mT) if queries == keys else mask & near
