"""From pictures and prompts to text: the prefixes once, then one token a row at a time from the cache.

Rows of a batch never see each other: an answer is the same alone and in any company. A row that has ended leaves the
batch. Ids that the tokenizer silences have no probability.

Letters: B rows still in the batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from vlm.config import GenerationConfig
from vlm.generation.beam import beam_search
from vlm.generation.request import Completion, Request, check_length, prefill
from vlm.generation.sampling import TokenSampler
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer
from vlm.text.stop import count_safe_tokens, find_stop

__all__ = ["Completion", "Request", "check_length", "generate", "stream"]


def generate(
    model: VisionLanguageModel, tokenizer: Tokenizer, requests: Sequence[Request], settings: GenerationConfig
) -> list[Completion]:
    """Answers in the order of the requests, which may have prefixes and pictures of any number.

    Raises:
        UserError: a request and `max_new_tokens` do not fit the model's context.
        ValueError: a request has not as many slots as its pictures take.
    """
    if not requests:
        return []
    if settings.num_beams > 1:
        answers = beam_search(model, tokenizer, requests, settings)
    else:
        *_, answers = _steps(model, tokenizer, requests, settings)
    for answer in answers:
        text = tokenizer.decode(answer.tokens)
        answer.text = text[: find_stop(text, settings.stop)]
    return answers


def stream(
    model: VisionLanguageModel, tokenizer: Tokenizer, request: Request, settings: GenerationConfig
) -> Iterator[int]:
    """Token ids of one answer as they come, the end token left out.

    A token is held back while it may belong to a stop string. A search over beams gives its tokens when it is over.

    Raises:
        UserError: the request and `max_new_tokens` do not fit the model's context.
    """
    if settings.num_beams > 1:
        steps = iter([beam_search(model, tokenizer, [request], settings)])
    else:
        steps = _steps(model, tokenizer, [request], settings)
    given, tokens = 0, list[int]()
    for (answer,) in steps:
        tokens = answer.tokens
        ready = count_safe_tokens(tokenizer, tokens, given, settings.stop) if settings.stop else len(tokens)
        yield from tokens[given:ready]
        given = ready
    if find_stop(tokenizer.decode(tokens), settings.stop) is None:
        yield from tokens[given:]


@torch.inference_mode()
def _steps(
    model: VisionLanguageModel, tokenizer: Tokenizer, requests: Sequence[Request], settings: GenerationConfig
) -> Iterator[list[Completion]]:
    """All answers as far as they are, after each token."""
    logits_BV, cache = prefill(model, requests, settings)
    choose = TokenSampler(requests, settings, logits_BV.shape[-1], logits_BV.device)
    answers = [Completion() for _ in requests]
    owners = list(range(len(requests)))
    silenced = torch.tensor(tokenizer.suppressed_ids, dtype=torch.long, device=logits_BV.device)
    for position in range(settings.max_new_tokens):
        logits_BV = logits_BV.float().index_fill_(1, silenced, -torch.inf)
        tokens_B = choose(logits_BV, position)
        logprobs_B = logits_BV.gather(1, tokens_B[:, None])[:, 0] - logits_BV.logsumexp(dim=-1)
        going = [
            _goes_on(answers[owner], token, logprob, tokenizer, settings.stop)
            for owner, token, logprob in zip(owners, tokens_B.tolist(), logprobs_B.tolist(), strict=True)
        ]
        yield answers
        if not any(going) or position == settings.max_new_tokens - 1:
            return
        if not all(going):
            kept = cache.keep_rows(going)
            owners = [owners[row] for row in kept]
            tokens_B = tokens_B[kept]
            choose.reorder(torch.tensor(kept, device=tokens_B.device))
        logits_BV = model.step(tokens_B, cache)


def _goes_on(answer: Completion, token: int, logprob: float, tokenizer: Tokenizer, stop: Sequence[str]) -> bool:
    """Add a token to an answer; False where that ends it."""
    answer.logprobs.append(logprob)
    if token == tokenizer.eos_id:
        return False
    answer.tokens.append(token)
    return not stop or find_stop(tokenizer.decode(answer.tokens), stop) is None
