"""Tests of generation with extreme settings: every allowed value gives the mathematically correct choice of tokens, and
infinity and NaN are errors.
"""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_model, tiny_pixels

from vlm.captioner import Captioner
from vlm.config import GenerationConfig
from vlm.errors import ConfigError
from vlm.generation.generate import Completion, Request, generate
from vlm.generation.sampling import RepetitionPenalty, filter_scores
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer
from vlm.text.prompt import prefix_ids

FLOATS = [name for name, field in GenerationConfig.model_fields.items() if field.annotation is float]


def answers(model: VisionLanguageModel, tokenizer: Tokenizer, **settings: object) -> list[Completion]:
    prefix = prefix_ids(tokenizer, model.config.num_slots, "what", 1)
    requests = [Request(prefix, (picture,)) for picture in tiny_pixels(8)]
    return generate(model, tokenizer, requests, GenerationConfig.model_validate({"max_new_tokens": 6} | settings))


def tokens(found: list[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in found]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", FLOATS)
def test_infinity_and_nan_are_config_errors_for_every_number_setting(name: str, value: float) -> None:
    captioner = Captioner(*tiny_model("plain"))
    with pytest.raises(ConfigError, match=name):
        captioner.settings(**{name: value})


@pytest.mark.parametrize("temperature", [1e-45, 1e-200, 1e-320, 5e-324])
def test_a_tiny_temperature_samples_the_most_likely_tokens(temperature: float) -> None:
    model, tokenizer = tiny_model("other")
    assert tokens(answers(model, tokenizer, temperature=temperature)) == tokens(answers(model, tokenizer))


@pytest.mark.parametrize("temperature", [1e30, 1e100, 1e308, 1.7e308])
def test_a_huge_temperature_samples_all_tokens_with_equal_probability_except_suppressed_tokens(
    temperature: float,
) -> None:
    scores = torch.tensor([[-3e38, 0.0, 5.0, -torch.inf, 3e38]])
    probs = filter_scores(scores, GenerationConfig(temperature=temperature)).softmax(dim=-1)
    if temperature >= 1e100:
        assert probs.tolist()[0] == pytest.approx([0.25, 0.25, 0.25, 0, 0.25])
    model, tokenizer = tiny_model("other")
    found = [token for answer in answers(model, tokenizer, temperature=temperature) for token in answer.tokens]
    assert len(set(found)) > 10
    assert not set(found) & set(tokenizer.suppressed_ids)


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1.0, 1e300])
@pytest.mark.parametrize("factor", [1e-100, 1e-40, 1e40, 1e100])
def test_every_allowed_repetition_penalty_gives_tokens_of_the_vocabulary(factor: float, temperature: float) -> None:
    model, tokenizer = tiny_model("other")
    found = answers(model, tokenizer, repetition_penalty=factor, temperature=temperature)
    assert all(token not in tokenizer.suppressed_ids for answer in found for token in answer.tokens)
    assert all(math.isfinite(logprob) for answer in found for logprob in answer.logprobs)
    if factor > 1:
        assert all(len(set(answer.tokens)) == len(answer.tokens) for answer in found if temperature < 1)


def test_an_extreme_repetition_penalty_keeps_the_order_of_the_repeated_tokens() -> None:
    penalty = RepetitionPenalty(1e-100, [Request([0, 1, 2, 3])], 5, torch.device("cpu"))
    scores = penalty(torch.tensor([[1.0, 3.0, -2.0, -1.0, 9.0]]))
    assert scores.argsort(descending=True).tolist() == [[1, 0, 4, 3, 2]]


@pytest.mark.parametrize("penalty", [1000.0, 1e300])
def test_an_extreme_length_penalty_chooses_the_longest_or_the_shortest_finished_beam(penalty: float) -> None:
    model, tokenizer = tiny_model("other")
    tokenizer.suppressed_ids = tuple(
        token for token in range(tokenizer.vocab_size) if token not in (tokenizer.eos_id, 7)
    )
    usual, longest, shortest = (
        [answer.num_tokens for answer in answers(model, tokenizer, num_beams=4, length_penalty=value)]
        for value in (1.0, penalty, -penalty)
    )
    assert all(low <= middle <= high for low, middle, high in zip(shortest, usual, longest, strict=True))
    assert set(shortest) != set(longest)
