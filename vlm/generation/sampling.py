"""Which token comes next: scores are penalised and narrowed, then the best is taken or one is drawn.

Order and meaning of the settings are those of transformers' `generate`: repetition penalty, temperature, top-k, top-p,
min-p.

Letters: B batch, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm.config import GenerationConfig
from vlm.generation.request import Request, request_seed
from vlm.text.base import SLOT


class TokenSampler:
    """Chooses the next token of every row: the best where temperature is 0, else one drawn by the row's own numbers.

    A row's numbers follow from its request alone, so no answer depends on its batch.
    """

    def __init__(
        self, requests: Sequence[Request], settings: GenerationConfig, vocab_size: int, device: torch.device
    ) -> None:
        self._settings = settings
        self._penalty = RepetitionPenalty(settings.repetition_penalty, requests, vocab_size, device)
        numbers = [
            torch.rand(
                settings.max_new_tokens,
                dtype=torch.float64,
                generator=torch.Generator().manual_seed(request_seed(request, settings)),
            )
            for request in requests
        ]
        self._uniform_BN = torch.stack(numbers).to(device)

    def __call__(self, logits_BV: Tensor, position: int) -> Tensor:
        """The tokens (B,) at a position of the answers."""
        scores_BV = self._penalty(logits_BV)
        if self._settings.temperature == 0:
            tokens_B = scores_BV.argmax(dim=-1)
        else:
            tokens_B = sample_tokens(filter_scores(scores_BV, self._settings), self._uniform_BN[:, position])
        self._penalty.add(tokens_B)
        return tokens_B

    def reorder(self, rows_B: Tensor) -> None:
        """Row i becomes what row `rows_B[i]` was."""
        self._uniform_BN = self._uniform_BN[rows_B]
        self._penalty.reorder(rows_B)


class RepetitionPenalty:
    """Makes tokens that stand in a row's prompt or answer less likely (Keskar et al., 2019).

    A positive score is divided by the factor, a negative one multiplied with it; a factor of 1 costs nothing.
    """

    def __init__(self, factor: float, requests: Sequence[Request], vocab_size: int, device: torch.device) -> None:
        self._factor = factor
        self._seen_BV = torch.zeros(len(requests), vocab_size if factor != 1 else 0, dtype=torch.bool, device=device)
        if factor != 1:
            for seen_V, request in zip(self._seen_BV, requests, strict=True):
                seen_V[[token for token in request.prefix if token != SLOT]] = True

    def __call__(self, scores_BV: Tensor) -> Tensor:
        """Scores after the penalty."""
        if self._factor == 1:
            return scores_BV
        less_BV = torch.where(scores_BV < 0, scores_BV * self._factor, scores_BV / self._factor)
        return torch.where(self._seen_BV, less_BV, scores_BV)

    def add(self, tokens_B: Tensor) -> None:
        """Note one more token a row."""
        if self._factor != 1:
            self._seen_BV.scatter_(1, tokens_B[:, None], True)

    def reorder(self, rows_B: Tensor) -> None:
        """Row i becomes what row `rows_B[i]` was."""
        self._seen_BV = self._seen_BV[rows_B]


def sample_tokens(scores_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One token a row, by the softmax of its scores and its number in [0, 1).

    One number on the running sum of probabilities: no loop over rows, and the same draw on every device. In double
    precision, because a sum over a large vocabulary in single precision loses its rare tokens.
    """
    sum_BV = torch.softmax(scores_BV.double(), dim=-1).cumsum(dim=-1)
    return torch.searchsorted(sum_BV, uniform_B[:, None] * sum_BV[:, -1:], right=True)[:, 0]


def filter_scores(scores_BV: Tensor, settings: GenerationConfig) -> Tensor:
    """Scores divided by the temperature, with everything outside top-k, top-p and min-p at minus infinity.

    top-p is the nucleus of Holtzman et al. (2019); min-p a share of the best token's probability (Nguyen et al., 2024).
    """
    scores_BV = scores_BV / settings.temperature
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
