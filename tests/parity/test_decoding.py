"""Generation gives the same tokens as transformers' `generate` for the same weights and the same prompts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import reference_conversion
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlm.config import GenerationConfig, ModelConfig
from vlm.factory import build_model
from vlm.generation.generate import Request, generate
from vlm.generation.sampling import RepetitionPenalty, filter_scores
from vlm.model import VisionLanguageModel
from vlm.text.base import SLOT
from vlm.text.chars import CharTokenizer

VOCAB, WIDTH, DEPTH, STEPS, CONTEXT = 24, 24, 2, 16, 64
ALPHABET = "abcdefghijklmnopqrst"
IMAGE = VOCAB
"""Id of the image token that marks the position of a picture feature in a sequence of transformers."""
GEMMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "head_dim": 6,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = ("gpt2", "gemma", "gemma2", "paligemma")


class Ids(CharTokenizer):
    """Tokenizer without suppressed ids: generation may produce every id, as in transformers' `generate`."""

    suppressed_ids: tuple[int, ...] = ()


def our_config(family: str) -> ModelConfig:
    layer = {"kind": "layer", "eps": 1e-5 if family == "gpt2" else 1e-6}
    attention: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 6}
    decoder: dict[str, Any] = {
        "mlp": {"kind": "gated", "mlp_width": 48, "activation": "gelu_tanh"},
        "norm": {"kind": "rms", "eps": 1e-6, "offset": True},
        "position": {"kind": "rotary"},
        "attention": attention,
    }
    if family == "gpt2":
        decoder = {
            "mlp": {"kind": "plain", "mlp_width": 4 * WIDTH, "activation": "gelu_tanh"},
            "norm": layer,
            "position": {"kind": "learned"},
            "attention": attention | {"num_kv_heads": 4, "bias": True},
        }
    if family == "gemma2":
        capped = {"num_kv_heads": 2, "windows": [7, None], "soft_cap": 5.0, "scale": 0.25}
        decoder |= {"sandwich": True, "attention": attention | capped}
    return ModelConfig.model_validate(
        {
            "image": {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3},
            "text": {"kind": "chars", "alphabet": ALPHABET},
            "vision": {
                "stem": {"kind": "patch", "patch_size": 8},
                "transformer": {
                    "width": 16,
                    "depth": 1,
                    "attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "bias": True},
                    "mlp": {"kind": "plain", "mlp_width": 32, "activation": "gelu_tanh"},
                    "norm": {"kind": "layer", "eps": 1e-6},
                },
            },
            "projector": {"kind": "linear"},
            "decoder": {
                "context": CONTEXT,
                "transformer": {"width": WIDTH, "depth": DEPTH} | decoder,
                "tie_embeddings": True,
                "scale_embeddings": family != "gpt2",
                "soft_cap": 10.0 if family == "gemma2" else None,
            },
            "mask": {"kind": "prefix" if family == "paligemma" else "causal"},
            "generation": {"max_new_tokens": STEPS},
        }
    )


def their_model(family: str) -> Any:
    match family:
        case "gpt2":
            ids: dict[str, Any] = {key: GEMMA[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
            return GPT2LMHeadModel(
                GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=WIDTH, n_layer=DEPTH, n_head=4, **ids)
            )
        case "gemma":
            return GemmaForCausalLM(GemmaConfig(num_key_value_heads=1, **GEMMA))
        case "gemma2":
            capped: dict[str, Any] = {
                "attn_logit_softcapping": 5.0,
                "final_logit_softcapping": 10.0,
                "sliding_window": 7,
            }
            scale: dict[str, Any] = {"query_pre_attn_scalar": 16}
            return Gemma2ForCausalLM(Gemma2Config(num_key_value_heads=2, **GEMMA, **capped, **scale))
        case _:
            vision = {
                "model_type": "siglip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "patch_size": 8,
                "image_size": 16,
                "vision_use_head": False,
                "projection_dim": WIDTH,
            }
            text = GEMMA | {"model_type": "gemma", "num_key_value_heads": 1}
            return PaliGemmaForConditionalGeneration(
                PaliGemmaConfig(
                    vision_config=vision,
                    text_config=text,
                    image_token_index=IMAGE,
                    projection_dim=WIDTH,
                    hidden_size=WIDTH,
                )
            )


@functools.cache
def both(family: str) -> tuple[Any, VisionLanguageModel]:
    """Return a model of transformers with large random weights, and our model with a copy of the same weights."""
    torch.manual_seed(0)
    theirs = their_model(family)
    theirs.train(False)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        theirs.get_input_embeddings().weight[2] *= 2  # makes the end token likely, so that some answers end early
    ours = build_model(our_config(family), VOCAB).eval()
    state = theirs.state_dict()
    match family:
        case "gpt2":
            ours.decoder.load_state_dict(reference_conversion.gpt2(state, DEPTH))
        case "gemma" | "gemma2":
            ours.decoder.load_state_dict(
                reference_conversion.gemma(state, DEPTH, prefix="model.", sandwich=family == "gemma2")
            )
        case _:
            ours.load_state_dict(reference_conversion.paligemma(state, 1, DEPTH))
    return theirs, ours


def requests(family: str) -> list[Request]:
    """Return requests whose prompts have different lengths. Each request has a picture if the family takes pictures."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for length in (5, 1, 9, 5, 7, 2, 12, 3):
        prompt = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        has_picture = family == "paligemma"
        found.append(Request([SLOT] * 4 * has_picture + prompt, (pixels,) * has_picture))
    return found


def their_tokens(family: str, asked: list[Request], **settings: Any) -> list[list[int]]:
    """Run transformers' `generate` on a left-padded batch, and return each answer's tokens before the end token."""
    theirs, ours = both(family)
    longest = max(len(request.prefix) for request in asked)
    rows = [[0] * (longest - len(r.prefix)) + [IMAGE if i == SLOT else i for i in r.prefix] for r in asked]
    real = [[0] * (longest - len(r.prefix)) + [1] * len(r.prefix) for r in asked]
    inputs: dict[str, Tensor] = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(real)}
    if family == "paligemma":
        pixels = torch.stack([picture for request in asked for picture in request.pixels])
        inputs["pixel_values"] = (pixels.permute(0, 3, 1, 2) - ours.mean) / ours.std
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    found = theirs.generate(**inputs, max_new_tokens=STEPS, do_sample=False, early_stopping=False, **settings)
    tokens = found[:, longest:].tolist()
    return [row[: row.index(2)] if 2 in row else row for row in tokens]


def our_tokens(family: str, asked: list[Request], **settings: Any) -> list[list[int]]:
    answers = generate(both(family)[1], Ids(ALPHABET), asked, GenerationConfig(max_new_tokens=STEPS, **settings))
    return [answer.tokens for answer in answers]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_gives_the_same_tokens_as_transformers(family: str) -> None:
    asked = requests(family)
    expected = their_tokens(family, asked)
    assert our_tokens(family, asked) == expected
    assert len({tuple(tokens) for tokens in expected}) > 4
    assert len({len(tokens) for tokens in expected}) > 1, "no answer ended early"


@pytest.mark.parametrize("length_penalty", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("num_beams", [3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_gives_the_same_tokens_as_transformers(family: str, num_beams: int, length_penalty: float) -> None:
    asked, settings = requests(family), {"num_beams": num_beams, "length_penalty": length_penalty}
    expected = their_tokens(family, asked, **settings)
    assert our_tokens(family, asked, **settings) == expected
    assert expected != their_tokens(family, asked)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_decoding_with_repetition_penalty_gives_the_same_tokens_as_transformers(num_beams: int) -> None:
    # Prompts have equal lengths, because transformers would apply the repetition penalty to padding.
    asked = [request for request in requests("gpt2") if len(request.prefix) == 5]
    expected = their_tokens("gpt2", asked, num_beams=num_beams, repetition_penalty=1.4)
    assert our_tokens("gpt2", asked, num_beams=num_beams, repetition_penalty=1.4) == expected
    assert expected != their_tokens("gpt2", asked, num_beams=num_beams)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 50},
        {"top_p": 0.8},
        {"top_p": 0.01},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 1.6, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_sampling_distribution_equals_the_sampling_distribution_of_transformers(settings: dict[str, Any]) -> None:
    ours = GenerationConfig.model_validate({"temperature": 1.0, "repetition_penalty": 1.3} | settings)
    torch.manual_seed(0)
    scores, context = 3 * torch.randn(64, 40), torch.randint(0, 40, (64, 12))
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(ours.temperature)])
    theirs += [TopKLogitsWarper(settings["top_k"])] if "top_k" in settings else []
    theirs += [TopPLogitsWarper(settings["top_p"])] if "top_p" in settings else []
    theirs += [MinPLogitsWarper(settings["min_p"])] if "min_p" in settings else []
    expected = theirs(context, scores.clone())
    penalty = RepetitionPenalty(1.3, [Request(row) for row in context.tolist()], 40, torch.device("cpu"))
    found = filter_scores(penalty(scores), ours)
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found.softmax(dim=-1), expected.double().softmax(dim=-1), rtol=1e-5, atol=1e-7)
