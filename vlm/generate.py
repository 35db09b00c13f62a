"""From picture to text: the prefix once, then one token at a time from the cache.

Of the special tokens only the end token can be generated.

Letters: B batch, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlm.config import GenerationConfig
from vlm.errors import UserError
from vlm.model import VisionLanguageModel
from vlm.seeds import mix
from vlm.text.base import NUM_SPECIAL


@dataclass
class Generated:
    """One answer: its tokens without the end token, and the log-probability of each token, end token included."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens generated, the end token included."""
        return len(self.logprobs)


def generate(
    model: VisionLanguageModel,
    pixels_BHWC: Tensor,
    prefix: Sequence[int],
    settings: GenerationConfig,
    eos_id: int,
) -> list[Generated]:
    """Answers for a batch of pictures that share one prefix.

    A sampled answer is seeded by the settings and the picture itself, so no answer depends on its batch.

    Raises:
        UserError: the prefix and `max_new_tokens` do not fit the model's context.
    """
    answers = [Generated() for _ in range(len(pixels_BHWC))]
    for step in _steps(model, pixels_BHWC, prefix, settings, eos_id):
        for answer, (token, logprob) in zip(answers, step, strict=True):
            if token is not None:
                answer.logprobs.append(logprob)
                if token != eos_id:
                    answer.tokens.append(token)
    return answers


def stream(
    model: VisionLanguageModel, pixels_HWC: Tensor, prefix: Sequence[int], settings: GenerationConfig, eos_id: int
) -> Iterator[int]:
    """Token ids of one picture's answer as they come, the end token left out."""
    for ((token, _),) in _steps(model, pixels_HWC[None], prefix, settings, eos_id):
        if token is not None and token != eos_id:
            yield token


@torch.inference_mode()
def _steps(
    model: VisionLanguageModel,
    pixels_BHWC: Tensor,
    prefix: Sequence[int],
    settings: GenerationConfig,
    eos_id: int,
) -> Iterator[list[tuple[int | None, float]]]:
    """(token, log-probability) of each row, step by step; token None once a row has ended."""
    needed = len(prefix) + settings.max_new_tokens
    if needed > model.config.decoder.context:
        raise UserError(
            "the answer does not fit the model's context",
            where="generation",
            got=f"{len(prefix)} positions of picture and prompt and {settings.max_new_tokens} new tokens",
            fix=f"shorten the prompt or max_new_tokens: the context is {model.config.decoder.context}",
        )
    device = model.mean.device
    B = len(pixels_BHWC)
    generators = [_generator(settings.seed, picture, device) for picture in pixels_BHWC]
    cache = model.new_cache(B, needed)
    prefix_BT = torch.tensor(prefix, device=device).expand(B, -1)
    silenced = torch.tensor([i for i in range(NUM_SPECIAL) if i != eos_id], device=device)
    logits_BV = model.prefill(model.encode(pixels_BHWC.to(device)), prefix_BT, cache)
    ended_B = torch.zeros(B, dtype=torch.bool, device=device)
    for position in range(settings.max_new_tokens):
        logits_BV = logits_BV.float().index_fill(1, silenced, -torch.inf)
        tokens_B, logprobs_B = _choose(logits_BV, settings, generators)
        yield [
            (None if done else token, logprob)
            for done, token, logprob in zip(ended_B.tolist(), tokens_B.tolist(), logprobs_B.tolist(), strict=True)
        ]
        ended_B |= tokens_B == eos_id
        if bool(ended_B.all()) or position == settings.max_new_tokens - 1:
            return
        logits_BV = model.step(tokens_B, cache)


def _choose(
    logits_BV: Tensor, settings: GenerationConfig, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """Next tokens and their log-probabilities under the model (not under the narrowed sampling distribution)."""
    logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
    if settings.temperature == 0:
        tokens_B = logits_BV.argmax(dim=-1)
    else:
        probs_BV = torch.softmax(_narrow(logits_BV / settings.temperature, settings), dim=-1)
        drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(probs_BV, generators, strict=True)]
        tokens_B = torch.cat(drawn)
    return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0]


def _narrow(logits_BV: Tensor, settings: GenerationConfig) -> Tensor:
    """Logits with everything outside top-k and top-p (nucleus; Holtzman et al., 2019) at minus infinity."""
    if settings.top_k is not None:
        kth_B1 = logits_BV.topk(min(settings.top_k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    if settings.top_p < 1:
        ordered_BV, index_BV = logits_BV.sort(dim=-1, descending=True)
        probs_BV = torch.softmax(ordered_BV, dim=-1)
        beyond_BV = probs_BV.cumsum(dim=-1) - probs_BV >= settings.top_p
        logits_BV = logits_BV.masked_fill(beyond_BV.gather(-1, index_BV.argsort(dim=-1)), -torch.inf)
    return logits_BV


def _generator(seed: int, picture_HWC: Tensor, device: torch.device) -> torch.Generator:
    fingerprint = zlib.crc32(picture_HWC.contiguous().cpu().numpy().tobytes())
    return torch.Generator(device).manual_seed(mix(seed, fingerprint))
