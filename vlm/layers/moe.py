"""Sparse mixture of experts: a router sends each token to a few of many MLPs (Shazeer et al., 2017).

No token is dropped and no expert has a capacity: tokens are sorted by expert, and one grouped matrix product serves all
experts at once. `naive_experts` says the same as a loop over experts; tests compare the two.

Letters: N tokens, K experts chosen by a token, A = N * K assignments, X experts, W width, I inputs, O outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.layers.mlp import ActivationFunction


class Groups(NamedTuple):
    """Rows sorted by the expert they go to.

    Attributes:
        expert_A: expert of each row, ascending.
        ends_X: int32, one past the last row of each expert; an expert without rows ends where the one before it does.
    """

    expert_A: Tensor
    ends_X: Tensor


class GroupedLinear(nn.Module):
    """A linear layer for each expert, stacked: each row goes through the one of its group."""

    def __init__(self, num_experts: int, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(num_experts, outputs)) if bias else None

    def forward(self, x_AI: Tensor, groups: Groups) -> Tensor:
        """Rows (A, O) of sorted rows (A, I)."""
        kind = x_AI.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_AI.dtype
        y_AO = grouped_matmul(x_AI.to(dtype), self.weight.to(dtype), groups)
        return y_AO if self.bias is None else y_AO.add_(F.embedding(groups.expert_A, self.bias.to(dtype)))


class PlainExperts(nn.Module):
    """`PlainMlp` for each expert."""

    def __init__(
        self, num_experts: int, width: int, mlp_width: int, activation: ActivationFunction, *, bias: bool
    ) -> None:
        super().__init__()
        self.up = GroupedLinear(num_experts, width, mlp_width, bias=bias)
        self.out = GroupedLinear(num_experts, mlp_width, width, bias=bias)
        self.activation = activation

    def forward(self, x_AW: Tensor, groups: Groups) -> Tensor:
        """Rows (A, W) of sorted rows."""
        return self.out(self.activation(self.up(x_AW, groups)), groups)


class GatedExperts(nn.Module):
    """`GatedMlp` for each expert."""

    def __init__(
        self, num_experts: int, width: int, mlp_width: int, activation: ActivationFunction, *, bias: bool
    ) -> None:
        super().__init__()
        self.gate_up = GroupedLinear(num_experts, width, 2 * mlp_width, bias=bias)
        self.out = GroupedLinear(num_experts, mlp_width, width, bias=bias)
        self.activation = activation

    def forward(self, x_AW: Tensor, groups: Groups) -> Tensor:
        """Rows (A, W) of sorted rows."""
        gate, up = self.gate_up(x_AW, groups).chunk(2, dim=-1)
        return self.out(self.activation(gate) * up, groups)


class Routing(NamedTuple):
    """What a router said about each token.

    Attributes:
        logits_NX: fp32, before the noise: what the losses are about.
        gates_NK: weights of the chosen experts, a softmax over them.
        chosen_NK: the chosen experts, best first.
    """

    logits_NX: Tensor
    gates_NK: Tensor
    chosen_NK: Tensor


class MoeMlp(nn.Module):
    """Router and experts, in the place of a block's MLP.

    A training forward leaves its `Routing` in `routing`, for the objective to take: the layer does not know which
    tokens are real, so its losses are not its own business. At evaluation nothing is left, and there is no noise.
    """

    def __init__(
        self,
        width: int,
        experts: PlainExperts | GatedExperts,
        *,
        top_k: int,
        noisy: bool,
        balance_weight: float,
        z_weight: float,
    ) -> None:
        super().__init__()
        num_experts = len(experts.out.weight)
        self.router = nn.Linear(width, num_experts, bias=False)
        self.noise = nn.Linear(width, num_experts, bias=False) if noisy else None
        self.experts = experts
        self.top_k = top_k
        self.balance_weight, self.z_weight = balance_weight, z_weight
        self.routing: Routing | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last dimension."""
        x_NW = x.reshape(-1, x.shape[-1])
        routing = self.route(x_NW)
        if self.training:
            self.routing = routing
        return dispatch(self.experts, x_NW, routing).view_as(x)

    def route(self, x_NW: Tensor) -> Routing:
        """Choose each token's experts. In fp32 even under autocast: rounded logits send tokens elsewhere."""
        with torch.autocast(x_NW.device.type, enabled=False):
            x_NW = x_NW.float()
            logits_NX = scores_NX = F.linear(x_NW, self.router.weight.float())
            if self.noise is not None and self.training:
                scale_NX = F.softplus(F.linear(x_NW, self.noise.weight.float()))
                scores_NX = logits_NX + torch.randn_like(logits_NX) * scale_NX
            best_NK, chosen_NK = scores_NX.topk(self.top_k, dim=-1)
            return Routing(logits_NX, best_NK.softmax(dim=-1), chosen_NK)

    def pop_routing(self) -> Routing:
        """The routing of the last training forward, once; of no tokens where there was none."""
        routing, self.routing = self.routing, None
        if routing is None:
            routing = self.route(self.router.weight.new_zeros(0, self.router.in_features))
        return routing

    @property
    def out(self) -> GroupedLinear:
        """What writes into the residual stream."""
        return self.experts.out


def dispatch(experts: PlainExperts | GatedExperts, x_NW: Tensor, routing: Routing) -> Tensor:
    """Sort assignments by expert, apply the experts, put the rows back and add up each token's."""
    (N, W), K = x_NW.shape, routing.chosen_NK.shape[1]
    expert_A, order_A = routing.chosen_NK.flatten().sort(stable=True)
    places_A = torch.empty_like(order_A)
    places_A[order_A] = torch.arange(N * K, device=order_A.device)
    every_X = torch.arange(len(experts.out.weight), device=order_A.device)
    groups = Groups(expert_A, torch.searchsorted(expert_A, every_X, right=True, out_int32=True))
    y_AW = experts(x_NW.index_select(0, order_A // K), groups)
    y_NKW = y_AW.index_select(0, places_A).view(N, K, W)
    return (y_NKW * routing.gates_NK[..., None].to(y_NKW.dtype)).sum(dim=1)


def grouped_matmul(x_AI: Tensor, weight_XOI: Tensor, groups: Groups) -> Tensor:
    """Each sorted row times the matrix of its expert: (A, O).

    One kernel where torch has it (2.10 on) and the rows' strides are whole 16 bytes, else one padded batch.
    """
    aligned = all(size * x_AI.element_size() % 16 == 0 for size in weight_XOI.shape[1:])
    if aligned and hasattr(F, "grouped_mm") and x_AI.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return F.grouped_mm(x_AI, weight_XOI.transpose(1, 2), offs=groups.ends_X)
    return padded_matmul(x_AI, weight_XOI, groups)


def padded_matmul(x_AI: Tensor, weight_XOI: Tensor, groups: Groups) -> Tensor:
    """`grouped_matmul` for any torch and any width: every expert gets as many rows as the busiest, zeros at the end.

    Costs what X times the busiest expert costs, which is little more while the load is balanced.
    """
    X, O, I = weight_XOI.shape  # noqa: E741
    loads_X = torch.diff(groups.ends_X, prepend=groups.ends_X.new_zeros(1))
    C = int(loads_X.max())
    rank_A = torch.arange(len(x_AI), device=x_AI.device) - (groups.ends_X - loads_X)[groups.expert_A]
    slot_A = groups.expert_A * C + rank_A
    padded_XCI = x_AI.new_zeros(X * C, I).index_copy(0, slot_A, x_AI).view(X, C, I)
    return torch.bmm(padded_XCI, weight_XOI.transpose(1, 2)).view(X * C, O).index_select(0, slot_A)


def naive_experts(experts: PlainExperts | GatedExperts, x_NW: Tensor, routing: Routing) -> Tensor:
    """The experts as one reads them: each looks for its tokens. The reference of tests and benchmarks."""
    y_NW = torch.zeros_like(x_NW)
    for expert in range(len(experts.out.weight)):
        token_A, choice_A = (routing.chosen_NK == expert).nonzero(as_tuple=True)
        y_AW = _one_expert(experts, expert, x_NW[token_A]) * routing.gates_NK[token_A, choice_A, None]
        y_NW = y_NW.index_add(0, token_A, y_AW)
    return y_NW


def _one_expert(experts: PlainExperts | GatedExperts, expert: int, x_AW: Tensor) -> Tensor:
    def linear(layer: GroupedLinear, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight[expert], None if layer.bias is None else layer.bias[expert])

    if isinstance(experts, PlainExperts):
        return linear(experts.out, experts.activation(linear(experts.up, x_AW)))
    gate, up = linear(experts.gate_up, x_AW).chunk(2, dim=-1)
    return linear(experts.out, experts.activation(gate) * up)
