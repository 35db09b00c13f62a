"""Folders of published models with tiny random weights, a tokenizer, and settings of pictures and generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from published_tokenizers import CONTROL, MAKE
from tiny_published_models import blocks, config, scramble
from torch import Tensor

import vlm
from vlm.checkpoint import save_model
from vlm.config import ModelConfig
from vlm.factory import build_model
from vlm.model import VisionLanguageModel
from vlm.text.published import PublishedTokenizer
from vlm.weights.export import export_weights
from vlm.weights.family import Family, Part
from vlm.weights.load import import_weights
from vlm.weights.special_tokens import check_special_tokens, read_tokenizer
from vlm.weights.tables import families

GENERATION = {
    "bos_token_id": 290, "eos_token_id": 290, "pad_token_id": 290, "max_new_tokens": 4, "do_sample": True,
    "temperature": 0.7, "top_k": 5, "top_p": 0.9, "num_beams": 1, "repetition_penalty": 1.2, "stop_strings": ["a"],
}  # fmt: skip
PICTURES = {
    "do_resize": True, "size": {"height": 16, "width": 16}, "resample": 3, "do_rescale": True,
    "rescale_factor": 0.00392156862745098, "do_normalize": True, "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5], "do_convert_rgb": None,
}  # fmt: skip
PROCESSORS: dict[str, dict[str, Any]] = {
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True,
        "crop_size": {"height": 16, "width": 16},
    },
    "paligemma": {"image_processor_type": "SiglipImageProcessor", "image_seq_length": 16},
    "paligemma2": {"image_processor_type": "SiglipImageProcessor", "image_seq_length": 16},
    "siglip": {"image_processor_type": "SiglipImageProcessor"},
    "siglip2": {"image_processor_type": "Siglip2ImageProcessor"},
    "vit": {"image_processor_type": "ViTImageProcessor"},
}

VIT: dict[str, Any] = {"class_token": True, "transformer": blocks(eps=1e-12)}
SIGLIP = {"transformer": blocks(activation="gelu_tanh", eps=1e-6)}
GEMMA: dict[str, Any] = {
    "width": 16, "depth": 3, "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
    "mlp": {"kind": "gated", "mlp_width": 24, "activation": "gelu_tanh"},
    "norm": {"kind": "rms", "eps": 1e-6, "offset": True}, "position": {"kind": "rotary"},
}  # fmt: skip
GEMMA_2 = {
    **GEMMA,
    "sandwich": True,
    "attention": {**GEMMA["attention"], "windows": [5, None], "soft_cap": 2.0, "scale": 0.25},
}
DECODER = {"tie_embeddings": True, "scale_embeddings": True}
WHOLE: dict[str, Any] = {"vision": SIGLIP, "mask": {"kind": "prefix"}, "projector": {"kind": "linear"}}
MODELS = {
    "clip": config(
        vision={
            "class_token": True,
            "pre_norm": True,
            "stem": {"kind": "patch", "patch_size": 4, "bias": False},
            "transformer": blocks(activation="quick_gelu"),
        }
    ),
    "gemma": config(decoder={"transformer": GEMMA, **DECODER}),
    "gemma2": config(decoder={"transformer": GEMMA_2, **DECODER, "soft_cap": 3.0}),
    "gpt2": config(decoder={"transformer": blocks(activation="gelu_tanh"), "tie_embeddings": True}),
    "paligemma": config(decoder={"transformer": GEMMA, **DECODER}, **WHOLE),
    "paligemma2": config(decoder={"transformer": GEMMA_2, **DECODER, "soft_cap": 3.0}, **WHOLE),
    "siglip": config(vision=SIGLIP),
    "siglip2": config(vision=SIGLIP),
    "timm": config(vision={"class_token": True, "transformer": blocks(eps=1e-6)}),
    "vit": config(vision=VIT),
}
"""Dict from families to a config of a tiny model that the family can represent."""


def family_of(name: str) -> Family:
    """Return the weight family with the given name."""
    return next(family for family in families() if family.name == name)


def publish_folder(root: Path, name: str) -> tuple[Path, ModelConfig]:
    """Write a folder `root`/published in the format of a family, and return the folder and the config of the model.

    The model has the config of MODELS, except that tokenizer and context are different.

    Args:
        root: folder for the checkpoint and the published files.
        name: name of the weight family.
    """
    backend = MAKE["byte_level"]()
    text = {"kind": "json", "vocab_size": backend.get_vocab_size(), **CONTROL["byte_level"]}
    values = MODELS[name].model_dump() | {"text": text}
    values["decoder"]["context"] = 99
    settings, part = ModelConfig.model_validate(values), family_of(name).part
    assert settings.text.kind == "json"
    tokenizer = PublishedTokenizer(json.loads(backend.to_str()), settings.text)
    model = build_model(settings, tokenizer.vocab_size)
    scramble(model)
    save_model(root / "checkpoint", model, tokenizer)
    folder = root / "published"
    export_weights(root / "checkpoint", part, name, folder)
    if name in PROCESSORS:
        (folder / "preprocessor_config.json").write_text(json.dumps(PICTURES | PROCESSORS[name]))
    if part != "encoder":
        (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder, settings


Loader = Callable[[], VisionLanguageModel]


def loaders(folder: Path, part: Part, config: ModelConfig) -> list[Loader]:
    """Return the functions that load a folder: the import into a model with a given config, and `vlm.load` if the
    folder has a whole model.
    """

    def import_part() -> VisionLanguageModel:
        vocab_size = 291
        if part != "encoder":
            assert config.text.kind == "json"
            tokenizer = read_tokenizer(config.text, folder, part)
            check_special_tokens(folder, tokenizer)
            vocab_size = tokenizer.vocab_size
        return import_weights(config, vocab_size, {part: folder})[0]

    def load() -> VisionLanguageModel:
        return vlm.load(folder, device="cpu").model

    return [import_part, load] if part == "model" else [import_part]


def weights_of(model: VisionLanguageModel) -> dict[str, Tensor]:
    """Return a dict from names to the parameters of a model."""
    return dict(model.named_parameters())
