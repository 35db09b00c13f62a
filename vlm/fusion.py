"""How pictures meet text: as slots of the sequence, or looked at from outside by gated cross-attention.

Letters: B batch, P pictures of the batch, N features of a picture, T positions, S keys (a row's pictures times N), W
width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm.layers.attention import CrossAttention


@dataclass(frozen=True)
class Media:
    """What cross-attention looks at.

    Attributes:
        features_BSW: of a row's pictures, one after the other; zeros where a row has fewer.
        mask_BTS: bool, True where position t sees feature s: those of the last picture before it.
    """

    features_BSW: Tensor
    mask_BTS: Tensor


class SlotsFusion(nn.Module):
    """A picture's features take the places of its slots, in order."""

    def forward(self, x_BTW: Tensor, is_slot_BT: Tensor, features_PNW: Tensor) -> tuple[Tensor, None]:
        """Embeddings with features in their slots.

        Raises:
            ValueError: not as many slots as features.
        """
        _check_places(is_slot_BT, features_PNW.shape[0], features_PNW.shape[1])
        return x_BTW.masked_scatter(is_slot_BT[..., None], features_PNW.to(x_BTW.dtype)), None


class CrossFusion(nn.Module):
    """A picture's place in the sequence is a learned marker; its features stay outside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.marker = nn.Parameter(torch.zeros(width))

    def forward(self, x_BTW: Tensor, is_slot_BT: Tensor, features_PNW: Tensor) -> tuple[Tensor, Media]:
        """Embeddings with markers, and what each position sees.

        Raises:
            ValueError: not as many slots as pictures.
        """
        P, N, W = features_PNW.shape
        _check_places(is_slot_BT, P, 1)
        x_BTW = torch.where(is_slot_BT[..., None], self.marker.to(x_BTW.dtype), x_BTW)
        count_BT = torch.cumsum(is_slot_BT.long(), dim=1)
        M = max(1, int(count_BT[:, -1].max()))
        row_P, column_P = is_slot_BT.nonzero(as_tuple=True)
        features_BMNW = x_BTW.new_zeros(len(x_BTW), M, N, W)
        features_BMNW = features_BMNW.index_put((row_P, count_BT[row_P, column_P] - 1), features_PNW.to(x_BTW.dtype))
        picture_S = torch.arange(M, device=x_BTW.device).repeat_interleave(N)
        return x_BTW, Media(features_BMNW.flatten(1, 2), count_BT[..., None] - 1 == picture_S)


class GatedCrossBlock(nn.Module):
    """x + tanh(g) * cross_attention(norm(x)), then x + tanh(h) * mlp(norm(x)) (Alayrac et al., 2022, figure 4).

    Both gates start at zero: the decoder around it starts as it was.
    """

    def __init__(self, attention: CrossAttention, mlp: nn.Module, norms: tuple[nn.Module, nn.Module]) -> None:
        super().__init__()
        self.attention_norm, self.attention = norms[0], attention
        self.mlp_norm, self.mlp = norms[1], mlp
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def keys_values(self, media: Media) -> tuple[Tensor, Tensor]:
        """Keys and values of the pictures, which stay the same while text goes on."""
        return self.attention.keys_values(media.features_BSW)

    def forward(self, x_BTW: Tensor, keys_values: tuple[Tensor, Tensor], mask_B1TS: Tensor) -> Tensor:
        """One gated block; a position before the first picture gets nothing from attention."""
        sees_any = mask_B1TS.any(dim=-1, keepdim=True)
        seen = self.attention(self.attention_norm(x_BTW), keys_values, mask_B1TS | ~sees_any)
        x_BTW = x_BTW + torch.tanh(self.attention_gate) * seen * sees_any[:, 0]
        return x_BTW + torch.tanh(self.mlp_gate) * self.mlp(self.mlp_norm(x_BTW))


def _check_places(is_slot_BT: Tensor, pictures: int, each: int) -> None:
    count = int(is_slot_BT.sum())
    if count != pictures * each:
        raise ValueError(f"{count} image slots in a batch of {pictures} pictures with {each} slots each")
