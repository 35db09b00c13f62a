"""RMS norm whose weight is stored as its distance from one. (Plain layer and RMS norms are torch's own.)"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OffsetRmsNorm(nn.Module):
    """x / rms(x) * (1 + weight), in fp32 whatever x is (Gemma Team, 2024): weight decay pulls towards the identity."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).type_as(x)
