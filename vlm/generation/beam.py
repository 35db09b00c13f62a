"""Beam search, which extends the most likely partial completions in parallel and returns the best finished completion.

The search has the same rules as transformers' `generate` with `early_stopping=False`, so that both implementations
return the same tokens:

- Each step considers twice as many candidates as beams. A finished candidate counts only if the candidate is among the
  best `num_beams` candidates.
- The normalized score of a candidate is its log-probability divided by length ** length_penalty. The search compares
  logarithms of normalized scores, because length ** length_penalty can be too large for a floating-point number.
- The search of a request ends when two conditions hold: the search has `num_beams` finished candidates, and the
  normalized score of each finished candidate is at least the normalized score of the best unfinished beam. The search
  also ends when all candidates are finished, for example because they have `max_new_tokens` tokens.

Letters in tensor names: active requests (B), beams (K), candidates (C), rows (R = B * K), vocabulary (V), continuations
of a request (X = K * V).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlm.config import GenerationConfig
from vlm.generation.finite import require_finite
from vlm.generation.request import Completion, Request, prefill
from vlm.generation.sampling import RepetitionPenalty
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer
from vlm.text.stop import find_stop


@torch.inference_mode()
def beam_search(
    model: VisionLanguageModel, tokenizer: Tokenizer, requests: Sequence[Request], settings: GenerationConfig
) -> list[Completion]:
    """Find the best completion of each request. The field `text` of the completions stays empty.

    Raises:
        UserError: a request does not fit the model's context, or the model computes NaN or infinite values.
        ValueError: the number of slots of a request does not match the number of pictures of the request.
    """
    K = settings.num_beams
    logits_RV, cache = prefill(model, requests, settings)
    start, device = cache.length, logits_RV.device
    cache.repeat(K)
    logits_RV = logits_RV.repeat_interleave(K, dim=0)
    penalty = RepetitionPenalty(
        settings.repetition_penalty, [r for r in requests for _ in range(K)], logits_RV.shape[-1], device
    )

    def is_finished(tokens: list[int]) -> bool:
        if tokens[-1] == tokenizer.eos_id or len(tokens) == settings.max_new_tokens:
            return True
        return bool(settings.stop) and find_stop(tokenizer.decode(tokens), settings.stop) is not None

    searches = [_Search(K, is_finished) for _ in requests]
    active = searches
    suppressed = torch.tensor(tokenizer.suppressed_ids, dtype=torch.long, device=device)
    while True:
        logits_RV = logits_RV.float().index_fill_(1, suppressed, -torch.inf)
        ranked = _rank_candidates(logits_RV, active, penalty, settings)
        require_finite(model, (candidate.logprobs[-1] for candidates in ranked for candidate in candidates))
        for search, candidates in zip(active, ranked, strict=True):
            search.advance(candidates)
        is_active = [not search.done for search in active]
        if not any(is_active):
            break
        if not all(is_active):
            kept = cache.keep_rows([keep for keep in is_active for _ in range(K)])
            penalty.reorder(torch.tensor(kept, device=device))
            active = [active[row // K] for row in kept[::K]]
        parents_R = torch.tensor([i * K + beam.parent for i, s in enumerate(active) for beam in s.beams], device=device)
        tokens_R = torch.tensor([beam.tokens[-1] for search in active for beam in search.beams], device=device)
        cache.reorder(parents_R, start)
        penalty.reorder(parents_R)
        penalty.add(tokens_R)
        logits_RV = model.step(tokens_R, cache)
    return [search.best_completion(tokenizer.eos_id) for search in searches]


@dataclass(frozen=True)
class _Beam:
    """Partial completion of a request.

    Attributes:
        tokens: token ids of the completion so far.
        logprobs: log-probability of each token under the model.
        score: sum of the log-probabilities after the repetition penalty.
        rank: value that orders beams in the same way as score / length ** length_penalty (`_rank`).
        parent: index of the beam of the previous step that this beam extends.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    score: float = 0.0
    rank: tuple[float, float] = (0.0, 0.0)
    parent: int = 0


_IMPOSSIBLE = -math.inf
"""Score of a filler beam, which is never chosen. Filler beams keep the number of beams of each request constant."""


class _Search:
    """State of the beam search of one request."""

    def __init__(self, num_beams: int, is_finished: Callable[[list[int]], bool]) -> None:
        self._is_finished = is_finished
        # At the start, all beams are equal and would choose the same token, so only the first beam can be extended.
        self.beams = [_Beam()] + [_Beam(score=_IMPOSSIBLE)] * (num_beams - 1)
        self.done = False
        self._finished: list[_Beam] = []

    def advance(self, candidates: Sequence[_Beam]) -> None:
        """Divide the candidates of one step, sorted from best to worst, into finished and unfinished beams."""
        K = len(self.beams)
        finished = [self._is_finished(candidate.tokens) for candidate in candidates]
        viable = [c.score > _IMPOSSIBLE for c in candidates]
        best = [c for c, end, ok in zip(candidates[:K], finished, viable, strict=False) if end and ok]
        self._finished = sorted(self._finished + best, key=lambda beam: beam.rank, reverse=True)[:K]
        open_beams = [c for c, end in zip(candidates, finished, strict=True) if not end][:K]
        if not open_beams or open_beams[0].score == _IMPOSSIBLE:
            self.done = True
            return
        first = open_beams[0]
        self.done = len(self._finished) == K and first.rank <= self._finished[-1].rank
        filler = _Beam(first.tokens, first.logprobs, _IMPOSSIBLE, (_IMPOSSIBLE, _IMPOSSIBLE), first.parent)
        self.beams = open_beams + [filler] * (K - len(open_beams))

    def best_completion(self, eos_id: int) -> Completion:
        """Return the best finished beam as a completion."""
        best = self._finished[0]
        return Completion(best.tokens[:-1] if best.tokens[-1] == eos_id else best.tokens, best.logprobs)


def _rank_candidates(
    logits_RV: Tensor, searches: Sequence[_Search], penalty: RepetitionPenalty, settings: GenerationConfig
) -> list[list[_Beam]]:
    """Return the 2 * K best continuations of each request, starting with the best continuation."""
    B, V = len(searches), logits_RV.shape[-1]
    logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
    penalized_RV = penalty(logprobs_RV)
    scores_R = penalized_RV.new_tensor([beam.score for search in searches for beam in search.beams])
    scores_BX = (penalized_RV + scores_R[:, None]).view(B, -1)
    top = scores_BX.topk(min(2 * settings.num_beams, scores_BX.shape[1]), dim=1)
    length = len(searches[0].beams[0].tokens) + 1
    logprobs_BC = logprobs_RV.view(B, -1).gather(1, top.indices)
    columns = (top.indices.tolist(), top.values.tolist(), logprobs_BC.tolist())
    ranked = []
    for search, *row in zip(searches, *columns, strict=True):
        candidates = []
        for index, score, logprob in zip(*row, strict=True):
            beam = search.beams[index // V]
            rank = _rank(score, length, settings.length_penalty)
            candidates.append(_Beam([*beam.tokens, index % V], [*beam.logprobs, logprob], score, rank, index // V))
        ranked.append(candidates)
    return ranked


def _rank(score: float, length: int, length_penalty: float) -> tuple[float, float]:
    """Return a value that is larger for a larger quotient score / length ** length_penalty. No score is above 0.

    The first number is -log(-quotient), and the second number is the score. With a large penalty, two beams of the same
    length can have equal first numbers because of rounding. The second numbers of these beams still differ.
    """
    if score == 0:
        return math.inf, 0.0
    return length_penalty * math.log(length) - math.log(-score), score
