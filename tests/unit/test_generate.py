"""Generation: the cache changes nothing, and neither does the batch."""

import pytest
import torch
from models import VARIANTS, tiny_model, tiny_pixels

from vlm.batch import Batch
from vlm.config import GenerationConfig
from vlm.errors import UserError
from vlm.generate import generate, stream
from vlm.model import VisionLanguageModel
from vlm.text.base import NUM_SPECIAL
from vlm.text.prompt import prefix_ids

GREEDY = GenerationConfig(max_new_tokens=12)
SAMPLED = GenerationConfig(max_new_tokens=12, temperature=1.0, top_k=20, top_p=0.95, seed=3)


def slow_greedy(model: VisionLanguageModel, pixels: torch.Tensor, prefix: list[int], steps: int, eos: int) -> list[int]:
    """Greedy generation without a cache: the whole sequence again for every token."""
    tokens = list(prefix)
    for _ in range(steps):
        row = torch.tensor([tokens])
        labels = torch.full_like(row, -100)
        labels[0, -1] = 0
        logits = model(Batch(pixels[None], row, labels, torch.tensor([len(prefix)])))
        logits[0, [i for i in range(NUM_SPECIAL) if i != eos]] = -torch.inf
        token = int(logits[0].argmax())
        if token == eos:
            break
        tokens.append(token)
    return tokens[len(prefix) :]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompt", ["", "what is it?"])
def test_cached_generation_equals_uncached_generation(variant: str, prompt: str) -> None:
    model, tokenizer = tiny_model(variant)
    pixels = tiny_pixels(3)
    prefix = prefix_ids(tokenizer, model.config.num_slots, prompt)
    answers = generate(model, pixels, prefix, GREEDY, tokenizer.eos_id)
    with torch.inference_mode():
        expected = [slow_greedy(model, picture, prefix, 12, tokenizer.eos_id) for picture in pixels]
    assert [answer.tokens for answer in answers] == expected
    assert len({tuple(tokens) for tokens in expected}) > 1


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED])
def test_an_answer_does_not_depend_on_its_batch(settings: GenerationConfig) -> None:
    model, tokenizer = tiny_model("other")
    pixels = tiny_pixels(4)
    prefix = prefix_ids(tokenizer, model.config.num_slots, "")
    together = generate(model, pixels, prefix, settings, tokenizer.eos_id)
    for i in range(4):
        (alone,) = generate(model, pixels[i : i + 1], prefix, settings, tokenizer.eos_id)
        assert alone.tokens == together[i].tokens
        assert alone.logprobs == pytest.approx(together[i].logprobs, abs=1e-4)
        assert list(stream(model, pixels[i], prefix, settings, tokenizer.eos_id)) == alone.tokens


def test_sampling_follows_its_seed_and_top_1_is_greedy() -> None:
    model, tokenizer = tiny_model("other")
    pixels, prefix = tiny_pixels(4), prefix_ids(tokenizer, 16, "")

    def answers(**changes: object) -> list[list[int]]:
        settings = SAMPLED.model_copy(update=changes)
        return [g.tokens for g in generate(model, pixels, prefix, settings, tokenizer.eos_id)]

    assert answers() == answers()
    assert answers() != answers(seed=4)
    assert answers(top_k=1) == answers(temperature=0.0) == answers(top_p=1e-6)


def test_no_special_token_but_the_end_is_ever_generated() -> None:
    model, tokenizer = tiny_model("other")
    prefix = prefix_ids(tokenizer, 16, "")
    loud = SAMPLED.model_copy(update={"temperature": 100.0, "top_k": None, "top_p": 1.0})
    for answer in generate(model, tiny_pixels(32), prefix, loud, tokenizer.eos_id):
        assert all(token >= NUM_SPECIAL for token in answer.tokens)


def test_log_probabilities_count_the_end_token_and_are_those_of_the_model() -> None:
    model, tokenizer = tiny_model("plain")
    prefix = prefix_ids(tokenizer, model.config.num_slots, "")
    for answer in generate(model, tiny_pixels(8), prefix, SAMPLED, tokenizer.eos_id):
        assert answer.num_tokens == len(answer.logprobs) in (len(answer.tokens), len(answer.tokens) + 1)
        assert all(logprob <= 0 for logprob in answer.logprobs)


def test_an_answer_that_cannot_fit_the_context_is_refused_before_it_starts() -> None:
    model, tokenizer = tiny_model("plain")
    prefix = prefix_ids(tokenizer, model.config.num_slots, "what" * 9)
    with pytest.raises(UserError, match=r"does not fit the model's context.*the context is 48"):
        generate(model, tiny_pixels(1), prefix, GREEDY, tokenizer.eos_id)
