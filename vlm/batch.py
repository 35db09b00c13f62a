"""Batch of pictures and token sequences, the input of a training step.

Letters in tensor names: B batch, P pictures, H height and W width in pixels, C channels, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that does not count in the loss."""


@dataclass(frozen=True)
class Batch:
    """Pictures and right-padded token sequences of a training step.

    Attributes:
        pixels_PHWC: uint8 pictures at model resolution, in the order in which their slots appear in the rows of
            `tokens_BT`.
        tokens_BT: int64 token ids, with the id SLOT at the positions of a picture.
        labels_BT: int64 labels; the label of a position is the next token if the next token belongs to the answer, and
            IGNORE otherwise.
        prefix_lengths_B: int64 number of positions before the answer in each row.
    """

    pixels_PHWC: Tensor
    tokens_BT: Tensor
    labels_BT: Tensor
    prefix_lengths_B: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to a device. A copy from pinned memory to a GPU is asynchronous."""
        return Batch(*(t.to(device, non_blocking=True) for t in self.tensors()))

    def with_pixels(self, pixels_PHWC: Tensor) -> Batch:
        """Return a batch with the same token sequences and the given pictures."""
        return Batch(pixels_PHWC, self.tokens_BT, self.labels_BT, self.prefix_lengths_B)

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory, which allows asynchronous copies to a GPU."""
        return Batch(*(t.pin_memory() for t in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the four tensors in the order of the constructor's arguments."""
        return self.pixels_PHWC, self.tokens_BT, self.labels_BT, self.prefix_lengths_B
