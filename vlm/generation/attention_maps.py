"""Attention maps, which show where in a picture a model looks when the model generates each token of an answer.

One forward pass reads the picture, the prompt and the whole answer. In this forward pass, the attention layers of the
encoder, the attention pooling, the resampler and the decoder keep their attention weights. If the decoder has
cross-attention layers, only these layers of the decoder keep their attention weights. The weights of the decoder show
which features of the picture a token reads. The attention rollout of the encoder (Abnar and Zuidema, 2020) shows how
much each patch of the picture contributes to each feature.

Letters in tensor names: tokens of the answer (T), layers (L), heads (H), features of the picture (N), patches (P),
keys (S), positions of the encoder (X), latents of a resampler (Q).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm.batch import Batch
from vlm.fusion import GatedCrossBlock
from vlm.generation.request import Completion, Request
from vlm.layers.attention import Attention, CrossAttention, record_weights
from vlm.layers.block import Block
from vlm.model import VisionLanguageModel
from vlm.projector import PixelShuffle, Resampler, ResamplerBlock
from vlm.text.base import SLOT, Tokenizer
from vlm.vision import VisionEncoder


@dataclass(frozen=True)
class AttentionMaps:
    """Attention maps of an answer, which say how much each token of the answer attends to each part of the picture.

    Attributes:
        text: the answer.
        spans: for each token, the index of its first character in the answer, and the index after its last character.
        decoder_TLHN: attention weights of the decoder, by token, layer, head and picture feature. For each token, the
            weights are the attention weights of the position that predicts the token. In a model with image slots, the
            position that predicts a token also attends to the text, so the weights over the features sum to at most 1.
            In a model with cross-attention, the layers are the cross-attention layers, and the weights over the
            features sum to 1.
        rollout_NP: share of each feature that comes from each patch, from 0 to 1. The patches are ordered by the rows
            of the picture, from top to bottom. If the encoder also has a class token or registers, or if the projector
            is a resampler, the shares of all patches in a feature sum to less than 1.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    decoder_TLHN: Tensor
    rollout_NP: Tensor

    def patches(self) -> Tensor:
        """Return the attention of each token to each patch, (T, side, side), as a mean over layers and heads.

        Example:
            >>> import vlm
            >>> from PIL import Image
            >>> captioner = vlm.build("nano_tiny", ["a red square"])
            >>> maps = captioner.attention(Image.new("RGB", (64, 64), "red"), max_new_tokens=6)
            >>> [patches.shape for patches in maps.patches()] == [(4, 4)] * len(maps.spans)
            True
        """
        side = math.isqrt(self.rollout_NP.shape[1])
        return (self.decoder_TLHN.mean(dim=(1, 2)) @ self.rollout_NP).view(-1, side, side)

    def words(self) -> list[tuple[str, Tensor]]:
        """Return each word of the answer with the mean attention map (side, side) of its tokens.

        Example:
            >>> import vlm
            >>> from PIL import Image
            >>> captioner = vlm.build("nano_tiny", ["a red square"])
            >>> maps = captioner.attention(Image.new("RGB", (64, 64), "red"), max_new_tokens=6)
            >>> [word for word, patches in maps.words()] == maps.text.split()
            True
        """
        patches_TYX = self.patches()
        return [(word, patches_TYX[inside].mean(dim=0)) for word, inside in self._tokens_of_words()]

    def picture_shares(self) -> list[tuple[str, float]]:
        """Return each word of the answer with the share of its attention that goes to the picture, from 0 to 1.

        The share is a mean over the tokens of the word, and over the layers and heads of the decoder. In a model with
        cross-attention, each share is 1.

        Example:
            >>> import vlm
            >>> from PIL import Image
            >>> captioner = vlm.build("nano_tiny", ["a red square"])
            >>> maps = captioner.attention(Image.new("RGB", (64, 64), "red"), max_new_tokens=6)
            >>> all(0 < share < 1 for word, share in maps.picture_shares())
            True
        """
        shares_T = self.decoder_TLHN.sum(dim=-1).mean(dim=(1, 2))
        return [(word, float(shares_T[inside].mean())) for word, inside in self._tokens_of_words()]

    def _tokens_of_words(self) -> list[tuple[str, list[bool]]]:
        """Return each word of the answer with one flag for each token, which is True if the token is a part of the
        word.
        """
        return [
            (word[0], [start < word.end() and end > word.start() for start, end in self.spans])
            for word in re.finditer(r"\S+", self.text)
        ]


@torch.inference_mode()
def attention_maps(
    model: VisionLanguageModel, tokenizer: Tokenizer, request: Request, completion: Completion
) -> AttentionMaps:
    """Compute the attention of a completion to the picture of its request, which must have exactly one picture."""
    assert len(request.pixels) == 1, "attention maps need exactly one picture"
    assert isinstance(model.encoder, VisionEncoder), "a text-only model accepts no picture"
    cross: list[Attention | CrossAttention] = [
        block.attention for block in model.decoder.cross_blocks if isinstance(block, GatedCrossBlock)
    ]
    decoder = cross or _self_attention(model.decoder.blocks)
    encoder = _self_attention(model.encoder.blocks)
    pool = [] if model.encoder.pool is None else [model.encoder.pool.attention]
    resampler = _resampler_attention(model.projector)
    row = [*request.prefix, *completion.tokens]
    tokens_1T = torch.tensor([row], device=model.mean.device)
    pixels_1HWC = torch.stack(list(request.pixels)).to(model.mean.device)
    prefix_1 = torch.tensor([len(request.prefix)], device=model.mean.device)
    with record_weights([*encoder, *pool, *resampler, *decoder]) as recorded:
        model.hidden_states(Batch(pixels_1HWC, tokens_1T, tokens_1T, prefix_1))
    weights = [layer[0][0].float().cpu() for layer in recorded]  # one tensor (H, T, S) per layer
    encoder_LHXX, rest = weights[: len(encoder)], weights[len(encoder) :]
    pool_HNP, rest = rest[: len(pool)], rest[len(pool) :]
    resampler_LHQS, decoder_LHTS = rest[: len(resampler)], rest[len(resampler) :]
    first = len(request.prefix) - 1  # position that predicts the first token of the answer
    keys = slice(None) if cross else [index for index, token in enumerate(row) if token == SLOT]
    decoder_LHTN = torch.stack(decoder_LHTS)[:, :, first : len(row) - 1, keys]
    features_NP = pool_shares(model.encoder, rollout(encoder_LHXX), pool_HNP)
    return AttentionMaps(
        text=completion.text,
        spans=_spans(tokenizer, completion),
        decoder_TLHN=decoder_LHTN.permute(2, 0, 1, 3),
        rollout_NP=project_shares(model.projector, features_NP, resampler_LHQS),
    )


def _self_attention(blocks: Iterable[nn.Module]) -> list[Attention | CrossAttention]:
    return [block.attention for block in blocks if isinstance(block, Block)]


def _resampler_attention(projector: nn.Module) -> list[Attention | CrossAttention]:
    blocks = projector.blocks if isinstance(projector, Resampler) else ()
    return [block.attention for block in blocks if isinstance(block, ResamplerBlock)]


def rollout(weights_LHXX: Sequence[Tensor]) -> Tensor:
    """Use attention rollout to compute how much each input of a stack of layers contributes to each output (X, X).

    Attention rollout assumes that half of a layer's output is the input at the same position (the residual connection).
    The other half of the output is the attention, averaged over the heads.
    """
    shares_XX = torch.eye(weights_LHXX[0].shape[-1], dtype=torch.float32, device="cpu")
    for weights_HXX in weights_LHXX:
        shares_XX = (shares_XX + weights_HXX.mean(dim=0) @ shares_XX) / 2
    return shares_XX


def pool_shares(encoder: VisionEncoder, shares_XX: Tensor, pool_HNP: Sequence[Tensor]) -> Tensor:
    """Return how much each patch contributes to each output of the encoder."""
    shares_XP = shares_XX[:, encoder.num_extra :]
    if encoder.select == "cls":
        return shares_XP[:1]
    shares_PP = shares_XP[encoder.num_extra :]
    if pool_HNP:
        return pool_HNP[0].mean(dim=0) @ shares_PP
    return shares_PP.mean(dim=0, keepdim=True) if encoder.select == "mean" else shares_PP


def project_shares(projector: nn.Module, shares_NP: Tensor, resampler_LHQS: Sequence[Tensor]) -> Tensor:
    """Compute how much each patch contributes to each output of the projector, given how much each patch contributes to
    each input of the projector.
    """
    if isinstance(projector, PixelShuffle):
        side, f = math.isqrt(len(shares_NP)) // projector.factor, projector.factor
        squares = shares_NP.view(side, f, side, f, -1)
        return squares.mean(dim=(1, 3)).flatten(0, 1)
    if not resampler_LHQS:
        return shares_NP
    # Before the first block, the latents contain no information about the picture, so their shares are zero. Each block
    # of the resampler reads the picture and the latents.
    shares_QP = shares_NP.new_zeros(resampler_LHQS[0].shape[1], shares_NP.shape[1])
    for weights_HQS in resampler_LHQS:
        attended_QP = weights_HQS.mean(dim=0) @ torch.cat((shares_NP, shares_QP))
        shares_QP = (shares_QP + attended_QP) / 2
    return shares_QP


def _spans(tokenizer: Tokenizer, completion: Completion) -> tuple[tuple[int, int], ...]:
    """Return, for each token of a completion, the span of the token's characters in the text of the completion.

    The text of a completion ends before a stop string, so later tokens have empty spans. If several byte tokens form a
    character, the last of these tokens has the span of the whole character, and the earlier tokens have empty spans.
    """
    ends = [0]
    for count in range(1, len(completion.tokens) + 1):
        text = tokenizer.decode(completion.tokens[:count])
        equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, completion.text, strict=False))
        ends.append(max(ends[-1], len(list(equal))))
    return tuple(itertools.pairwise(ends))
