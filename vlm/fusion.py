"""Fusion of pictures and text, either by picture features in slots of the sequence or by gated cross-attention.

Letters in tensor names: batch (B), pictures of the batch (P), largest number of pictures in a row (M), features of a
picture (N), positions (T), keys (S = M * N), width (W).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm.layers.attention import CrossAttention


@dataclass(frozen=True)
class Media:
    """Picture features that cross-attention attends to.

    Attributes:
        features_BSW: concatenated features of each row's pictures; a row with fewer than M pictures is padded with
            zeros.
        mask_BTS: bool mask, True where position t attends to feature s; a position attends only to the features of the
            last picture whose slot is at or before this position.
    """

    features_BSW: Tensor
    mask_BTS: Tensor


class SlotsFusion(nn.Module):
    """Fusion that writes the features of each picture into the slots of the picture."""

    def forward(self, x_BTW: Tensor, is_slot_BT: Tensor, features_PNW: Tensor) -> tuple[Tensor, None]:
        """Replace the embeddings of the slots by picture features. The second result is None, because a model with
        image slots has no cross-attention.

        Raises:
            ValueError: the numbers of slots and features differ.
        """
        _check_slots(is_slot_BT, features_PNW.shape[0], features_PNW.shape[1])
        return x_BTW.masked_scatter(is_slot_BT[..., None], features_PNW.to(x_BTW.dtype)), None


class CrossFusion(nn.Module):
    """Fusion that puts a learned marker into the slot of a picture and passes the features to cross-attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.marker = nn.Parameter(torch.zeros(width))

    def forward(self, x_BTW: Tensor, is_slot_BT: Tensor, features_PNW: Tensor) -> tuple[Tensor, Media]:
        """Replace the embeddings of the slots by the marker, and also return the `Media` for cross-attention.

        Raises:
            ValueError: the numbers of slots and pictures differ.
        """
        P, N, W = features_PNW.shape
        _check_slots(is_slot_BT, P, 1)
        x_BTW = torch.where(is_slot_BT[..., None], self.marker.to(x_BTW.dtype), x_BTW)
        count_BT = torch.cumsum(is_slot_BT.long(), dim=1)
        M = max(1, int(count_BT[:, -1].max()))
        row_P, column_P = is_slot_BT.nonzero(as_tuple=True)
        features_BMNW = x_BTW.new_zeros(len(x_BTW), M, N, W)
        features_BMNW = features_BMNW.index_put((row_P, count_BT[row_P, column_P] - 1), features_PNW.to(x_BTW.dtype))
        picture_S = torch.arange(M, device=x_BTW.device).repeat_interleave(N)
        return x_BTW, Media(features_BMNW.flatten(1, 2), count_BT[..., None] - 1 == picture_S)


class GatedCrossBlock(nn.Module):
    """Gated cross-attention block: x + tanh(g) * attention(norm(x)), then x + tanh(h) * mlp(norm(x)).

    Both gates g and h start at zero, so that the block initially does not change the output of a pretrained decoder.
    The block follows figure 4 of Alayrac et al., 2022.
    """

    def __init__(self, attention: CrossAttention, mlp: nn.Module, norms: tuple[nn.Module, nn.Module]) -> None:
        super().__init__()
        self.attention_norm, self.attention = norms[0], attention
        self.mlp_norm, self.mlp = norms[1], mlp
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def keys_values(self, media: Media) -> tuple[Tensor, Tensor]:
        """Compute the keys and values of the pictures. Generation caches these keys and values for all later tokens."""
        return self.attention.keys_values(media.features_BSW)

    def forward(self, x_BTW: Tensor, keys_values: tuple[Tensor, Tensor], mask_B1TS: Tensor) -> Tensor:
        """Apply the block. The attention adds nothing to a position before the first picture."""
        has_picture = mask_B1TS.any(dim=-1, keepdim=True)
        # The softmax of a position that attends to no key is NaN. Therefore a position before the first picture attends
        # to all keys, and its result is then multiplied by zero.
        attended = self.attention(self.attention_norm(x_BTW), keys_values, mask_B1TS | ~has_picture)
        x_BTW = x_BTW + torch.tanh(self.attention_gate) * attended * has_picture[:, 0]
        return x_BTW + torch.tanh(self.mlp_gate) * self.mlp(self.mlp_norm(x_BTW))


def _check_slots(is_slot_BT: Tensor, pictures: int, slots_per_picture: int) -> None:
    count = int(is_slot_BT.sum())
    if count != pictures * slots_per_picture:
        raise ValueError(
            f"the batch has {count} image slots, but {pictures} pictures need {slots_per_picture} slots each"
        )
