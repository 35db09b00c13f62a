"""Tests of situations from public bug reports about generation, tokenizers and adapters in other libraries.

The report `transformers 31435` is GitHub issue or pull request 31435 of the project transformers.

| report | situation | what went wrong there |
|---|---|---|
| transformers 31435 | a stop text that the model never generates | exception |
| haystack 5510 | an answer that begins with a space, and a stop text | the space was lost |
| transformers 40520, Clover-Edition 186 | a stop text that ends inside a token; several stop texts | no stop |
| transformers 2302, NeMo 8194, cerebros 294 | repetition penalty of negative logits | repeated tokens got more likely |
| text-generation-inference 1765 | repetition penalty in a batch with padding | padding was penalised |
| transformers.js 1062 | a token that occurs twice in the prompt | the penalty was applied twice |
| transformers 25455, 27558 | length penalty in a batch with padding and prompts | the prompt or padding was counted |
| unsloth 3795, reasoning-from-scratch 33 | prompts of different lengths in a batch | wrong positions |
| exllamav2 606 | prompts of different lengths and sampling | answers depend on the batch |
| nanochat 466, transformers 23688, fastai 1708 | top_k 0, top_p 0, min_p 1 | crash in the sampler |
| TransformerLens 1347, sendnn-inference 543 | top_k above the size of the vocabulary | crash |
| transformers 45830 | a very large number of beams | crash |
| TensorRT-LLM 1386, transformers 19006 | length_penalty without beam search | ignored without a message |
| exo 1691, ferrox 124, lucebox 641, mlx-vlm 1778 | an emoji of several tokens in a stream | replacement characters |
| cactus 684 | byte tokens in an answer | shown as <0xEA> |
| transformers 2071 | two spaces in a prompt | exception |
| peft 2018 | an adapter for a tied output head | the embeddings were changed too |
| peft 1035 | merge of an adapter | other outputs after the merge |
| mistral.rs 246, transformers 37574, Megatron-Bridge 5259 | sequence longer than the attention window | wrong cache |
| vllm 6366 | pictures and weights of different number formats | exception |
| transformers 46277 | overflow of fp16 | answers of NaN |
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from published_tokenizers import published
from tiny_models import tiny_config, tiny_model, tiny_pixels

import vlm
from vlm import text
from vlm.captioner import Captioner
from vlm.config import AdapterConfig, BpeConfig
from vlm.errors import ConfigError, UserError
from vlm.generation.generate import Request
from vlm.generation.sampling import RepetitionPenalty
from vlm.text.base import Tokenizer
from vlm.text.stop import safe_text
from vlm.training.adapters import add_adapter, merge_adapter

PICTURES = [Image.fromarray(pixels.numpy()) for pixels in tiny_pixels(6)]
PROMPTS = ["", "what", "a long question", "why", "", "a  b\t c"]
CAPTIONER = Captioner(*tiny_model("other"))


def captions(captioner: Captioner = CAPTIONER, **settings: Any) -> list[str]:
    """Return the captions of all pictures in one batch. Each caption must equal the caption without a batch."""
    together = captioner.caption(PICTURES, PROMPTS, **settings)
    alone = [captioner.caption(*pair, **settings)[0] for pair in zip(PICTURES, PROMPTS, strict=True)]
    assert [result.error for result in together] == [None] * len(together)
    assert [result.caption for result in alone] == [result.caption for result in together]
    return [str(result.caption) for result in together]


# ------------------------------------------------------------------------------------------------ stop texts


def test_a_stop_text_that_is_never_generated_changes_nothing() -> None:
    assert captions(stop=["\u4e2d\u6587 never"]) == captions()


def test_a_stop_text_cuts_the_answer_anywhere_and_keeps_the_spaces_before_the_stop_text() -> None:
    free = next(caption for caption in captions(max_new_tokens=12) if len(caption) > 6)
    index = captions(max_new_tokens=12).index(free)
    for start in range(1, len(free) - 2):
        stop = free[start : start + 2]
        assert captions(max_new_tokens=12, stop=[stop])[index] == free[: free.index(stop)]
        both = captions(max_new_tokens=12, stop=["never", stop, free[-1]])[index]
        assert both == free[: min(free.index(stop), free.index(free[-1]))]


def test_spaces_at_the_beginning_of_an_answer_are_kept_with_a_stop_text() -> None:
    captioner = Captioner(*tiny_model("plain"))
    blank = Image.new("CMYK", (9, 9))
    free = str(captioner.caption(blank, max_new_tokens=3)[0].caption)
    assert free.startswith(" ")
    assert captioner.caption(blank, max_new_tokens=3, stop=free[-1])[0].caption == free[:-1]


# ------------------------------------------------------------------------------------------------ penalties


def test_a_repetition_penalty_makes_repeated_tokens_less_likely_once_for_positive_and_negative_logits() -> None:
    penalty = RepetitionPenalty(2.0, [Request([0, 1, 1, 1])], 3, torch.device("cpu"))
    assert penalty(torch.tensor([[4.0, -4.0, 4.0]])).tolist() == [[2.0, -8.0, 4.0]]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 3.0},
        {"num_beams": 3, "length_penalty": 3.0},
        {"num_beams": 3, "length_penalty": -2.0, "repetition_penalty": 1.5},
        {"temperature": 1.5, "top_k": 10**6, "seed": 4},
        {"temperature": 1.5, "min_p": 1.0},
        {"temperature": 1.5, "top_p": 1e-9},
    ],
    ids=str,
)
def test_prompts_and_padding_of_other_rows_do_not_change_an_answer(settings: dict[str, Any]) -> None:
    assert len(set(captions(max_new_tokens=6, **settings))) > 1


def test_filters_that_leave_one_token_choose_the_most_likely_token_and_zero_is_refused() -> None:
    greedy = captions()
    for settings in ({"min_p": 1.0}, {"top_p": 1e-9}, {"top_k": 1}):
        assert captions(temperature=1.5, **settings) == greedy
    for wrong in ({"top_k": 0}, {"top_p": 0.0}, {"min_p": -0.1}, {"num_beams": 5000}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            CAPTIONER.caption(PICTURES, **wrong)


def test_more_beams_than_tokens_give_an_answer() -> None:
    assert CAPTIONER.caption(PICTURES[0], num_beams=500, max_new_tokens=2)[0].error is None


# ------------------------------------------------------------------------------------------------ tokenizers


def byte_tokenizers() -> list[Tokenizer]:
    with tempfile.TemporaryDirectory() as folder:
        found = [text.learn(published(Path(folder), which), ()) for which in ("byte_level", "byte_fallback")]
    return [*found, text.learn(BpeConfig(kind="bpe", vocab_size=260), [])]


@pytest.mark.parametrize("answer", ["a \U0001f600 b", "\uae70", "\u00e9\U0001f468\u200d\U0001f469", "a  b"], ids=ascii)
@pytest.mark.parametrize("tokenizer", byte_tokenizers(), ids=lambda tokenizer: type(tokenizer).__name__)
def test_a_character_of_several_tokens_is_streamed_whole_and_decoded_without_byte_tokens(
    tokenizer: Tokenizer, answer: str
) -> None:
    ids = tokenizer.encode(answer)
    assert tokenizer.decode(ids) == answer
    shown = [safe_text(tokenizer, ids[:count], ()) for count in range(len(ids) + 1)]
    assert all(answer.startswith(piece) for piece in shown)


# ------------------------------------------------------------------------------------------------ adapters


def test_an_adapter_for_a_tied_output_head_is_refused() -> None:
    config = tiny_config("plain").model_dump()
    config["decoder"]["tie_embeddings"] = True
    model = vlm.build(config).model
    with pytest.raises(ConfigError, match="head"):
        add_adapter(model, AdapterConfig(rank=2, alpha=4.0, pattern=r"decoder\.head"))


def test_a_merged_adapter_computes_the_same_captions_as_the_adapter() -> None:
    captioner = Captioner(*tiny_model("other"))
    before = captions(captioner)
    add_adapter(captioner.model, AdapterConfig(rank=2, alpha=8.0, pattern=r"decoder\.blocks\..*"))
    with torch.no_grad():
        for name, parameter in captioner.model.named_parameters():
            if name.endswith(".up"):
                parameter.normal_(std=0.5)
    adapted = captions(captioner)
    merge_adapter(captioner.model)
    assert captions(captioner) == adapted != before


# ------------------------------------------------------------------------------------------------ cache and formats


@pytest.mark.parametrize("window", [1, 2, 5])
def test_an_answer_longer_than_the_attention_window_has_the_logprobs_of_a_forward_pass_without_cache(
    window: int,
) -> None:
    config = tiny_config("plain").model_dump()
    config["decoder"]["transformer"]["attention"]["windows"] = [window, None]
    captioner = vlm.build(config, seed=3)
    (result,) = captioner.caption(PICTURES[0], "what", max_new_tokens=8)
    (scored,) = captioner.logprobs(PICTURES[0], "what", [str(result.caption)])
    generated = scored.logprobs[: result.num_tokens]
    assert sum(generated) / len(generated) == pytest.approx(result.mean_logprob, abs=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_pictures_of_any_kind_are_captioned_in_each_number_format(precision: str, tmp_path: Path) -> None:
    CAPTIONER.save(tmp_path)
    captioner = vlm.load(tmp_path, device="cpu", precision=precision)
    pictures: list[Any] = [PICTURES[0], PICTURES[0].convert("L"), tiny_pixels(1)[0].numpy()]
    assert [result.error for result in captioner.caption(pictures)] == [None] * 3


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (1e3, r"an overflow in the computation.*use precision fp32"),
        (1e6, r"do not fit the number format.*numbers above 65504 in projector\..*use precision bf16 or fp32"),
    ],
)
def test_an_overflow_of_fp16_is_an_error_that_recommends_fp32(factor: float, expected: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model("plain")
    with torch.no_grad():
        weight = model.projector.get_parameter("weight")
        weight.copy_(weight / weight.abs().max() * 60 * factor)
    Captioner(model, tokenizer).save(tmp_path)
    assert vlm.load(tmp_path, device="cpu").caption(PICTURES[0])[0].error is None
    with pytest.raises(UserError, match=expected):
        vlm.load(tmp_path, device="cpu", precision="fp16").caption(PICTURES[0])
