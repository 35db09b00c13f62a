"""Beam search: the likeliest beginnings of an answer go on side by side; the best that has ended is the answer.

The rules are those of transformers' `generate` with `early_stopping=False`, so that the tokens are too: of twice as
many candidates as beams, one that ends counts only among the first `num_beams`; it is worth its log-probability divided
by length ** length_penalty; a search is over once all places are taken and the best open beam, at its present length,
is not worth more than the worst of them.

Letters: B requests still searched, K beams, C candidates, R = B * K rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlm.config import GenerationConfig
from vlm.generation.request import Completion, Request, prefill
from vlm.generation.sampling import RepetitionPenalty
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer
from vlm.text.stop import find_stop


@torch.inference_mode()
def beam_search(
    model: VisionLanguageModel, tokenizer: Tokenizer, requests: Sequence[Request], settings: GenerationConfig
) -> list[Completion]:
    """The best answer of each request; `text` is left to the caller.

    Raises:
        UserError: a request does not fit the context.
        ValueError: a request has not as many slots as its pictures take.
    """
    K = settings.num_beams
    logits_RV, cache = prefill(model, requests, settings)
    start, device = cache.length, logits_RV.device
    cache.repeat(K)
    logits_RV = logits_RV.repeat_interleave(K, dim=0)
    penalty = RepetitionPenalty(
        settings.repetition_penalty, [r for r in requests for _ in range(K)], logits_RV.shape[-1], device
    )

    def ends(tokens: list[int]) -> bool:
        if tokens[-1] == tokenizer.eos_id or len(tokens) == settings.max_new_tokens:
            return True
        return bool(settings.stop) and find_stop(tokenizer.decode(tokens), settings.stop) is not None

    searches = [_Search(K, ends) for _ in requests]
    going = searches
    silenced = torch.tensor(tokenizer.suppressed_ids, dtype=torch.long, device=device)
    while True:
        logits_RV = logits_RV.float().index_fill_(1, silenced, -torch.inf)
        for search, candidates in zip(going, _candidates(logits_RV, going, penalty, settings), strict=True):
            search.advance(candidates)
        still = [not search.over for search in going]
        if not any(still):
            break
        if not all(still):
            kept = cache.keep_rows([goes for goes in still for _ in range(K)])
            penalty.reorder(torch.tensor(kept, device=device))
            going = [going[row // K] for row in kept[::K]]
        parents_R = torch.tensor([i * K + beam.parent for i, s in enumerate(going) for beam in s.beams], device=device)
        tokens_R = torch.tensor([beam.tokens[-1] for search in going for beam in search.beams], device=device)
        cache.reorder(parents_R, start)
        penalty.reorder(parents_R)
        penalty.add(tokens_R)
        logits_RV = model.step(tokens_R, cache)
    return [search.answer(tokenizer.eos_id) for search in searches]


@dataclass(frozen=True)
class _Beam:
    """A beginning of an answer: its tokens and their log-probabilities, its score, and the beam it grew from."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    score: float = 0.0
    worth: float = 0.0
    parent: int = 0


_DEAD = -math.inf


class _Search:
    """The search of one request."""

    def __init__(self, num_beams: int, ends: Callable[[list[int]], bool]) -> None:
        self._ends = ends
        # All beams begin alike: with one alive, the first step does not choose the same token for each.
        self.beams = [_Beam()] + [_Beam(score=_DEAD)] * (num_beams - 1)
        self.over = False
        self._ended: list[_Beam] = []

    def advance(self, candidates: Sequence[_Beam]) -> None:
        """Go one token on: from the candidates, best first, to those that have ended and those that go on."""
        K = len(self.beams)
        ended = [self._ends(candidate.tokens) for candidate in candidates]
        alive = [c.score > _DEAD for c in candidates]
        best = [c for c, end, live in zip(candidates[:K], ended, alive, strict=False) if end and live]
        self._ended = sorted(self._ended + best, key=lambda beam: -beam.worth)[:K]
        open_beams = [c for c, end in zip(candidates, ended, strict=True) if not end][:K]
        if not open_beams or open_beams[0].score == _DEAD:
            self.over = True
            return
        self.over = len(self._ended) == K and open_beams[0].worth <= self._ended[-1].worth
        filler = _Beam(open_beams[0].tokens, open_beams[0].logprobs, _DEAD, _DEAD, open_beams[0].parent)
        self.beams = open_beams + [filler] * (K - len(open_beams))

    def answer(self, eos_id: int) -> Completion:
        """The best that has ended."""
        best = self._ended[0]
        return Completion(best.tokens[:-1] if best.tokens[-1] == eos_id else best.tokens, best.logprobs)


def _candidates(
    logits_RV: Tensor, going: Sequence[_Search], penalty: RepetitionPenalty, settings: GenerationConfig
) -> list[list[_Beam]]:
    """The 2 * K best continuations of each request, best first."""
    B, V = len(going), logits_RV.shape[-1]
    logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
    scores_R = torch.tensor([beam.score for search in going for beam in search.beams], device=logits_RV.device)
    scores_BX = (penalty(logprobs_RV) + scores_R[:, None]).view(B, -1)
    top = scores_BX.topk(min(2 * settings.num_beams, scores_BX.shape[1]), dim=1)
    length = len(going[0].beams[0].tokens) + 1
    worth_BC = top.values / length**settings.length_penalty
    logprobs_BC = logprobs_RV.view(B, -1).gather(1, top.indices)
    found = []
    columns = (top.indices.tolist(), top.values.tolist(), worth_BC.tolist(), logprobs_BC.tolist())
    for search, *row in zip(going, *columns, strict=True):
        grown = []
        for index, score, worth, logprob in zip(*row, strict=True):
            beam = search.beams[index // V]
            grown.append(_Beam([*beam.tokens, index % V], [*beam.logprobs, logprob], score, worth, index // V))
        found.append(grown)
    return found
