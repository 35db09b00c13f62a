"""Tests of generation: the cache, batches, padding, sampling, beam search, stop strings, streams and errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from pydantic import ValidationError
from tiny_models import VARIANTS, tiny_model, tiny_pixels

from vlm.batch import Batch
from vlm.config import GenerationConfig
from vlm.errors import UserError
from vlm.generation.generate import Completion, Request, generate, stream
from vlm.generation.logprobs import answer_logprobs
from vlm.generation.sampling import sample_tokens
from vlm.model import VisionLanguageModel
from vlm.text.base import NUM_SPECIAL, Tokenizer
from vlm.text.prompt import prefix_ids

GREEDY = GenerationConfig(max_new_tokens=12)
SAMPLED = GenerationConfig(max_new_tokens=12, temperature=1.0, top_k=20, top_p=0.95, seed=3)
SHORT = GREEDY.model_copy(update={"max_new_tokens": 6})
PROMPTS = ("", "a", "what", "is it a b c", "why?", "q" * 16)


def ask(
    model: VisionLanguageModel, tokenizer: Tokenizer, pictures: Sequence[torch.Tensor], prompt: str = ""
) -> Request:
    return Request(prefix_ids(tokenizer, model.config.num_slots, prompt, len(pictures)), tuple(pictures))


def mixed_requests(model: VisionLanguageModel, tokenizer: Tokenizer, count: int) -> list[Request]:
    """Build requests with prompts of different lengths, each with at most two pictures."""
    pixels = tiny_pixels(2 * count)
    most = 2 if model.config.num_slots < 16 else 1
    pictures = [list(pixels[2 * i : 2 * i + min(i % 3, most)]) for i in range(count)]
    return [ask(model, tokenizer, pictures[i], PROMPTS[i % len(PROMPTS)]) for i in range(count)]


def next_logits(model: VisionLanguageModel, tokenizer: Tokenizer, request: Request, answer: list[int]) -> torch.Tensor:
    """Compute the log-probabilities of the next token from the whole sequence, without a key-value cache."""
    row = torch.tensor([[*request.prefix, *answer]])
    batch = Batch(torch.stack(list(request.pixels)), row, row, torch.tensor([len(request.prefix)]))
    logits = model.decoder.logits(model.hidden_states(batch)[0, -1])
    logits[list(tokenizer.suppressed_ids)] = -torch.inf
    return torch.log_softmax(logits, dim=-1)


@torch.inference_mode()
def slow_greedy(model: VisionLanguageModel, tokenizer: Tokenizer, request: Request, steps: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < steps:
        token = int(next_logits(model, tokenizer, request, answer).argmax())
        if token == tokenizer.eos_id:
            break
        answer.append(token)
    return answer


def assert_same(found: Completion, expected: Completion) -> None:
    assert found.tokens == expected.tokens
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompt", ["", "what is it?"])
def test_generation_with_the_cache_equals_generation_without_the_cache(variant: str, prompt: str) -> None:
    model, tokenizer = tiny_model(variant)
    requests = [ask(model, tokenizer, [picture], prompt) for picture in tiny_pixels(6)]
    answers = generate(model, tokenizer, requests, GREEDY)
    expected = [slow_greedy(model, tokenizer, request, 12) for request in requests]
    for request, answer, tokens in zip(requests, answers, expected, strict=True):
        assert answer.text == tokenizer.decode(answer.tokens)
        both = itertools.zip_longest(answer.tokens, tokens, fillvalue=tokenizer.eos_id)
        first = next((index for index, (one, other) in enumerate(both) if one != other), None)
        if first is not None:  # only rounding may decide between two tokens of equal probability
            logits = next_logits(model, tokenizer, request, tokens[:first])
            chosen = [[*each, tokenizer.eos_id][first] for each in (answer.tokens, tokens)]
            assert float(logits[chosen[0]]) == pytest.approx(float(logits[chosen[1]]), abs=1e-4)
    assert len({round(answer.logprobs[0], 5) for answer in answers}) > 3, "the model ignores the pictures"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_request_gets_the_same_completion_alone_as_in_a_padded_batch_of_eight_requests(variant: str) -> None:
    model, tokenizer = tiny_model(variant)
    requests = mixed_requests(model, tokenizer, 8)
    beams = SHORT.model_copy(update={"num_beams": 3})
    penalized = GREEDY.model_copy(update={"repetition_penalty": 1.5})
    for settings in (GREEDY, SAMPLED, penalized, beams):
        together = generate(model, tokenizer, requests, settings)
        for request, answer in zip(requests, together, strict=True):
            (alone,) = generate(model, tokenizer, [request], settings)
            assert_same(answer, alone)
    assert len({len(answer.tokens) for answer in generate(model, tokenizer, requests, SAMPLED)}) > 1


@pytest.mark.parametrize("variant", ["plain", "looking"])
def test_the_completion_depends_on_every_picture_of_a_request_and_on_the_order_of_the_pictures(variant: str) -> None:
    model, tokenizer = tiny_model(variant)
    one, two, three = tiny_pixels(3)
    rows = [(one, two), (two, one), (one, three), (one,), ()]
    answers = generate(model, tokenizer, [ask(model, tokenizer, row, "what") for row in rows], GREEDY)
    firsts = {round(answer.logprobs[0], 4) for answer in answers}
    assert len(firsts) == len(rows)


def test_equal_pictures_are_encoded_once_for_all_beams_and_requests() -> None:
    model, tokenizer = tiny_model("plain")
    one, two = tiny_pixels(2)
    encoded: list[int] = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    requests = [ask(model, tokenizer, [p], prompt) for p, prompt in ((one, ""), (two, ""), (one, "a"), (one, "b"))]
    answers = generate(model, tokenizer, requests, SHORT.model_copy(update={"num_beams": 4}))
    assert encoded == [2]
    for request, answer in zip(requests, answers, strict=True):
        assert_same(answer, generate(model, tokenizer, [request], SHORT.model_copy(update={"num_beams": 4}))[0])


def test_a_finished_completion_is_removed_from_the_batch() -> None:
    model, tokenizer = tiny_model("other")
    requests = [ask(model, tokenizer, [picture]) for picture in tiny_pixels(16)]
    rows: list[int] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    answers = generate(model, tokenizer, requests, SAMPLED)
    assert rows == [sum(answer.num_tokens > step for answer in answers) for step in range(len(rows))]
    assert rows[-1] < 16


def test_the_seeds_decide_the_samples_and_top_1_sampling_equals_greedy_decoding() -> None:
    model, tokenizer = tiny_model("other")
    requests = [ask(model, tokenizer, [picture]) for picture in tiny_pixels(4)]

    def sampled(request_seed: int = 0, **changes: object) -> list[list[int]]:
        seeded = [Request(request.prefix, request.pixels, request_seed) for request in requests]
        return [a.tokens for a in generate(model, tokenizer, seeded, SAMPLED.model_copy(update=changes))]

    assert sampled() == sampled()
    assert sampled() != sampled(seed=4)
    assert sampled() != sampled(request_seed=1)
    assert sampled(top_k=1) == sampled(temperature=0.0) == sampled(top_p=1e-6) == sampled(min_p=1.0)


def test_a_token_of_probability_zero_is_never_sampled_for_any_random_number() -> None:
    scores = torch.tensor([-torch.inf, 0.0, -torch.inf, math.log(3), -torch.inf]).expand(5, -1)
    numbers = torch.tensor([0.0, 0.2499, 0.2501, 0.9999, 1 - 2**-53], dtype=torch.float64)
    assert sample_tokens(scores, numbers).tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize("changes", [{"temperature": 100.0, "top_k": None, "top_p": 1.0}, {"num_beams": 8}])
def test_suppressed_tokens_are_never_generated(changes: dict[str, object]) -> None:
    model, tokenizer = tiny_model("other")
    requests = [ask(model, tokenizer, [picture]) for picture in tiny_pixels(32)]
    settings = SAMPLED.model_copy(update={"temperature": 0.0} | changes)
    for answer in generate(model, tokenizer, requests, settings):
        assert all(token >= NUM_SPECIAL for token in answer.tokens)


@pytest.mark.parametrize("changes", [{}, {"repetition_penalty": 3.0}, {"temperature": 0.0, "num_beams": 3}])
def test_logprobs_are_log_probabilities_before_the_repetition_penalty_and_the_sampling_filters(
    changes: dict[str, object],
) -> None:
    model, tokenizer = tiny_model("plain")
    requests = [ask(model, tokenizer, [picture]) for picture in tiny_pixels(4)]
    settings = SAMPLED.model_copy(update=changes)
    with torch.inference_mode():
        for request, answer in zip(requests, generate(model, tokenizer, requests, settings), strict=True):
            tokens = answer.tokens + [tokenizer.eos_id] * (answer.num_tokens - len(answer.tokens))
            assert len(answer.tokens) in (answer.num_tokens, answer.num_tokens - 1)
            for i, token in enumerate(tokens):
                expected = float(next_logits(model, tokenizer, request, tokens[:i])[token])
                assert answer.logprobs[i] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_wide_beam_search_finds_the_same_completion_as_an_exhaustive_search(length_penalty: float) -> None:
    model, tokenizer = tiny_model("other")
    allowed, steps = [tokenizer.eos_id, 7, 11, 20], 3
    tokenizer.suppressed_ids = tuple(i for i in range(tokenizer.vocab_size) if i not in allowed)
    settings = GenerationConfig(max_new_tokens=steps, num_beams=4**steps, length_penalty=length_penalty)
    for picture in tiny_pixels(4):
        request = ask(model, tokenizer, [picture])
        values: dict[tuple[int, ...], float] = {}
        with torch.inference_mode():
            for answer in itertools.product(allowed, repeat=steps):
                end = answer.index(tokenizer.eos_id) + 1 if tokenizer.eos_id in answer else steps
                logprobs = [float(next_logits(model, tokenizer, request, [*answer[:i]])[answer[i]]) for i in range(end)]
                values[answer[:end]] = sum(logprobs) / end**length_penalty
        best = max(values, key=lambda answer: values[answer])
        (found,) = generate(model, tokenizer, [request], settings)
        assert (*found.tokens, tokenizer.eos_id)[: len(best)] == best
        assert sum(found.logprobs) / found.num_tokens**length_penalty == pytest.approx(values[best], abs=1e-4)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_completion_ends_before_the_first_stop_string(num_beams: int) -> None:
    model, tokenizer = tiny_model("other")
    settings = GREEDY.model_copy(update={"num_beams": num_beams})
    requests = [ask(model, tokenizer, [picture]) for picture in tiny_pixels(6)]
    free = generate(model, tokenizer, requests, settings)
    whole = max((answer.text for answer in free), key=len)
    stop = settings.model_copy(update={"stop": ("never said", whole[4:6])})
    stopped = generate(model, tokenizer, requests, stop)
    assert any(answer.text == whole[: whole.index(whole[4:6])] for answer in stopped)
    for answer in stopped:
        assert whole[4:6] not in answer.text
        assert tokenizer.decode(answer.tokens).endswith(whole[4:6]) or len(answer.tokens) in (12, answer.num_tokens - 1)
    for request, answer in zip(requests, stopped, strict=True):
        assert [part.text for part in stream(model, tokenizer, request, stop)][-1] == answer.text


@pytest.mark.parametrize("changes", [{}, {"temperature": 1.0}, {"num_beams": 2}])
def test_the_function_stream_yields_the_same_tokens_as_the_function_generate(changes: dict[str, object]) -> None:
    model, tokenizer = tiny_model("other")
    settings = GREEDY.model_copy(update=changes)
    for picture in tiny_pixels(4):
        request = ask(model, tokenizer, [picture])
        (answer,) = generate(model, tokenizer, [request], settings)
        *_, last = stream(model, tokenizer, request, settings)
        assert (last.tokens, last.text) == (answer.tokens, answer.text)


def test_the_function_stream_yields_the_first_token_after_a_single_pass_of_the_decoder() -> None:
    model, tokenizer = tiny_model("other")
    passes: list[int] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: passes.append(1))
    tokens = stream(model, tokenizer, ask(model, tokenizer, [tiny_pixels(1)[0]]), GREEDY)
    next(tokens)
    assert len(passes) == 1


def test_a_large_repetition_penalty_prevents_repetition_of_earlier_tokens_and_of_prompt_tokens() -> None:
    model, tokenizer = tiny_model("plain")
    requests = [ask(model, tokenizer, [picture], "what") for picture in tiny_pixels(8)]
    for answer in generate(model, tokenizer, requests, GREEDY.model_copy(update={"repetition_penalty": 1e6})):
        tokens = [*tokenizer.encode("what"), *answer.tokens]
        assert len(set(answer.tokens)) == len(answer.tokens)
        assert len(set(tokens)) == len(set("what")) + len(answer.tokens)


def test_the_function_generate_returns_an_empty_list_for_an_empty_list_of_requests() -> None:
    assert generate(*tiny_model("plain"), [], GREEDY) == []


def test_a_request_that_does_not_fit_the_context_is_an_error() -> None:
    model, tokenizer = tiny_model("plain")
    requests = [ask(model, tokenizer, [tiny_pixels(1)[0]], prompt) for prompt in ("", "what" * 9)]
    with pytest.raises(UserError, match=r"does not fit the model's context.*the context has 48 positions"):
        generate(model, tokenizer, requests, GREEDY)


def test_a_request_with_another_number_of_image_slots_than_its_pictures_need_is_an_error() -> None:
    model, tokenizer = tiny_model("plain")
    one, two = tiny_pixels(2)
    prefix = prefix_ids(tokenizer, model.config.num_slots, "")
    with pytest.raises(ValueError, match="has 4 image slots, but 2 pictures need"):
        generate(model, tokenizer, [Request(prefix, (one, two)), Request(prefix, ())], GREEDY)


def test_beam_search_with_a_temperature_above_zero_is_an_error() -> None:
    with pytest.raises(ValidationError, match=r"num_beams 2 and temperature 0.5 exclude each other"):
        GenerationConfig(num_beams=2, temperature=0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, GREEDY.model_copy(update={"num_beams": 2})])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_model_with_weights_that_are_not_finite_raises_an_error_instead_of_writing_an_empty_caption(
    value: float, settings: GenerationConfig, part: str
) -> None:
    model, tokenizer = tiny_model("plain")
    name, weight = next((name, each) for name, each in model.named_parameters() if part in name)
    with torch.no_grad():
        weight.view(-1)[::2] = value
    request = ask(model, tokenizer, list(tiny_pixels(1)))
    with pytest.raises(UserError, match="NaN or infinite values") as caught:
        generate(model, tokenizer, [request], settings)
    assert name in str(caught.value)
    with pytest.raises(UserError, match="NaN or infinite values"):
        list(stream(model, tokenizer, request, settings))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, GREEDY.model_copy(update={"num_beams": 2})])
@pytest.mark.parametrize("token", [1, 2])
def test_values_that_are_not_finite_after_the_first_token_raise_an_error_instead_of_cutting_the_caption(
    value: float, settings: GenerationConfig, token: int
) -> None:
    model, tokenizer = tiny_model("plain")
    request = ask(model, tokenizer, list(tiny_pixels(1)))
    whole = generate(model, tokenizer, [request], settings)[0]
    assert whole.num_tokens > token + 1, "the caption would not reach the position"
    assert model.decoder.position is not None
    with torch.no_grad():
        model.decoder.position.weight[len(request.prefix) + token - 1, ::2] = value
    with pytest.raises(UserError, match=r"NaN or infinite values.*decoder\.position\.weight"):
        generate(model, tokenizer, [ask(model, tokenizer, list(tiny_pixels(1)), "a"), request], settings)
    with pytest.raises(UserError, match="NaN or infinite values"):
        list(stream(model, tokenizer, request, settings))
    with pytest.raises(UserError, match="NaN or infinite values"):
        answer_logprobs(model, tokenizer, [request], ["abcdef"])


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, GREEDY.model_copy(update={"num_beams": 2})])
def test_a_logit_of_plus_infinity_raises_an_error_whichever_token_is_chosen(settings: GenerationConfig) -> None:
    model, tokenizer = tiny_model("plain")
    request = ask(model, tokenizer, list(tiny_pixels(1)))

    def with_infinite_logit(logits_BV: torch.Tensor) -> torch.Tensor:
        return logits_BV.index_fill(1, torch.tensor([tokenizer.vocab_size // 2]), torch.inf)

    model.decoder.head.register_forward_hook(lambda _module, _inputs, logits: with_infinite_logit(logits))
    with pytest.raises(UserError, match=r"overflow in the computation.*use precision fp32"):
        generate(model, tokenizer, [request], settings)
    with pytest.raises(UserError, match="overflow in the computation"):
        answer_logprobs(model, tokenizer, [request], ["abc"])
