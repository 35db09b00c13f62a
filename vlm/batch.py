"""What a training step eats.

Letters: B batch, P pictures, H W pixels, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that is not a target."""


@dataclass(frozen=True)
class Batch:
    """Pictures and sequences, right-padded.

    Attributes:
        pixels_PHWC: uint8, at model resolution, in the order of their slots: row by row, first to last.
        tokens_BT: int64, SLOT in the places of pictures.
        labels_BT: int64, the next token where it is part of the answer, IGNORE elsewhere.
        prefix_lengths_B: int64, positions before the answer.
    """

    pixels_PHWC: Tensor
    tokens_BT: Tensor
    labels_BT: Tensor
    prefix_lengths_B: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; from pinned memory it is only begun."""
        return Batch(*(t.to(device, non_blocking=True) for t in self.tensors()))

    def with_pixels(self, pixels_PHWC: Tensor) -> Batch:
        """The same sequences with other pictures."""
        return Batch(pixels_PHWC, self.tokens_BT, self.labels_BT, self.prefix_lengths_B)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies while the processor does something else."""
        return Batch(*(t.pin_memory() for t in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors in order."""
        return self.pixels_PHWC, self.tokens_BT, self.labels_BT, self.prefix_lengths_B
