"""What training minimises, and the question every captioner must answer: does it look?

Letters: B batch, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm.batch import IGNORE, Batch
from vlm.model import VisionLanguageModel


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


@torch.no_grad()
def row_losses(model: VisionLanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed loss and number of target tokens of each row: (B,) each."""
    is_target_BT = batch.labels_BT != IGNORE
    losses_BT = torch.zeros(batch.labels_BT.shape, device=batch.labels_BT.device)
    losses_BT[is_target_BT] = F.cross_entropy(model(batch).float(), batch.labels_BT[is_target_BT], reduction="none")
    return losses_BT.sum(dim=1), is_target_BT.sum(dim=1)


@torch.no_grad()
def blind_losses(model: VisionLanguageModel, batch: Batch, other_pixels_PHWC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses with the right pictures, with the pictures of other rows, and target tokens: (B,) each.

    The blind gap of any set of rows is (sum of the second - sum of the first) / sum of the third, in nats per token:
    zero for a model that does not look at its pictures, however good its loss.
    """
    right_B, tokens_B = row_losses(model, batch)
    wrong_B, _ = row_losses(model, batch.with_pixels(other_pixels_PHWC))
    return right_B, wrong_B, tokens_B
