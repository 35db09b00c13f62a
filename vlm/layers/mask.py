"""Who sees whom: one rule from two marks a position (after big_vision's `make_attn_mask`).

A position sees itself, and another when that is real (not padding) and its running count of autoregressive marks is
not larger. With S slots, p prompt tokens, a answer tokens:

    marks            what it is
    1 1 1 1 1 1      causal: each sees itself and the past
    0 0 0 0 1 1      prefix-LM: the prefix sees all of itself, the answer is causal
    0 0 0 0 0 0      full: everybody sees everybody
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask(valid_BT: Tensor, marks_BT: Tensor) -> Tensor:
    """Boolean mask, True where query t may see key s.

    Args:
        valid_BT: bool, False on padding.
        marks_BT: int, 1 where a position starts a new autoregressive step.

    Returns:
        mask_B1TS, to be broadcast over heads.
    """
    order_BT = torch.cumsum(marks_BT, dim=1)
    sees_BTS = order_BT[:, None, :] <= order_BT[:, :, None]
    # Padding sees itself: a row of the softmax that sees nothing would be NaN, and spread.
    itself_TS = torch.eye(valid_BT.shape[1], dtype=torch.bool, device=valid_BT.device)
    return (sees_BTS & valid_BT[:, None, :] | itself_TS)[:, None]


def prefix_marks(prefix_lengths_B: Tensor, length: int) -> Tensor:
    """Marks of a prefix-LM: 0 inside each row's prefix, 1 after it. Shape (B, length)."""
    return (torch.arange(length, device=prefix_lengths_B.device)[None] >= prefix_lengths_B[:, None]).long()


def apply_window(mask: Tensor | None, window: int, *, queries: int, keys: int, device: torch.device) -> Tensor:
    """The mask narrowed to keys less than `window` positions back; without a mask, of causal attention.

    Positions that see each other, those of a prefix, do so at any distance, as in transformers. The queries are the
    last `queries` of `keys` positions. Shape (1 or B, 1, queries, keys).
    """
    t = torch.arange(keys - queries, keys, device=device)[:, None]
    s = torch.arange(keys, device=device)[None]
    near = (t - s < window)[None, None]
    if mask is None:
        return near & (s <= t)
    return mask & (near | mask.mT) if queries == keys else mask & near
