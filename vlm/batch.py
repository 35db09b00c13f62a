"""Batch of pictures and token sequences, the input of a training step.

Letters in tensor names: batch (B), pictures (P), height (H) and width (W) in pixels, channels (C), positions (T).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Label of a sequence position that the loss ignores."""


@dataclass(frozen=True)
class Batch:
    """Pictures and right-padded token sequences of a training step.

    Attributes:
        pixels_PHWC: uint8 pictures at model resolution. Their order is the order of their slots in the rows of
            `tokens_BT`.
        tokens_BT: int64 token ids, with the id SLOT at the positions of a picture.
        labels_BT: int64 labels; the label of a position is the next token if the next token belongs to the answer, and
            IGNORE otherwise.
        prefix_lengths_B: for each row, the number of positions before the answer (int64).
        weights_B: for each row, the factor by which the loss of the row is multiplied, or None if all factors are 1.
        rows_per_picture: number of adjacent rows that belong to the same picture; the picture is encoded only once.
    """

    pixels_PHWC: Tensor
    tokens_BT: Tensor
    labels_BT: Tensor
    prefix_lengths_B: Tensor
    weights_B: Tensor | None = None
    rows_per_picture: int = 1

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to a device. A copy from pinned memory to a GPU is asynchronous."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def with_pixels(self, pixels_PHWC: Tensor) -> Batch:
        """Return a batch with the same token sequences and the given pictures."""
        return replace(self, pixels_PHWC=pixels_PHWC)

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory, which allows asynchronous copies to a GPU."""
        return self._map(Tensor.pin_memory)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors of the batch, in the order of the fields of this class."""
        return tuple(self._named_tensors().values())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        changes: dict[str, Any] = {name: function(tensor) for name, tensor in self._named_tensors().items()}
        return replace(self, **changes)

    def _named_tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}
