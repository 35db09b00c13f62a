"""Text generation. The first forward pass reads the prefixes of all rows, and each later forward pass adds one token to
each row.

Rows of a batch do not influence each other, so a completion does not depend on the other rows. A finished row leaves
the batch. Generation never produces the tokens in `suppressed_ids` of the tokenizer, such as padding.

Letters in tensor names: unfinished rows of the batch (B), vocabulary (V).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from vlm.config import GenerationConfig
from vlm.generation.beam import beam_search
from vlm.generation.finite import log_probabilities, require_finite
from vlm.generation.request import Completion, Request, check_length, prefill
from vlm.generation.sampling import TokenSampler
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer
from vlm.text.stop import find_stop, safe_text

__all__ = ["Completion", "Request", "check_length", "generate", "stream"]


def generate(
    model: VisionLanguageModel, tokenizer: Tokenizer, requests: Sequence[Request], settings: GenerationConfig
) -> list[Completion]:
    """Generate one completion for each request. Prefixes may differ in length and in the number of pictures.

    Raises:
        UserError: a request and `max_new_tokens` do not fit the model's context, or the model computes NaN or infinite
            values.
        ValueError: the number of slots of a request does not match the number of pictures of the request.
    """
    if not requests:
        return []
    if settings.num_beams > 1:
        completions = beam_search(model, tokenizer, requests, settings)
    else:
        *_, completions = _generate_steps(model, tokenizer, requests, settings)
    for completion in completions:
        text = tokenizer.decode(completion.tokens)
        completion.text = text[: find_stop(text, settings.stop)]
    return completions


def stream(
    model: VisionLanguageModel, tokenizer: Tokenizer, request: Request, settings: GenerationConfig
) -> Iterator[Completion]:
    """Generate one completion, and yield the completion after each token. The text of each yielded completion contains
    only the part of the answer that later tokens cannot change.

    All yielded completions are the same object. Each yielded text begins with the previously yielded text, and the last
    text equals the text that `generate` returns. With beam search, the completion is yielded once, after the search has
    ended.

    Raises:
        UserError: the request and `max_new_tokens` do not fit the model's context, or the model computes NaN or
            infinite values.
        ValueError: the number of slots of the request does not match the number of pictures of the request.
    """
    if settings.num_beams > 1:
        (completion,) = generate(model, tokenizer, [request], settings)
    else:
        for (completion,) in _generate_steps(model, tokenizer, [request], settings):
            if find_stop(tokenizer.decode(completion.tokens), settings.stop) is None:
                completion.text = safe_text(tokenizer, completion.tokens, settings.stop)
                yield completion
        text = tokenizer.decode(completion.tokens)
        completion.text = text[: find_stop(text, settings.stop)]
    yield completion


@torch.inference_mode()
def _generate_steps(
    model: VisionLanguageModel, tokenizer: Tokenizer, requests: Sequence[Request], settings: GenerationConfig
) -> Iterator[list[Completion]]:
    """Yield the partial completions of all requests after each step. All steps yield the same list object."""
    logits_BV, cache = prefill(model, requests, settings)
    sampler = TokenSampler(requests, settings, logits_BV.shape[-1], logits_BV.device)
    completions = [Completion() for _ in requests]
    owners = list(range(len(requests)))
    suppressed = torch.tensor(tokenizer.suppressed_ids, dtype=torch.long, device=logits_BV.device)
    for position in range(settings.max_new_tokens):
        logits_BV = logits_BV.float().index_fill_(1, suppressed, -torch.inf)
        tokens_B = sampler(logits_BV, position)
        logprobs = log_probabilities(logits_BV, tokens_B).tolist()
        require_finite(model, logprobs)
        active = [
            _append_token(completions[owner], token, logprob, tokenizer, settings.stop)
            for owner, token, logprob in zip(owners, tokens_B.tolist(), logprobs, strict=True)
        ]
        yield completions
        if not any(active) or position == settings.max_new_tokens - 1:
            return
        if not all(active):
            kept = cache.keep_rows(active)
            owners = [owners[row] for row in kept]
            tokens_B = tokens_B[kept]
            sampler.reorder(torch.tensor(kept, device=tokens_B.device))
        logits_BV = model.step(tokens_B, cache)


def _append_token(
    completion: Completion, token: int, logprob: float, tokenizer: Tokenizer, stop: Sequence[str]
) -> bool:
    """Append a token to a completion, and return True if the completion is not finished."""
    completion.logprobs.append(logprob)
    if token == tokenizer.eos_id:
        return False
    completion.tokens.append(token)
    return not stop or find_stop(tokenizer.decode(completion.tokens), stop) is None
