"""Captions per second of Lakesight compared with transformers' `generate` and with seemore's generation loop.

    pip install transformers timm
    python tests/benchmarks/bench_generate.py vit_gpt2 paligemma
    git clone https://github.com/AviSoori1x/seemore && python tests/benchmarks/bench_generate.py FOLDER_OF_SEEMORE

In the cases `vit_gpt2` and `paligemma`, Lakesight and transformers start from uint8 pictures and generate 24 tokens
greedily with random weights. The tokenizer has no end token, so that both libraries generate the same number of tokens.
The first measurement is in fp32. At batch size 1, the benchmark also checks that both libraries generate the same
tokens. The second measurement is in bf16. The benchmark uses one thread and measures CPU time, so that other work on
the machine does not change the ratio. In case `vit_gpt2`, the other model consists of timm's ViT, our projector, and
GPT2LMHeadModel.generate(inputs_embeds=...). In case `paligemma`, the other model is PaliGemmaForConditionalGeneration
with 4 layers in each tower and a vocabulary of 32,000. The full model does not fit into memory. In both libraries, the
vision tower encodes each picture only once.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import in_turn, peak_memory
from torch import Tensor

from pipelines.config import load_model
from vlm import text
from vlm.config import GenerationConfig, ModelConfig, Precision
from vlm.factory import build_model
from vlm.generation.generate import Request, generate
from vlm.model import VisionLanguageModel
from vlm.precision import set_precision
from vlm.text.base import SLOT
from vlm.text.chars import CharTokenizer

sys.path.append(str(Path(__file__).parents[1] / "support"))
import reference_conversion

NEW, LAYERS, VOCAB = 24, 4, 32_000
ROUNDS = {1: 3, 16: 1}
"""Number of measurement rounds for each batch size. A round at batch size 16 takes minutes."""
PROMPT = [100, 200, 300, 400, 500]
Caption = Callable[[Tensor], list[list[int]]]
Originals = tuple[Caption, list[torch.nn.Module]]
"""A function that captions pictures with the other library, and the modules that the function uses."""


class Ids(CharTokenizer):
    """A tokenizer without an end token, so that every caption has the same length."""

    eos_id = -1
    suppressed_ids: tuple[int, ...] = ()

    def decode(self, ids: object) -> str:
        """Return an empty string, because the benchmark compares only tokens."""
        return ""


def ours(model: VisionLanguageModel) -> Caption:
    """Return a function that captions with our `generate`."""
    settings = GenerationConfig(max_new_tokens=NEW)
    prefix = [SLOT] * model.config.num_slots + PROMPT

    def caption(pixels_PHWC: Tensor) -> list[list[int]]:
        answers = generate(model, Ids(""), [Request(prefix, (picture,)) for picture in pixels_PHWC], settings)
        return [answer.tokens for answer in answers]

    return caption


def normalised(model: VisionLanguageModel, pixels_PHWC: Tensor) -> Tensor:
    """Normalise pictures for the other library's encoder."""
    return (pixels_PHWC.permute(0, 3, 1, 2).float() - model.mean) / model.std


def vit_gpt2() -> tuple[VisionLanguageModel, Originals]:
    """Build our model, and the same model from timm and transformers."""
    import timm
    from transformers import GPT2Config, GPT2LMHeadModel

    model = build_model(load_model("vit_gpt2"), 50257).eval()
    vit: Any = timm.create_model("vit_mediumd_patch16_reg4_gap_384", pretrained=False)
    gpt2: Any = GPT2LMHeadModel(GPT2Config())
    state = reference_conversion.timm_vit(vit.state_dict(), 20)
    model.encoder.load_state_dict(state)
    model.decoder.load_state_dict(reference_conversion.gpt2(gpt2.state_dict(), 12))
    projector = copy.deepcopy(model.projector)
    for module in (vit, gpt2, projector):
        module.train(False)

    @torch.inference_mode()
    def caption(pixels_PHWC: Tensor) -> list[list[int]]:
        features = projector(vit._intermediate(normalised(model, pixels_PHWC).to(gpt2.dtype)))
        words = gpt2.transformer.wte(torch.tensor(PROMPT)).expand(len(features), -1, -1)
        inputs = torch.cat([features, words], dim=1)
        mask = torch.ones(inputs.shape[:2], dtype=torch.long)
        found = gpt2.generate(
            inputs_embeds=inputs, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        return list(found.tolist())

    vit._intermediate = lambda pixels: vit.forward_intermediates(
        pixels, indices=1, norm=False, output_fmt="NLC", intermediates_only=True
    )[0]
    return model, (caption, [vit, projector, gpt2])


def paligemma() -> tuple[VisionLanguageModel, Originals]:
    """Build our model with a few layers, and the same model from transformers."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    shape: dict[str, Any] = load_model("paligemma").model_dump()
    shape["vision"]["transformer"]["depth"] = shape["decoder"]["transformer"]["depth"] = LAYERS
    model = build_model(ModelConfig.model_validate(shape), VOCAB).eval()
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "vision_use_head": False,
    }
    words = {
        "model_type": "gemma",
        "vocab_size": VOCAB,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
    }
    theirs: Any = PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            vision_config=vision, text_config=words, image_token_index=VOCAB, projection_dim=2048, hidden_size=2048
        )
    )
    theirs.train(False)
    model.load_state_dict(reference_conversion.paligemma(theirs.state_dict(), LAYERS, LAYERS))

    @torch.inference_mode()
    def caption(pixels_PHWC: Tensor) -> list[list[int]]:
        ids = torch.tensor([[VOCAB] * model.config.num_slots + PROMPT] * len(pixels_PHWC))
        found = theirs.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            token_type_ids=torch.zeros_like(ids),
            pixel_values=normalised(model, pixels_PHWC).to(theirs.dtype),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
        )
        return list(found[:, ids.shape[1] :].tolist())

    return model, (caption, [theirs])


def beside_transformers(name: str) -> None:
    """Measure our model and the other library's model in turn at batch sizes 1 and 16, first in fp32, then in bf16."""
    torch.manual_seed(0)
    model, (theirs, modules) = {"vit_gpt2": vit_gpt2, "paligemma": paligemma}[name]()
    mine, size = ours(model), model.config.image.size
    for precision in (Precision.FP32, Precision.BF16):
        if precision is Precision.BF16:
            set_precision(model, precision)
            for module in modules:
                module.bfloat16()
        for batch, rounds in ROUNDS.items():
            pixels = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)
            if batch == 1:
                same = mine(pixels) == theirs(pixels)
                assert same or precision is Precision.BF16, "the tokens differ"
            works = {"lakesight": lambda: len(mine(pixels)), "transformers": lambda: len(theirs(pixels))}  # noqa: B023
            with peak_memory() as samples:
                rates = in_turn(works, rounds, time.process_time)
            show(f"{name}, {precision}, batch {batch}", rates, max(samples))


def show(what: str, rates: dict[str, float], peak: int) -> None:
    """Print one line per program with its speed, then one line with the peak memory."""
    for side, rate in rates.items():
        ratio = rates["lakesight"] / rate
        print(f"{what:28} {side:22} {rate:8.3f} captions per CPU second  lakesight is {ratio:5.2f} of it")
    print(f"{what:28} {peak / 1e9:.1f} GB with both models")


def compare_with_seemore(folder: Path) -> None:
    """Compare our generation with seemore's loop for 30 tokens, the longest text for which seemore has position
    embeddings.
    """
    os.chdir(folder)  # `import seemore` reads input.txt in the working folder
    sys.path.insert(0, str(folder))
    their: Any = importlib.import_module("seemore")
    theirs: Any = their.VisionLanguageModel(
        their.n_embd,
        their.image_embed_dim,
        their.vocab_size,
        their.n_layer,
        their.img_size,
        their.patch_size,
        their.n_head,
        their.num_blks,
        their.emb_dropout,
        their.blk_dropout,
    ).eval()
    config = load_model("seemore")
    tokenizer = text.learn(config.text, [])
    model = build_model(config, tokenizer.vocab_size).eval()
    settings = GenerationConfig(max_new_tokens=30, temperature=1.0)
    prefix = [SLOT] * config.num_slots + [tokenizer.bos_id]

    def loop(pixels: Tensor) -> int:
        floats = normalised(model, pixels)
        with torch.no_grad():
            return len(theirs.generate(floats, torch.zeros(len(floats), 1, dtype=torch.long), 30))

    def mine(pixels: Tensor) -> int:
        return len(generate(model, Ids(""), [Request(prefix, (picture,)) for picture in pixels], settings))

    pixels = torch.randint(0, 256, (64, 96, 96, 3), dtype=torch.uint8)
    halved = copy.deepcopy(model)
    set_precision(halved, Precision.BF16)

    def in_half(pixels: Tensor) -> int:
        return len(generate(halved, Ids(""), [Request(prefix, (picture,)) for picture in pixels], settings))

    works: dict[str, Callable[[], int]] = {
        "lakesight": lambda: mine(pixels),
        "lakesight, bf16": lambda: in_half(pixels),
        "lakesight, one by one": lambda: sum(mine(picture[None]) for picture in pixels[:16]),
        "seemore, batch 64": lambda: loop(pixels),
        "seemore, one by one": lambda: sum(loop(picture[None]) for picture in pixels[:16]),
    }
    for work in works.values():
        work()
    with peak_memory() as samples:
        rates = in_turn(works, 3, time.process_time)
    show("seemore's size", rates, max(samples))


def main() -> None:
    """Run one benchmark for each argument. An argument is the name of a case, or the folder of seemore."""
    torch.set_num_threads(1)
    if not sys.argv[1:]:
        print("skipped: needs transformers and timm, or a clone of seemore\n", __doc__)
    for argument in sys.argv[1:]:
        if argument in ("vit_gpt2", "paligemma"):
            beside_transformers(argument)
        else:
            compare_with_seemore(Path(argument).absolute())


if __name__ == "__main__":
    main()
