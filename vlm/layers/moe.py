"""Sparse mixture of experts, in which a router sends each token to a few of many MLPs (Shazeer et al., 2017).

Experts have no capacity limit, so no token is dropped. Tokens are sorted by expert, and one grouped matrix product per
linear layer computes all experts. Tests compare the result with the function `naive_experts`, a slow reference
implementation with a loop over the experts.

Letters in tensor names: tokens (N), chosen experts of a token (K), assignments (A = N * K), experts (X), width (W),
inputs (I), outputs (O).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.layers.mlp import ActivationFunction


class Groups(NamedTuple):
    """Assignment of rows to experts. The rows are sorted by expert.

    Attributes:
        expert_A: for each row, the index of its expert, in ascending order.
        ends_X: for each expert, the index after its last row (int32); an expert without rows has the same index as the
            previous expert.
    """

    expert_A: Tensor
    ends_X: Tensor


class GroupedLinear(nn.Module):
    """Stacked linear layers of all experts. Each row goes through the linear layer of its expert."""

    def __init__(self, num_experts: int, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(num_experts, outputs)) if bias else None

    def forward(self, x_AI: Tensor, groups: Groups) -> Tensor:
        """Map rows (A, I), which are sorted by expert, to rows (A, O)."""
        kind = x_AI.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_AI.dtype
        y_AO = grouped_matmul(x_AI.to(dtype), self.weight.to(dtype), groups)
        return y_AO if self.bias is None else y_AO.add_(F.embedding(groups.expert_A, self.bias.to(dtype)))


class PlainExperts(nn.Module):
    """Experts that are MLPs of the form `PlainMlp`. The weights of all experts are stacked in one tensor per layer."""

    def __init__(
        self, num_experts: int, width: int, mlp_width: int, activation: ActivationFunction, *, bias: bool
    ) -> None:
        super().__init__()
        self.up = GroupedLinear(num_experts, width, mlp_width, bias=bias)
        self.out = GroupedLinear(num_experts, mlp_width, width, bias=bias)
        self.activation = activation

    def forward(self, x_AW: Tensor, groups: Groups) -> Tensor:
        """Apply each expert to its rows. The rows (A, W) are sorted by expert."""
        return self.out(self.activation(self.up(x_AW, groups)), groups)


class GatedExperts(nn.Module):
    """Experts that are MLPs of the form `GatedMlp`. The weights of all experts are stacked in one tensor per layer."""

    def __init__(
        self, num_experts: int, width: int, mlp_width: int, activation: ActivationFunction, *, bias: bool
    ) -> None:
        super().__init__()
        self.gate_up = GroupedLinear(num_experts, width, 2 * mlp_width, bias=bias)
        self.out = GroupedLinear(num_experts, mlp_width, width, bias=bias)
        self.activation = activation

    def forward(self, x_AW: Tensor, groups: Groups) -> Tensor:
        """Apply each expert to its rows. The rows (A, W) are sorted by expert."""
        gate, up = self.gate_up(x_AW, groups).chunk(2, dim=-1)
        return self.out(self.activation(gate) * up, groups)


class Routing(NamedTuple):
    """Experts that a router has chosen for each token.

    Attributes:
        logits_NX: fp32 logits of the router without noise, which are the input of the router losses.
        gates_NK: weights of the chosen experts, from a softmax over the chosen experts.
        chosen_NK: indices of the chosen experts, with the best expert first.
    """

    logits_NX: Tensor
    gates_NK: Tensor
    chosen_NK: Tensor


class MoeMlp(nn.Module):
    """Mixture of experts (a router and its experts), which replaces the MLP of a block.

    A forward pass in training stores its `Routing`, from which `vlm.training.objective` computes the router losses. The
    layer does not compute the losses itself, because the layer does not know which tokens are padding. A forward pass
    in evaluation mode stores no `Routing` and adds no noise.
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
        """Apply the mixture of experts to the last dimension."""
        x_NW = x.reshape(-1, x.shape[-1])
        routing = self.route(x_NW)
        if self.training:
            self.routing = routing
        return dispatch(self.experts, x_NW, routing).view_as(x)

    def route(self, x_NW: Tensor) -> Routing:
        """Choose the experts of each token. The router always uses fp32, because rounding would change the choice."""
        with torch.autocast(x_NW.device.type, enabled=False):
            x_NW = x_NW.float()
            logits_NX = scores_NX = F.linear(x_NW, self.router.weight.float())
            if self.noise is not None and self.training:
                scale_NX = F.softplus(F.linear(x_NW, self.noise.weight.float()))
                scores_NX = logits_NX + torch.randn_like(logits_NX) * scale_NX
            best_NK, chosen_NK = scores_NX.topk(self.top_k, dim=-1)
            return Routing(logits_NX, best_NK.softmax(dim=-1), chosen_NK)

    def pop_routing(self) -> Routing:
        """Return the routing that the last training pass stored in the layer, and delete it from the layer.

        If the layer stores no routing, return a routing of zero tokens.
        """
        routing, self.routing = self.routing, None
        if routing is None:
            routing = self.route(self.router.weight.new_zeros(0, self.router.in_features))
        return routing

    @property
    def out(self) -> GroupedLinear:
        """The experts' last linear layer, whose output is added to the residual stream."""
        return self.experts.out


def dispatch(experts: PlainExperts | GatedExperts, x_NW: Tensor, routing: Routing) -> Tensor:
    """Sort the tokens by expert, apply the experts, and return the weighted sum of expert outputs for each token."""
    (N, W), K = x_NW.shape, routing.chosen_NK.shape[1]
    expert_A, order_A = routing.chosen_NK.flatten().sort(stable=True)
    inverse_A = torch.empty_like(order_A)
    inverse_A[order_A] = torch.arange(N * K, device=order_A.device)
    experts_X = torch.arange(len(experts.out.weight), device=order_A.device)
    groups = Groups(expert_A, torch.searchsorted(expert_A, experts_X, right=True, out_int32=True))
    y_AW = experts(x_NW.index_select(0, order_A // K), groups)
    y_NKW = y_AW.index_select(0, inverse_A).view(N, K, W)
    return (y_NKW * routing.gates_NK[..., None].to(y_NKW.dtype)).sum(dim=1)


def grouped_matmul(x_AI: Tensor, weight_XOI: Tensor, groups: Groups) -> Tensor:
    """Multiply each row by the matrix of its expert, and return rows (A, O). The rows are sorted by expert.

    This function uses torch's grouped kernel (torch 2.10 or later) if the numbers are fp32, bf16 or fp16. The kernel
    also requires that the size of each row is a multiple of 16 bytes, before and after the product. In all other cases,
    this function uses `padded_matmul`.
    """
    aligned = all(size * x_AI.element_size() % 16 == 0 for size in weight_XOI.shape[1:])
    if aligned and hasattr(F, "grouped_mm") and x_AI.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return F.grouped_mm(x_AI, weight_XOI.transpose(1, 2), offs=groups.ends_X)
    return padded_matmul(x_AI, weight_XOI, groups)


def padded_matmul(x_AI: Tensor, weight_XOI: Tensor, groups: Groups) -> Tensor:
    """Compute `grouped_matmul` on any version of torch: pad the rows of each expert to the row count of the busiest
    expert.

    All experts cost as much as the busiest expert, so the padding costs little if the experts have similar numbers of
    rows.
    """
    X, O, I = weight_XOI.shape  # noqa: E741
    loads_X = torch.diff(groups.ends_X, prepend=groups.ends_X.new_zeros(1))
    C = int(loads_X.max())
    rank_A = torch.arange(len(x_AI), device=x_AI.device) - (groups.ends_X - loads_X)[groups.expert_A]
    slot_A = groups.expert_A * C + rank_A
    padded_XCI = x_AI.new_zeros(X * C, I).index_copy(0, slot_A, x_AI).view(X, C, I)
    return torch.bmm(padded_XCI, weight_XOI.transpose(1, 2)).view(X * C, O).index_select(0, slot_A)


def naive_experts(experts: PlainExperts | GatedExperts, x_NW: Tensor, routing: Routing) -> Tensor:
    """Compute the experts in a loop. Tests and benchmarks use this function as the reference implementation."""
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
