"""What training minimises, and the question every captioner must answer: does it look?

Letters: B batch, T positions, V vocabulary, N tokens, K experts chosen by a token, X experts.
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


def token_loss(logits_NV: Tensor, batch: Batch) -> Tensor:
    """Summed cross entropy, in nats, of the model's logits at the N target positions of a batch.

    A sum, not a mean: the caller divides by the tokens of the *global* batch, so that a rank with short captions does
    not count for more.
    """
    labels_BT = batch.labels_BT
    return F.cross_entropy(logits_NV.float(), labels_BT[labels_BT != IGNORE], reduction="sum")


def num_targets(batch: Batch) -> Tensor:
    """Target tokens of a batch, a scalar."""
    return (batch.labels_BT != IGNORE).sum()


@dataclass(frozen=True)
class RouterReport:
    """What the routers of a model did with the real tokens of a global batch.

    Attributes:
        balance: load-balance loss, the mean of the layers; 1 where all experts get as much.
        z: router z loss, the mean of the layers.
        load: by layer, the share of each expert in the layer's assignments; a layer's shares add up to 1.
    """

    balance: float
    z: float
    load: dict[str, tuple[float, ...]]

    @classmethod
    def mean(cls, parts: Sequence[RouterReport]) -> RouterReport:
        """What routers did with the parts of a batch."""
        count = len(parts)
        load = {
            name: tuple(sum(shares) / count for shares in zip(*(part.load[name] for part in parts), strict=True))
            for name in parts[0].load
        }
        return cls(sum(part.balance for part in parts) / count, sum(part.z for part in parts) / count, load)


def routed_layers(model: nn.Module) -> dict[str, MoeMlp]:
    """The mixtures of experts of a model, by the name of their block; empty for a dense model."""
    return {name.removesuffix(".mlp"): part for name, part in model.named_modules() if isinstance(part, MoeMlp)}


def router_loss(layers: Mapping[str, MoeMlp], batch: Batch) -> tuple[Tensor, RouterReport]:
    """Load-balance loss (Fedus et al., 2021) and router z loss (Zoph et al., 2022) of the last training forward.

    The balance is that of the *global* batch's real tokens: an expert's share of the assignments on all ranks, times
    its mean probability. Balancing each rank's part by itself would ask for more, and differ by the number of ranks.

    Args:
        layers: of `routed_layers`, the same on every rank.
        batch: what the model was called with.

    Returns:
        This rank's part of the weighted loss (the parts of all ranks add up to it), and what there is to tell.
    """
    real_N = _real_positions(batch).flatten().float()
    own = [_router_sums(layer.pop_routing(), real_N if _reads_text(name) else None) for name, layer in layers.items()]
    part = torch.zeros((), dtype=torch.float64, device=real_N.device)
    balance, z, load = [], [], {}
    for (name, layer), mine, everyone in zip(layers.items(), own, _over_ranks(own), strict=True):
        tokens = everyone.tokens.clamp(min=1)
        load_X = everyone.chosen_X / (tokens * layer.top_k)
        pull_X = len(load_X) * load_X / tokens  # what a unit of an expert's probability costs, whoever's token it is
        part = part + layer.balance_weight * (pull_X * mine.probability_X).sum() + layer.z_weight * mine.z / tokens
        balance.append(float((pull_X * everyone.probability_X).sum()))
        z.append(float(everyone.z / tokens))
        load[name] = tuple(load_X.tolist())
    return part, RouterReport(sum(balance) / len(balance), sum(z) / len(z), load)


class _RouterSums(NamedTuple):
    """Sums over a layer's real tokens: assignments, probabilities, squared log-partitions, and how many tokens."""

    chosen_X: Tensor
    probability_X: Tensor
    z: Tensor
    tokens: Tensor


def _router_sums(routing: Routing, real_N: Tensor | None) -> _RouterSums:
    logits_NX, K = routing.logits_NX, routing.chosen_NK.shape[1]
    if real_N is None:
        real_N = logits_NX.new_ones(len(logits_NX))
    chosen_X = logits_NX.new_zeros(logits_NX.shape[1])
    chosen_X.index_add_(0, routing.chosen_NK.flatten(), real_N.repeat_interleave(K))
    z_N = logits_NX.logsumexp(dim=-1).square()
    return _RouterSums(chosen_X, real_N @ logits_NX.softmax(dim=-1), real_N @ z_N, real_N.sum())


def _over_ranks(own: list[_RouterSums]) -> list[_RouterSums]:
    """The sums of all ranks, in one message."""
    parts = [part for sums in own for part in sums]
    totals = global_sum(torch.cat([part.double().flatten() for part in parts]))
    each = torch.split(totals, [part.numel() for part in parts])
    shaped = [total.view_as(part) for total, part in zip(each, parts, strict=True)]
    return [_RouterSums(*shaped[i : i + 4]) for i in range(0, len(shaped), 4)]


def _reads_text(layer: str) -> bool:
    """Whether a layer's tokens are the positions of the batch (the encoder's are patches, and all of them real)."""
    return layer.startswith("decoder.")


def _real_positions(batch: Batch) -> Tensor:
    """True up to a row's last target: what comes after it is padding. Shape (B, T)."""
    return (batch.labels_BT != IGNORE).flip(1).cumsum(dim=1).flip(1) > 0


@torch.no_grad()
def row_losses(model: VisionLanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed loss and number of target tokens of each row: (B,) each."""
    losses_B, tokens_B, _ = row_scores(model, batch)
    return losses_B, tokens_B


@torch.no_grad()
def row_scores(model: VisionLanguageModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, target tokens, and those of them that the model holds likeliest, of each row: (B,) each."""
    is_target_BT = batch.labels_BT != IGNORE
    logits_NV, labels_N = model(batch).float(), batch.labels_BT[is_target_BT]
    losses_BT = torch.zeros(is_target_BT.shape, device=labels_N.device)
    losses_BT[is_target_BT] = F.cross_entropy(logits_NV, labels_N, reduction="none")
    hits_BT = torch.zeros_like(is_target_BT)
    hits_BT[is_target_BT] = logits_NV.argmax(dim=1) == labels_N
    return losses_BT.sum(dim=1), is_target_BT.sum(dim=1), hits_BT.sum(dim=1)


@torch.no_grad()
def blind_losses(model: VisionLanguageModel, batch: Batch, other_pixels_PHWC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses with the right pictures, with the pictures of other rows, and target tokens: (B,) each.

    The blind gap of any set of rows is (sum of the second - sum of the first) / sum of the third, in nats per token:
    zero for a model that does not look at its pictures, however good its loss.
    """
    right_B, tokens_B = row_losses(model, batch)
    wrong_B, _ = row_losses(model, batch.with_pixels(other_pixels_PHWC))
    return right_B, wrong_B, tokens_B
