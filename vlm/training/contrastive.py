"""Contrastive loss between the pictures and the texts of a batch, added to the caption loss (Zhai et al., 2023).

The vector of a picture is the mean of its features at the input of the decoder. The vector of a text is the mean of the
decoder's hidden states at the target positions when the decoder reads the prompt and the text without the picture. The
contrastive loss needs no further weights. The loss teaches the encoder to which pictures a text can belong.

For each pair of a picture and a text, the model decides whether the text belongs to the picture (binary
classification). A rank divides its batch into parts. The negatives of a picture are the other texts in the same part,
except texts that equal the picture's own text.

Letters in tensor names: rows (B), pictures (P), features of a picture (N), positions (T), width (W).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.batch import IGNORE, Batch
from vlm.fusion import Media
from vlm.model import VisionLanguageModel
from vlm.text.base import SLOT

SCALE = 10.0
"""Factor by which the cosine of two vectors is multiplied in the logit of the pair. In SigLIP, this factor is learned,
and 10 is only its initial value.
"""


class Contrast:
    """Weighted contrastive loss of a model, for batches with one picture per row.

    Args:
        model: model without a DDP wrapper.
        weight: factor by which the contrastive loss is multiplied.
    """

    def __init__(self, model: nn.Module, weight: float) -> None:
        assert isinstance(model, VisionLanguageModel)
        self._model, self._weight = model, weight
        self._features: list[Tensor] = []
        self._losses: list[Tensor] = []

    @contextmanager
    def keep_features(self) -> Iterator[None]:
        """Keep, for the method `loss`, the picture features that a forward pass inside the `with` block computes."""
        self._features.clear()
        hook = self._model.projector.register_forward_hook(lambda *call: self._features.append(call[2]))
        try:
            yield
        finally:
            hook.remove()

    def loss(self, batch: Batch) -> Tensor:
        """Return the weighted loss of a batch, whose forward pass must have run inside `keep_features`."""
        (features_PNW,) = self._features
        loss = sigmoid_loss(features_PNW.mean(dim=1), text_vectors(self._model, batch), _same_text(batch))
        self._losses.append(loss.detach())
        return self._weight * loss

    def take_mean(self) -> Tensor:
        """Return the mean of all unweighted losses since the last call of this function."""
        mean = torch.stack(self._losses).double().mean()
        self._losses.clear()
        return mean


def text_vectors(model: VisionLanguageModel, batch: Batch) -> Tensor:
    """Return the mean hidden state (B, W) at the target positions when the decoder reads the texts without pictures."""
    slots = model.config.num_slots
    tokens_BT, is_target_BT = batch.tokens_BT[:, slots:], batch.labels_BT[:, slots:] != IGNORE
    assert not (batch.tokens_BT[:, slots:] == SLOT).any(), "each row must have exactly one picture, before the text"
    x_BTW = model.decoder.embed(tokens_BT)
    nothing = Media(x_BTW.new_zeros(len(x_BTW), 1, x_BTW.shape[-1]), is_target_BT.new_zeros(*tokens_BT.shape, 1))
    states_BTW = model.decoder(x_BTW, mask=None, media=nothing)
    weights_BT = is_target_BT / is_target_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.einsum("bt,btw->bw", weights_BT.to(states_BTW.dtype), states_BTW)


def sigmoid_loss(pictures_BW: Tensor, texts_BW: Tensor, same_BB: Tensor) -> Tensor:
    """Compute SigLIP's loss: the binary cross entropy of all pairs, summed over texts and averaged over pictures.

    The logits get a bias of -log(B - 1), so that vectors with a cosine of 0 give the probability 1 / B. The value 1 / B
    is the share of matching pairs, because each picture matches one of the B texts.

    Args:
        pictures_BW: vectors of the pictures.
        texts_BW: vectors of the texts; row i belongs to picture i.
        same_BB: bool mask, True for two rows with equal texts, which are not negatives of each other.
    """
    pictures_BW, texts_BW = (F.normalize(vectors.float(), dim=-1) for vectors in (pictures_BW, texts_BW))
    B = len(pictures_BW)
    logits_BB = SCALE * pictures_BW @ texts_BW.T - math.log(max(B - 1, 1))
    own_BB = torch.eye(B, dtype=torch.bool, device=logits_BB.device)
    losses_BB = F.softplus(torch.where(own_BB, -logits_BB, logits_BB))
    return losses_BB.masked_fill(same_BB & ~own_BB, 0).sum() / B


def _same_text(batch: Batch) -> Tensor:
    """Return a mask (B, B) that is True where two rows have equal labels: equal texts after prompts of equal length."""
    return (batch.labels_BT[:, None] == batch.labels_BT[None]).all(dim=-1)
