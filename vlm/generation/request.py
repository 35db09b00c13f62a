"""Requests and completions of text generation, and the prefill step, which encodes pictures and prefixes.

Letters in tensor names: requests (B), positions (T), pictures (P), features of a picture (N), width (W), vocabulary
(V).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlm.config import GenerationConfig
from vlm.errors import UserError
from vlm.generation.finite import not_finite
from vlm.layers.cache import KVCache
from vlm.model import VisionLanguageModel
from vlm.seeds import mix
from vlm.text.base import SLOT


@dataclass(frozen=True)
class Request:
    """Request for one completion.

    Attributes:
        prefix: token ids before the answer, with SLOT at the positions of pictures (`vlm.text.prompt`).
        pixels: uint8 pictures (H, W, 3) at model resolution, in the order of their slots; empty for a prompt without
            pictures.
        seed: seed of the request; sampling uses different random numbers for requests with different seeds, even if
            their pictures and prompts are equal.
    """

    prefix: Sequence[int]
    pixels: Sequence[Tensor] = ()
    seed: int = 0


@dataclass
class Completion:
    """Generated tokens and text of one request.

    Attributes:
        tokens: generated token ids, without the end token.
        logprobs: log-probability, in nats, of each generated token under the model, before repetition penalty,
            temperature and filters. If the end token was generated, its log-probability is the last number.
        text: text of the decoded tokens, cut before the first stop string.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""

    @property
    def num_tokens(self) -> int:
        """Number of generated tokens, including the end token."""
        return len(self.logprobs)

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of the generated tokens, in nats, including the end token."""
        return sum(self.logprobs) / len(self.logprobs)


def check_length(model: VisionLanguageModel, request: Request, settings: GenerationConfig) -> None:
    """Check that the prefix and the longest allowed answer of a request fit the model's context.

    Raises:
        UserError: the prefix and `max_new_tokens` together are longer than the context.
    """
    context = model.config.decoder.context
    if len(request.prefix) + settings.max_new_tokens > context:
        raise UserError(
            "the answer does not fit the model's context",
            where="generation",
            got=f"{len(request.prefix)} positions for the picture and the prompt, plus "
            f"{settings.max_new_tokens} new tokens",
            fix=f"shorten the prompt or lower max_new_tokens: the context has {context} positions",
        )


def prefill(
    model: VisionLanguageModel, requests: Sequence[Request], settings: GenerationConfig
) -> tuple[Tensor, KVCache]:
    """Return the logits (B, V) of the first answer tokens, and a key-value cache of the prefixes with space for the
    answers.

    Raises:
        UserError: a request does not fit the model's context, or the logits contain NaN or infinity.
        ValueError: the number of slots of a request does not match the number of pictures of the request.
    """
    for request in requests:
        check_length(model, request, settings)
        slots = sum(token == SLOT for token in request.prefix)
        if slots != len(request.pixels) * model.config.num_slots:
            raise ValueError(
                f"the request has {slots} image slots, but {len(request.pixels)} pictures need "
                f"{model.config.num_slots} slots each"
            )
    device = model.mean.device
    T = max(len(request.prefix) for request in requests)
    padding = [T - len(request.prefix) for request in requests]
    rows = [[0] * pad + list(request.prefix) for pad, request in zip(padding, requests, strict=True)]
    cache = model.new_cache(len(requests), T + settings.max_new_tokens)
    padding_B = torch.tensor(padding, device=device) if any(padding) else None
    logits_BV = model.prefill(picture_features(model, requests), torch.tensor(rows, device=device), cache, padding_B)
    if not bool(logits_BV.isfinite().all()):
        raise not_finite(model)
    return logits_BV, cache


def picture_features(model: VisionLanguageModel, requests: Sequence[Request]) -> Tensor:
    """Compute features (P, N, W) of all pictures, in the order of their slots. Equal pictures are encoded only once."""
    index_by_content: dict[bytes, int] = {}
    distinct: list[Tensor] = []
    order: list[int] = []
    for picture in (picture for request in requests for picture in request.pixels):
        index = index_by_content.setdefault(_bytes(picture), len(index_by_content))
        order.append(index)
        if index == len(distinct):
            distinct.append(picture)
    if not distinct:
        return model.mean.new_zeros(0, model.config.num_features, model.config.decoder.transformer.width)
    features_PNW = model.encode(torch.stack(distinct).to(model.mean.device))
    return features_PNW if len(order) == len(distinct) else features_PNW[order]


def request_seed(request: Request, settings: GenerationConfig) -> int:
    """Compute the random seed of a request from `settings.seed` and the request's seed, pictures and prompt."""
    checksums = [zlib.crc32(_bytes(picture)) for picture in request.pixels]
    return mix(settings.seed, request.seed, *checksums, *(token - SLOT for token in request.prefix))


def _bytes(picture_HWC: Tensor) -> bytes:
    return picture_HWC.contiguous().cpu().numpy().tobytes()
