"""RMS norm whose weight is the scale minus 1. All other norms of the model are classes of torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OffsetRmsNorm(nn.Module):
    """RMS norm x / rms(x) * (1 + weight), which is computed in fp32 for any dtype of x (Gemma Team, 2024).

    Because of the offset, weight decay would pull the scale towards one instead of zero. The optimizer of
    `vlm.training.optim` uses no weight decay for norms.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).type_as(x)
