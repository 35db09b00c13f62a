"""Choice of the next token, either the best token or a random token, after repetition penalty, temperature and filters.

The settings have the same meaning as in transformers' `generate` and are applied in the same order: repetition penalty,
temperature, top-k, top-p, min-p.

Letters in tensor names: batch (B), new tokens (N), vocabulary (V).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm.config import GenerationConfig
from vlm.generation.request import Request, request_seed
from vlm.text.base import SLOT

MIN_TEMPERATURE = 1e-200
"""Lowest temperature that is used, because the reciprocal of a lower temperature may be infinite. At this temperature,
only the tokens with exactly the best score have a probability above 0.
"""


class TokenSampler:
    """Sampler that chooses the next token of every row. At temperature 0, the sampler chooses the most likely token,
    and at a higher temperature a random token.

    The random numbers of a row depend only on the request and the settings, so a completion does not depend on the
    other rows of the batch.
    """

    def __init__(
        self, requests: Sequence[Request], settings: GenerationConfig, vocab_size: int, device: torch.device
    ) -> None:
        self._settings = settings
        self._penalty = RepetitionPenalty(settings.repetition_penalty, requests, vocab_size, device)
        random_numbers = [
            torch.rand(
                settings.max_new_tokens,
                dtype=torch.float64,
                device="cpu",
                generator=torch.Generator("cpu").manual_seed(request_seed(request, settings)),
            )
            for request in requests
        ]
        self._uniform_BN = torch.stack(random_numbers).to(device)

    def __call__(self, logits_BV: Tensor, position: int) -> Tensor:
        """Choose the next token of each row (B,). The new token has the index `position` in its completion."""
        scores_BV = self._penalty(logits_BV)
        if self._settings.temperature == 0:
            tokens_B = scores_BV.argmax(dim=-1)
        else:
            tokens_B = sample_tokens(filter_scores(scores_BV, self._settings), self._uniform_BN[:, position])
        self._penalty.add(tokens_B)
        return tokens_B

    def reorder(self, rows_B: Tensor) -> None:
        """Replace each row i by a copy of the old row `rows_B[i]`."""
        self._uniform_BN = self._uniform_BN[rows_B]
        self._penalty.reorder(rows_B)


class RepetitionPenalty:
    """Penalty for tokens that already occur in the prompt or completion of a row (Keskar et al., 2019).

    A positive score is divided by the factor, and a negative score is multiplied by the factor. A factor of 1 disables
    the penalty.
    """

    def __init__(self, factor: float, requests: Sequence[Request], vocab_size: int, device: torch.device) -> None:
        self._factor = factor
        self._seen_BV = torch.zeros(len(requests), vocab_size if factor != 1 else 0, dtype=torch.bool, device=device)
        if factor != 1:
            for seen_V, request in zip(self._seen_BV, requests, strict=True):
                seen_V[[token for token in request.prefix if token != SLOT]] = True

    def __call__(self, scores_BV: Tensor) -> Tensor:
        """Apply the repetition penalty to the scores of all tokens. If the factor is not 1, the result has double
        precision.
        """
        if self._factor == 1:
            return scores_BV
        scores_BV = scores_BV.double()  # the product with an extreme factor may be too large for single precision
        penalized_BV = torch.where(scores_BV < 0, scores_BV * self._factor, scores_BV / self._factor)
        return torch.where(self._seen_BV, penalized_BV, scores_BV)

    def add(self, tokens_B: Tensor) -> None:
        """Record that the new token of each row now occurs in the completion of the row."""
        if self._factor != 1:
            self._seen_BV.scatter_(1, tokens_B[:, None], True)

    def reorder(self, rows_B: Tensor) -> None:
        """Replace each row i by a copy of the old row `rows_B[i]`."""
        self._seen_BV = self._seen_BV[rows_B]


def sample_tokens(scores_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Sample one token for each row from the softmax of the row's scores, by inverse transform sampling.

    The caller passes the random numbers, so that every device chooses the same tokens. The cumulative sum has double
    precision, because single precision would lose the rare tokens of a large vocabulary. If a score is NaN, the result
    is the last token of the vocabulary.

    Args:
        scores_BV: scores of the tokens.
        uniform_B: for each row, a random number from [0, 1).
    """
    sum_BV = torch.softmax(scores_BV.double(), dim=-1).cumsum(dim=-1)
    tokens_B = torch.searchsorted(sum_BV, uniform_B[:, None] * sum_BV[:, -1:], right=True)[:, 0]
    # If a score is NaN, the search returns the size of the vocabulary. On a GPU, an index that is out of range would
    # end the process.
    return tokens_B.clamp(max=scores_BV.shape[-1] - 1)


def filter_scores(scores_BV: Tensor, settings: GenerationConfig) -> Tensor:
    """Divide scores by the temperature, and set the scores of tokens outside top-k, top-p and min-p to minus infinity.

    The best score is subtracted first, so that no temperature leads to an infinite best score. The result has double
    precision, and its largest score is 0.

    The top-p filter is nucleus sampling (Holtzman et al., 2019). The min-p filter removes tokens whose probability is
    below `min_p` times the probability of the best token (Nguyen et al., 2024).
    """
    scores_BV = scores_BV.double()
    best_B1 = scores_BV.amax(dim=-1, keepdim=True)
    scores_BV = (scores_BV - best_B1) / max(settings.temperature, MIN_TEMPERATURE)
    if settings.top_k is not None:
        kth_B1 = scores_BV.topk(min(settings.top_k, scores_BV.shape[-1]), dim=-1).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < kth_B1, -torch.inf)
    if settings.top_p < 1:
        rising_BV, index_BV = scores_BV.sort(dim=-1)
        outside_BV = torch.softmax(rising_BV, dim=-1).cumsum(dim=-1) <= 1 - settings.top_p
        outside_BV[:, -1] = False
        scores_BV = scores_BV.masked_fill(outside_BV.scatter(1, index_BV, outside_BV), -torch.inf)
    if settings.min_p > 0:
        probs_BV = torch.softmax(scores_BV, dim=-1)
        outside_BV = probs_BV < settings.min_p * probs_BV.amax(dim=-1, keepdim=True)
        scores_BV = scores_BV.masked_fill(outside_BV, -torch.inf)
    return scores_BV
