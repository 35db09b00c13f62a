"""What is asked and what is answered, and the first pass over what is asked: every picture once, every prefix once.

Letters: B requests, T positions, P pictures, N features of a picture, W width, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlm.config import GenerationConfig
from vlm.errors import UserError
from vlm.layers.cache import KVCache
from vlm.model import VisionLanguageModel
from vlm.seeds import mix
from vlm.text.base import SLOT


@dataclass(frozen=True)
class Request:
    """One thing to answer.

    Attributes:
        prefix: token ids before the answer, SLOT in the places of pictures (`vlm.text.prompt`).
        pixels: uint8 (H, W, 3) at model resolution, in the order of their slots; none where the prompt is text alone.
        seed: tells apart several draws for the same pictures and prompt.
    """

    prefix: Sequence[int]
    pixels: Sequence[Tensor] = ()
    seed: int = 0


@dataclass
class Completion:
    """One answer.

    Attributes:
        tokens: as generated, without the end token.
        logprobs: of each token under the model, before any narrowing or penalty, the end token's included, in nats.
        text: the tokens decoded, cut off where a stop string begins.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens generated, the end token included."""
        return len(self.logprobs)

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of these tokens, in nats."""
        return sum(self.logprobs) / len(self.logprobs)


def check_length(model: VisionLanguageModel, request: Request, settings: GenerationConfig) -> None:
    """Refuse what the model's context cannot hold: an answer is never made from a prompt that was cut.

    Raises:
        UserError: the prefix and `max_new_tokens` together are longer than the context.
    """
    context = model.config.decoder.context
    if len(request.prefix) + settings.max_new_tokens > context:
        raise UserError(
            "the answer does not fit the model's context",
            where="generation",
            got=f"{len(request.prefix)} positions of picture and prompt and {settings.max_new_tokens} new tokens",
            fix=f"shorten the prompt or max_new_tokens: the context is {context}",
        )


def prefill(
    model: VisionLanguageModel, requests: Sequence[Request], settings: GenerationConfig
) -> tuple[Tensor, KVCache]:
    """Logits (B, V) of the first tokens, and a cache with the prefixes and room for the answers.

    Raises:
        UserError: a request does not fit the context.
        ValueError: a request has not as many slots as its pictures take.
    """
    for request in requests:
        check_length(model, request, settings)
        slots = sum(token == SLOT for token in request.prefix)
        if slots != len(request.pixels) * model.config.num_slots:
            raise ValueError(
                f"{slots} image slots for {len(request.pixels)} pictures with {model.config.num_slots} slots each"
            )
    device = model.mean.device
    T = max(len(request.prefix) for request in requests)
    padding = [T - len(request.prefix) for request in requests]
    rows = [[0] * pad + list(request.prefix) for pad, request in zip(padding, requests, strict=True)]
    cache = model.new_cache(len(requests), T + settings.max_new_tokens)
    padding_B = torch.tensor(padding, device=device) if any(padding) else None
    return model.prefill(_features(model, requests), torch.tensor(rows, device=device), cache, padding_B), cache


def _features(model: VisionLanguageModel, requests: Sequence[Request]) -> Tensor:
    """Features (P, N, W) of all pictures, in the order of their slots; equal pictures pass the encoder once."""
    places: dict[bytes, int] = {}
    distinct: list[Tensor] = []
    order: list[int] = []
    for picture in (picture for request in requests for picture in request.pixels):
        place = places.setdefault(_bytes(picture), len(places))
        order.append(place)
        if place == len(distinct):
            distinct.append(picture)
    if not distinct:
        return model.mean.new_zeros(0, model.config.num_features, model.config.decoder.transformer.width)
    features_PNW = model.encode(torch.stack(distinct).to(model.mean.device))
    return features_PNW if len(order) == len(distinct) else features_PNW[order]


def request_seed(request: Request, settings: GenerationConfig) -> int:
    """A seed that follows from the settings, the request's own seed, its pictures and its prompt, and nothing else."""
    prints = [zlib.crc32(_bytes(picture)) for picture in request.pixels]
    return mix(settings.seed, request.seed, *prints, *(token - SLOT for token in request.prefix))


def _bytes(picture_HWC: Tensor) -> bytes:
    return picture_HWC.contiguous().cpu().numpy().tobytes()
