"""Training speed, in samples per second, compared with models of the same shape from timm and transformers.

    python tests/benchmarks/bench_step.py [vit_gpt2] [paligemma]

Shape `vit_gpt2` is the shipped config (384 pixels, 576 slots). Shape `paligemma` has 2 blocks in each tower and a
vocabulary of 32,768, because two copies of the model with their optimizer states must fit into memory. The weights are
random and in fp32. Both sides use torch's fused AdamW, and get the same pictures, token ids and targets. Each library
uses its default implementation of attention. The tests in tests/parity check that our models and the models of timm and
transformers compute the same numbers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import timm
import torch
from measure import in_turn, peak_memory
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PaliGemmaConfig, PaliGemmaForConditionalGeneration

from pipelines.config import load_model
from vlm.batch import IGNORE, Batch
from vlm.config import ModelConfig
from vlm.factory import build_model
from vlm.text.base import SLOT
from vlm.training.objective import num_targets, token_loss

ANSWER, ROUNDS, IMAGE_TOKEN = 32, 3, 32_767


class TimmAndGpt2(nn.Module):
    """A model that consists of a timm ViT, an MLP and a GPT-2. The input of the GPT-2 is picture features and text."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = timm.create_model("vit_mediumd_patch16_reg4_gap_384", num_classes=0)
        self.projector = nn.Sequential(nn.Linear(512, 1536), nn.GELU(), nn.Linear(1536, 768))
        self.decoder = GPT2LMHeadModel(GPT2Config())

    def forward(self, pixels_BCHW: Tensor, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Return the mean loss, computed as in `GPT2LMHeadModel`."""
        slots_BNW = self.projector(self.encoder.forward_features(pixels_BCHW)[:, 4:])
        text_BTW = self.decoder.transformer.wte(tokens_BT)
        ignored = labels_BT.new_full(slots_BNW.shape[:2], IGNORE)
        output = self.decoder(
            inputs_embeds=torch.cat((slots_BNW, text_BTW), dim=1), labels=torch.cat((ignored, labels_BT), dim=1)
        )
        return torch.as_tensor(output.loss)


def small_paligemma() -> tuple[PaliGemmaForConditionalGeneration, ModelConfig]:
    """Build our PaliGemma and the PaliGemma of transformers, both with the published widths and 2 blocks per tower."""
    text = {
        "model_type": "gemma",
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": IMAGE_TOKEN + 1,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "vision_use_head": False,
    }
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, projection_dim=2048, hidden_size=2048, image_token_id=IMAGE_TOKEN
    )
    ours = load_model("paligemma").model_dump()
    ours["vision"]["transformer"]["depth"] = ours["decoder"]["transformer"]["depth"] = 2
    return PaliGemmaForConditionalGeneration(config), ModelConfig.model_validate(ours)


def data(config: ModelConfig, vocab_size: int, batch: int) -> Batch:
    """Return pictures, and answers of ANSWER tokens after the start token."""
    generator = torch.Generator().manual_seed(0)
    size, slots = config.image.size, config.num_slots
    pixels = torch.randint(0, 256, (batch, size, size, 3), generator=generator, dtype=torch.uint8)
    words = torch.randint(5, vocab_size - 1, (batch, ANSWER + 1), generator=generator)
    tokens = torch.cat((torch.full((batch, slots), SLOT), words[:, :-1]), dim=1)
    labels = torch.cat((torch.full((batch, slots), IGNORE), words[:, 1:]), dim=1)
    return Batch(pixels, tokens, labels, torch.full((batch,), slots + 1))


def learner(model: nn.Module, loss_of: Callable[[], Tensor], batch: int) -> Callable[[], int]:
    """Return a function that runs one training step per call."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> int:
        optimizer.zero_grad()
        torch.autograd.backward(loss_of())
        optimizer.step()
        return batch

    return step


def ours(config: ModelConfig, vocab_size: int, batch: Batch) -> Callable[[], int]:
    """Return our training step."""
    model = build_model(config, vocab_size)

    def loss() -> Tensor:
        return token_loss(model(batch), batch) / num_targets(batch)

    return learner(model, loss, len(batch.tokens_BT))


def compare(name: str, mine: Callable[[], int], theirs: Callable[[], int]) -> None:
    """Measure our training step and the other library's training step in turn, and print the ratio."""
    works = {"lakesight": mine, "transformers": theirs}
    for work in works.values():
        work()
    with peak_memory() as samples:
        rates = in_turn(works, ROUNDS, time.process_time)
    ratio = rates["lakesight"] / rates["transformers"]
    each = ", ".join(f"{who} {rate:.3f} samples/s" for who, rate in rates.items())
    print(f"{name:24} {each}: lakesight is {ratio:.2f} of it; both in memory: {max(samples) / 1e9:.1f} GB")


def vit_gpt2() -> tuple[Callable[[], int], Callable[[], int]]:
    """Return our training step and the training step of the other library."""
    config = load_model("vit_gpt2")
    batch, slots = data(config, 50_257, 2), config.num_slots
    original = TimmAndGpt2()
    pixels = (batch.pixels_PHWC.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    text, labels = batch.tokens_BT[:, slots:], F.pad(batch.labels_BT[:, slots:-1], (1, 0), value=IGNORE)
    return ours(config, 50_257, batch), learner(original, lambda: original(pixels, text, labels), len(text))


def paligemma() -> tuple[Callable[[], int], Callable[[], int]]:
    """Return our training step and the training step of the other library."""
    original, config = small_paligemma()
    batch = data(config, IMAGE_TOKEN, 2)
    tokens = batch.tokens_BT.masked_fill(batch.tokens_BT == SLOT, IMAGE_TOKEN)
    inputs = {
        "input_ids": tokens,
        "pixel_values": (batch.pixels_PHWC.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5,
        "attention_mask": torch.ones_like(tokens),
        "token_type_ids": (torch.arange(tokens.shape[1]) > config.num_slots).long().expand_as(tokens),
        "labels": F.pad(batch.labels_BT[:, :-1], (1, 0), value=IGNORE),
    }
    theirs = learner(original, lambda: torch.as_tensor(original(**inputs).loss), len(tokens))
    return ours(config, IMAGE_TOKEN + 1, batch), theirs


SHAPES = {"vit_gpt2": vit_gpt2, "paligemma": paligemma}


def main() -> None:
    """Measure each shape that is named on the command line. Without names, measure all shapes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"batch 2, one thread, CPU seconds, median of {ROUNDS} rounds")
    for name in sys.argv[1:] or SHAPES:
        compare(name, *SHAPES[name]())


if __name__ == "__main__":
    main()
