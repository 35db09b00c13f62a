"""Attention masks, built from a validity flag and an autoregressive mark for each position.

The method is the same as in the function `make_attn_mask` of big_vision. A query attends to itself. A query also
attends to a valid (not padded) key if the key's cumulative sum of marks is at most the query's cumulative sum of marks:

    marks            mask
    1 1 1 1 1 1      causal: every position attends to itself and to earlier positions
    0 0 0 0 1 1      prefix-LM: the prefix attends to the whole prefix, and the answer is causal
    0 0 0 0 0 0      full: every position attends to all positions
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask(valid_BT: Tensor, marks_BT: Tensor) -> Tensor:
    """Build a boolean mask, True where query t attends to key s.

    Args:
        valid_BT: bool, False at padding positions.
        marks_BT: autoregressive marks; 1 at a position to which earlier positions must not attend, and 0 at other
            positions.

    Returns:
        Mask of shape (B, 1, T, T), which broadcasts over heads.
    """
    order_BT = torch.cumsum(marks_BT, dim=1)
    allowed_BTS = order_BT[:, None, :] <= order_BT[:, :, None]
    # A padding position attends to itself, because the softmax of a query without any key would be NaN.
    identity_TS = torch.eye(valid_BT.shape[1], dtype=torch.bool, device=valid_BT.device)
    return (allowed_BTS & valid_BT[:, None, :] | identity_TS)[:, None]


def prefix_marks(prefix_lengths_B: Tensor, length: int) -> Tensor:
    """Return the marks (B, length) of a prefix-LM, which are 0 in the prefix of each row and 1 after the prefix."""
    return (torch.arange(length, device=prefix_lengths_B.device)[None] >= prefix_lengths_B[:, None]).long()


def apply_window(mask: Tensor | None, window: int, *, queries: int, keys: int, device: torch.device) -> Tensor:
    """Restrict a mask to a sliding window: a query attends to a key only if the key is less than `window` positions
    earlier.

    As in transformers, two positions of a prefix attend to each other at any distance. This rule has no effect if there
    are more keys than queries, because the rule needs a query for each key.

    Args:
        mask: bool mask (B, 1, queries, keys), or None for a causal mask.
        window: number of keys in the window, including the key at the position of the query.
        queries: number of queries, which are at the last positions of the keys.
        keys: number of keys.
        device: device of the resulting mask.

    Returns:
        Mask of shape (1 or B, 1, queries, keys).
    """
    t = torch.arange(keys - queries, keys, device=device)[:, None]
    s = torch.arange(keys, device=device)[None]
    near = (t - s < window)[None, None]
    if mask is None:
        return near & (s <= t)
    return mask & (near | mask.mT) if queries == keys else mask & near
