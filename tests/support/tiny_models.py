"""Tiny models and batches. Together, the models contain every `kind` that a part of the model config can have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from vlm import text
from vlm.batch import IGNORE, Batch
from vlm.config import ModelConfig
from vlm.factory import build_model
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer
from vlm.text.prompt import answer_ids, prefix_ids
from vlm.training.loop import StepReport, fit

ALPHABET = "abcdefghijklmnopqrstuvwxyz ?\n"


def tiny_config(variant: str) -> ModelConfig:
    """Return the model config of a variant in VARIANTS, for example `plain`."""
    if variant in RARE:
        return _rare_config(variant)
    plain = variant == "plain"
    return ModelConfig.model_validate(
        {
            "image": {"size": 16},
            "text": {"kind": "chars", "alphabet": ALPHABET},
            "vision": {
                "stem": {"kind": "patch", "patch_size": 8}
                if plain
                else {"kind": "conv", "channels": [8, 8], "blocks": [0, 1]},
                "class_token": plain,
                "select": "patches",
                "transformer": {
                    "width": 16,
                    "depth": 2,
                    "attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8},
                    "mlp": {"kind": "plain", "mlp_width": 32},
                },
            },
            "projector": {"kind": "linear"} if plain else {"kind": "mlp", "mlp_width": 24},
            "decoder": {
                "context": 48,
                "transformer": {
                    "width": 24,
                    "depth": 2,
                    "attention": {"num_heads": 4, "num_kv_heads": 4 if plain else 2, "head_dim": 6, "bias": plain},
                    "mlp": {"kind": "plain" if plain else "gated", "mlp_width": 32},
                    "norm": {"kind": "layer" if plain else "rms"},
                    "position": {"kind": "learned" if plain else "rotary"},
                },
                "tie_embeddings": not plain,
            },
            "mask": {"kind": "prefix" if variant == "prefix" else "causal"},
            "generation": {"max_new_tokens": 8},
        }
    )


RARE = ("registers", "capped", "looking", "routed", "relative", "parallel")
VISION = {
    "registers": {"registers": 2, "position_on": "patches", "pre_norm": True, "post_norm": False},
    "capped": {"class_token": True, "registers": 1, "select": "attention"},
}
LOOK = {"num_heads": 2, "head_dim": 8, "mlp": {"kind": "plain", "mlp_width": 24}}
PROJECTOR = {
    "registers": {"kind": "pixel_shuffle", "factor": 2},
    "looking": {"kind": "resampler", "num_latents": 3, "depth": 2, **LOOK},
}
FUSION = {"looking": {"kind": "cross_attention", "every": 2, **LOOK}}


ENCODER_EXPERTS = {"kind": "moe", "num_experts": 3, "expert": {"kind": "plain", "mlp_width": 16}, "noisy": True}
DECODER_EXPERTS = {"kind": "moe", "num_experts": 4, "expert": {"kind": "gated", "mlp_width": 16}, "noisy": True}


def _rare_config(variant: str) -> ModelConfig:
    """Return a model config that has kinds of parts that only some published model families use."""
    capped = variant == "capped"
    config = tiny_config("prefix" if capped else "plain").model_dump()
    config["vision"] |= VISION.get(variant, {})
    if variant == "looking":
        config["vision"] |= {"registers": 1}
        config["vision"]["transformer"]["position"] = {"kind": "axial", "first": "column", "learned": True}
    if variant == "relative":
        position = {"kind": "relative", "mlp_width": 8}
        config["vision"]["transformer"] |= {"position": position, "sandwich": True, "input_norms": False}
    if variant == "parallel":
        config["vision"]["transformer"]["position"] = {"kind": "mixed", "learned": True}
        for part in ("vision", "decoder"):
            config[part]["transformer"] |= {"parallel": True, "norm": {"kind": "rms"}}
            config[part]["transformer"]["attention"] |= {"qk_norm": True}
    config["vision"]["transformer"]["layer_scale"] = 0.5 if variant == "registers" else None
    config["projector"] = PROJECTOR.get(variant, config["projector"])
    config["fusion"] = FUSION.get(variant, {"kind": "slots"})
    if variant == "routed":
        config["vision"]["transformer"]["mlp"] = ENCODER_EXPERTS
        config["decoder"]["transformer"]["mlp"] = DECODER_EXPERTS
    if capped:
        config["decoder"] |= {"scale_embeddings": True, "soft_cap": 3.0}
        config["decoder"]["transformer"] |= {"sandwich": True, "norm": {"kind": "rms", "offset": True}}
        config["decoder"]["transformer"]["attention"] |= {"windows": [5, None], "soft_cap": 2.0, "scale": 0.3}
    return ModelConfig.model_validate(config)


VARIANTS = ("plain", "other", "prefix", *RARE)


def tiny_model(variant: str, seed: int = 1) -> tuple[VisionLanguageModel, Tokenizer]:
    """Build a model in evaluation mode. The weights are so large that the model's answers depend on the picture."""
    config = tiny_config(variant)
    tokenizer = text.learn(config.text, [])
    torch.manual_seed(seed)
    model = build_model(config, tokenizer.vocab_size).eval()
    with torch.no_grad():
        for part in (model.projector, model.decoder.blocks):
            for parameter in part.parameters():
                parameter.mul_(4)
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(1)
    return model, tokenizer


def wide_model() -> tuple[VisionLanguageModel, Tokenizer]:
    """Build a model whose layers have widths that int4 supports, except for the layers in the encoder's MLPs."""
    config = tiny_config("plain").model_dump()
    for part, width in (("vision", 32), ("decoder", 64)):
        attention = {"num_heads": 4, "num_kv_heads": 4, "head_dim": width // 4}
        config[part]["transformer"] |= {"width": width, "attention": attention}
    config["vision"]["transformer"]["mlp"] = {"kind": "plain", "mlp_width": 40}
    wide = ModelConfig.model_validate(config)
    tokenizer = text.learn(wide.text, [])
    torch.manual_seed(0)
    return build_model(wide, tokenizer.vocab_size).eval(), tokenizer


def tiny_pixels(count: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    """Return random pictures, (count, size, size, 3) uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)


def tiny_batch(model: VisionLanguageModel, tokenizer: Tokenizer, texts: list[tuple[str, str]], seed: int = 0) -> Batch:
    """Return a right-padded batch of (prompt, answer) pairs with random pictures."""
    prefixes = [prefix_ids(tokenizer, model.config.num_slots, prompt) for prompt, _ in texts]
    rows = [prefix + answer_ids(tokenizer, answer) for prefix, (_, answer) in zip(prefixes, texts, strict=True)]
    length = max(len(row) for row in rows) - 1
    tokens = torch.full((len(rows), length), tokenizer.pad_id)
    labels = torch.full((len(rows), length), IGNORE)
    for i, (prefix, row) in enumerate(zip(prefixes, rows, strict=True)):
        tokens[i, : len(row) - 1] = torch.tensor(row[:-1])
        labels[i, len(prefix) - 1 : len(row) - 1] = torch.tensor(row[len(prefix) :])
    return Batch(tiny_pixels(len(rows), seed=seed), tokens, labels, torch.tensor([len(p) for p in prefixes]))


def fit_tiny(
    model: VisionLanguageModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Sequence[Batch]],
    *,
    lr: float,
    start: int = 0,
    label_smoothing: float = 0.0,
    contrastive: float = 0.0,
) -> list[StepReport]:
    """Train a model on the CPU with a constant learning rate, and return the report of each step."""
    reports: list[StepReport] = []
    fit(
        model,
        optimizer,
        batches,
        start=start,
        lr_schedule=lambda step: lr,
        grad_clip=1.0,
        seed=1,
        rank=0,
        device=torch.device("cpu"),
        bf16=False,
        on_step=reports.append,
        label_smoothing=label_smoothing,
        contrastive=contrastive,
    )
    return reports
