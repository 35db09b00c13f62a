"""Caption loss and router losses for training, and losses per row for evaluation.

Letters in tensor names: batch (B), positions (T), vocabulary (V), tokens (N), chosen experts of a token (K), experts
(X).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.batch import IGNORE, Batch
from vlm.layers.moe import MoeMlp, Routing
from vlm.model import VisionLanguageModel
from vlm.training.parallel import global_sum


def token_loss(logits_NV: Tensor, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Compute the summed cross entropy, in nats, of the logits at the N target positions of a batch.

    If the rows of the batch have weights, the cross entropy of a row is multiplied by the weight of the row.

    The caller divides the sum by the number of target tokens of the global batch. If each rank computed its own mean, a
    token would have more weight on ranks with short captions.

    Args:
        logits_NV: logits of the target positions.
        batch: batch with the labels.
        label_smoothing: share of the target probability that is spread over all tokens (Szegedy et al., 2015).
    """
    is_target_BT = batch.labels_BT != IGNORE
    logits_NV, labels_N = logits_NV.float(), batch.labels_BT[is_target_BT]
    if batch.weights_B is None:
        return F.cross_entropy(logits_NV, labels_N, reduction="sum", label_smoothing=label_smoothing)
    losses_N = F.cross_entropy(logits_NV, labels_N, reduction="none", label_smoothing=label_smoothing)
    weights_N = batch.weights_B[:, None].expand_as(is_target_BT)[is_target_BT]
    return weights_N @ losses_N


def num_targets(batch: Batch) -> Tensor:
    """Count the target tokens of a batch, and return the number as a scalar tensor."""
    return (batch.labels_BT != IGNORE).sum()


@dataclass(frozen=True)
class RouterReport:
    """Router losses and expert load for the tokens of a global batch, without padding tokens.

    Attributes:
        balance: load-balance loss, averaged over layers; 1 if all experts get equally many tokens.
        z: router z loss, averaged over layers.
        load: dict from the name of a layer to the fraction of the layer's token assignments that each expert gets; the
            fractions of a layer sum to 1.
    """

    balance: float
    z: float
    load: dict[str, tuple[float, ...]]

    @classmethod
    def mean(cls, parts: Sequence[RouterReport]) -> RouterReport:
        """Average the router reports of the parts of a batch."""
        count = len(parts)
        load = {
            name: tuple(sum(shares) / count for shares in zip(*(part.load[name] for part in parts), strict=True))
            for name in parts[0].load
        }
        return cls(sum(part.balance for part in parts) / count, sum(part.z for part in parts) / count, load)


def routed_layers(model: nn.Module) -> dict[str, MoeMlp]:
    """Return a dict from block name to mixture of experts, for the blocks that have a mixture of experts."""
    return {name.removesuffix(".mlp"): part for name, part in model.named_modules() if isinstance(part, MoeMlp)}


def router_loss(layers: Mapping[str, MoeMlp], batch: Batch) -> tuple[Tensor, RouterReport]:
    """Compute load-balance loss (Fedus et al., 2021) and router z loss (Zoph et al., 2022) of the last training pass.

    The balance loss covers the batches of all ranks, without padding. The loss is n * sum(f * p) for n experts, where f
    is the fraction of the assignments that an expert gets, and p is the expert's mean probability. A balance loss per
    rank would be stricter and would depend on the number of ranks.

    Args:
        layers: result of `routed_layers`, which must be the same on every rank.
        batch: input batch of the last training pass.

    Returns:
        This rank's part of the weighted router loss, and the router report. The weighted router loss is the sum of the
        parts of all ranks.
    """
    valid_N = _valid_positions(batch).flatten().float()
    rank_sums = [
        _router_sums(layer.pop_routing(), valid_N if _is_decoder_layer(name) else None)
        for name, layer in layers.items()
    ]
    part = torch.zeros((), dtype=torch.float64, device=valid_N.device)
    balance, z, load = [], [], {}
    for (name, layer), local, total in zip(layers.items(), rank_sums, _sum_over_ranks(rank_sums), strict=True):
        tokens = total.tokens.clamp(min=1)
        load_X = total.chosen_X / (tokens * layer.top_k)
        cost_X = len(load_X) * load_X / tokens  # factor of each expert's probability in the balance loss
        part = part + layer.balance_weight * (cost_X * local.probability_X).sum() + layer.z_weight * local.z / tokens
        balance.append(float((cost_X * total.probability_X).sum()))
        z.append(float(total.z / tokens))
        load[name] = tuple(load_X.tolist())
    return part, RouterReport(sum(balance) / len(balance), sum(z) / len(z), load)


class _RouterSums(NamedTuple):
    """Sums for the router of a layer over all tokens that are not padding. The sums are the assignments per expert, the
    probabilities per expert, the z losses, and the number of tokens.
    """

    chosen_X: Tensor
    probability_X: Tensor
    z: Tensor
    tokens: Tensor


def _router_sums(routing: Routing, valid_N: Tensor | None) -> _RouterSums:
    logits_NX, K = routing.logits_NX, routing.chosen_NK.shape[1]
    if valid_N is None:
        valid_N = logits_NX.new_ones(len(logits_NX))
    chosen_X = logits_NX.new_zeros(logits_NX.shape[1])
    chosen_X.index_add_(0, routing.chosen_NK.flatten(), valid_N.repeat_interleave(K))
    z_N = logits_NX.logsumexp(dim=-1).square()
    return _RouterSums(chosen_X, valid_N @ logits_NX.softmax(dim=-1), valid_N @ z_N, valid_N.sum())


def _sum_over_ranks(rank_sums: list[_RouterSums]) -> list[_RouterSums]:
    """Add up the router sums of all ranks with a single all-reduce."""
    parts = [part for sums in rank_sums for part in sums]
    totals = global_sum(torch.cat([part.double().flatten() for part in parts]))
    flat = torch.split(totals, [part.numel() for part in parts])
    shaped = [total.view_as(part) for total, part in zip(flat, parts, strict=True)]
    return [_RouterSums(*shaped[i : i + 4]) for i in range(0, len(shaped), 4)]


def _is_decoder_layer(layer: str) -> bool:
    """Return True if a layer belongs to the decoder. Inputs of decoder layers can have padding, and inputs of encoder
    layers have no padding.
    """
    return layer.startswith("decoder.")


def _valid_positions(batch: Batch) -> Tensor:
    """Return a mask (B, T) that is True up to the last target of each row. All positions after the last target are
    padding.
    """
    return (batch.labels_BT != IGNORE).flip(1).cumsum(dim=1).flip(1) > 0


@torch.no_grad()
def row_losses(model: VisionLanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute the summed loss (B,) and the number of target tokens (B,) of each row."""
    losses_B, tokens_B, _ = row_scores(model, batch)
    return losses_B, tokens_B


@torch.no_grad()
def row_scores(model: VisionLanguageModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Compute, for each row, the summed loss, the number of target tokens and the number of correctly predicted tokens.

    Each of the three results has shape (B,).
    """
    is_target_BT = batch.labels_BT != IGNORE
    logits_NV, labels_N = model(batch).float(), batch.labels_BT[is_target_BT]
    losses_BT = torch.zeros(is_target_BT.shape, device=labels_N.device)
    losses_BT[is_target_BT] = F.cross_entropy(logits_NV, labels_N, reduction="none")
    hits_BT = torch.zeros_like(is_target_BT)
    hits_BT[is_target_BT] = logits_NV.argmax(dim=1) == labels_N
    return losses_BT.sum(dim=1), is_target_BT.sum(dim=1), hits_BT.sum(dim=1)


@torch.no_grad()
def blind_losses(model: VisionLanguageModel, batch: Batch, other_pixels_PHWC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute, for each row, the loss with the row's own picture, the loss with another picture, and the number of
    target tokens.

    Each of the three results has shape (B,). The losses are sums over target tokens. The blind gap of a set of rows is
    the total loss with other pictures minus the total loss with the right pictures, divided by the number of target
    tokens. The unit is nats per token. If a model ignores its pictures, its blind gap is zero, however large or small
    the loss is.
    """
    right_B, tokens_B = row_losses(model, batch)
    wrong_B, _ = row_losses(model, batch.with_pixels(other_pixels_PHWC))
    return right_B, wrong_B, tokens_B
