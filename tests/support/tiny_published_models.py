"""Tiny models of other libraries with random weights, and models of our library with the same shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vlm.checkpoint import save_model
from vlm.config import ModelConfig
from vlm.model import VisionLanguageModel
from vlm.text.chars import CharTokenizer
from vlm.weights.export import export_weights
from vlm.weights.family import Part
from vlm.weights.load import ImportReport, import_weights
from vlm.weights.tables import families

VOCAB = 40
WIDTH, DEPTH, HEADS, MLP, PATCH, SIZE = 16, 3, 2, 24, 4, 16


def blocks(**changes: Any) -> dict[str, Any]:
    """Return the config of a transformer with biases, plain MLPs and LayerNorm."""
    attention = {"num_heads": HEADS, "num_kv_heads": HEADS, "head_dim": WIDTH // HEADS, "bias": True}
    mlp = {"kind": "plain", "mlp_width": MLP, "activation": changes.pop("activation", "gelu")}
    norm = {"kind": "layer", "eps": changes.pop("eps", 1e-5)}
    return {"width": WIDTH, "depth": DEPTH, "attention": attention, "mlp": mlp, "norm": norm, **changes}


def config(
    vision: dict[str, Any] | None = None, decoder: dict[str, Any] | None = None, size: int = SIZE, **others: Any
) -> ModelConfig:
    """Return a model config with the given encoder and decoder. An omitted encoder or decoder has default settings."""
    return ModelConfig.model_validate(
        {
            "image": others.pop("image", {"size": size}),
            "text": {"kind": "json", "vocab_size": VOCAB, "bos": "<s>", "eos": "</s>", "pad": "<pad>"},
            "vision": {"stem": {"kind": "patch", "patch_size": PATCH}, "transformer": blocks(), **(vision or {})},
            "decoder": {"context": 48, "transformer": blocks(), **(decoder or {})},
            "generation": {"max_new_tokens": 4},
            **others,
        }
    )


def scramble(model: nn.Module, seed: int = 0) -> None:
    """Randomise all parameters, including the norms and biases that are constant in a new model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.2 * noise)


def publish(model: Any, folder: Path, seed: int = 0) -> Any:
    """Randomise a transformers model and save it with `save_pretrained`. Return the model in evaluation mode."""
    scramble(model, seed)
    model.eval().save_pretrained(folder)
    return model


def load(
    settings: ModelConfig, folder: Path, part: Part, vocab_size: int = VOCAB
) -> tuple[VisionLanguageModel, ImportReport]:
    """Import the whole model, its encoder or its decoder (`part`) from a folder of published weights."""
    return import_weights(settings, vocab_size, {part: folder})


def send_back(model: VisionLanguageModel, part: Part, family: str, original: Path, *missing: str) -> Path:
    """Save and export our model, and check that all tensors except `missing` equal the original tensors bit for bit."""
    checkpoint, exported = original.parent / "checkpoint", original.parent / "exported"
    save_model(checkpoint, model, CharTokenizer("ab"))
    export_weights(checkpoint, part, family, exported)
    before, after = load_file(original / "model.safetensors"), load_file(exported / "model.safetensors")
    table = next(known for known in families() if known.name == family)
    renamed = {name: before[spelled] for name, spelled in table.canonical_names(before).items()}
    assert {name for name in renamed if name not in after} == set(missing)
    assert set(after) <= set(renamed)
    assert [name for name in after if not torch.equal(after[name], renamed[name])] == []
    return exported


def pixels(count: int = 2, size: int = SIZE, seed: int = 0) -> Tensor:
    """Return normalised pictures (count, 3, size, size)."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def tokens(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return right-padded rows of random token ids, with `lengths` ids before the padding, and the attention mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def logits(model: VisionLanguageModel, ids: Tensor) -> Tensor:
    """Return our decoder's logits (B, T, V) for text without a picture."""
    return model.decoder.logits(model.decoder(model.decoder.embed(ids), mask=None))


def assert_equal(ours: Tensor, theirs: Tensor, mask: Tensor | None = None) -> None:
    """Check that tensors are equal up to 1e-5 where the mask is true, and that their values are not nearly constant."""
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs()
    assert float((difference if mask is None else difference[mask.bool()]).max()) <= 1e-5
    assert float(theirs.std()) > 0.05
