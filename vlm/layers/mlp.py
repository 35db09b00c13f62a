"""Feed-forward layers of a transformer block, either plain (two linear layers) or gated."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

ActivationFunction = Callable[[Tensor], Tensor]


class PlainMlp(nn.Module):
    """MLP of two linear layers with an activation in between. The MLP maps (..., width) to (..., out_width)."""

    def __init__(
        self, width: int, mlp_width: int, activation: ActivationFunction, *, bias: bool, out_width: int
    ) -> None:
        super().__init__()
        self.up = nn.Linear(width, mlp_width, bias=bias)
        self.out = nn.Linear(mlp_width, out_width, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to the last dimension."""
        return self.out(self.activation(self.up(x)))


class GatedMlp(nn.Module):
    """Gated linear unit out(activation(gate(x)) * up(x)) (Shazeer, 2020). One matrix computes gate(x) and up(x)."""

    def __init__(self, width: int, mlp_width: int, activation: ActivationFunction, *, bias: bool) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * mlp_width, bias=bias)
        self.out = nn.Linear(mlp_width, width, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Apply the gated MLP to the last dimension."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(self.activation(gate) * up)
