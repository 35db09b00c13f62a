"""PaliGemma 1 and 2 give the same logits as in transformers after import and export, for pictures with prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from published_tokenizers import byte_fallback
from safetensors.torch import load_file, save_file
from test_weights_gemma import SIZES, WINDOW, decoder
from tiny_published_models import PATCH, SIZE, VOCAB, WIDTH, assert_equal, blocks, config, load, publish, send_back
from torch import Tensor
from transformers import AutoTokenizer, PaliGemmaConfig, PaliGemmaForConditionalGeneration
from typer.testing import CliRunner

from jobs.cli import app
from pipelines.config import load_model as load_named
from vlm.batch import Batch
from vlm.checkpoint import load_model
from vlm.config import ModelConfig
from vlm.model import VisionLanguageModel
from vlm.text.base import SLOT

SLOTS = (SIZE // PATCH) ** 2
MARK = VOCAB
"""Id of transformers' image token, which our models do not have. The embedding table has no row for this id."""


def ours(version: int) -> ModelConfig:
    vision = {"transformer": blocks(activation="gelu_tanh", eps=1e-6)}
    return config(vision=vision, decoder=decoder(version), mask={"kind": "prefix"}, projector={"kind": "linear"})


def original_of(version: int, vocab_size: int = VOCAB, mark: int | None = MARK) -> Any:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": SIZE,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 9}
    second = {"model_type": "gemma2", "sliding_window": WINDOW, **caps}
    settings = PaliGemmaConfig(
        vision_config=vision,
        text_config={**SIZES, "vocab_size": vocab_size, **(second if version == 2 else {"model_type": "gemma"})},
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        image_token_index=mark,
    )
    settings._attn_implementation = "eager"
    return PaliGemmaForConditionalGeneration(settings)


class Rows:
    """Input of both libraries: two rows of different lengths. Each row has a picture, a prompt and an answer."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (2, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)
        self.prefix, self.length = torch.tensor([SLOTS + 3, SLOTS + 6]), torch.tensor([SLOTS + 11, SLOTS + 8])
        index = torch.arange(int(self.length.max()))
        self.mask = (index < self.length[:, None]).long()
        ids = torch.randint(3, VOCAB, self.mask.shape, generator=generator) * self.mask
        self.ids = torch.where(index < SLOTS, SLOT, ids)

    def ours(self, model: VisionLanguageModel) -> Tensor:
        batch = Batch(self.pixels, self.ids, torch.zeros_like(self.ids), self.prefix)
        result: Tensor = model(batch).unflatten(0, self.ids.shape)
        return result

    def theirs(self, model: Any) -> Tensor:
        answer = torch.arange(self.ids.shape[1]) >= self.prefix[:, None]
        result: Tensor = model(
            input_ids=torch.where(self.ids == SLOT, MARK, self.ids),
            pixel_values=(self.pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5,
            attention_mask=self.mask,
            token_type_ids=answer.long(),
        ).logits
        return result


@pytest.mark.parametrize("version", [1, 2])
def test_paligemma_gives_the_original_logits_after_import_and_export(version: int, tmp_path: Path) -> None:
    original, rows = publish(original_of(version), tmp_path / "published"), Rows()
    model, report = load(ours(version), tmp_path / "published", "model")
    assert report.fresh == ()
    assert report.parts[0].unchecked == ("image, because the folder has no preprocessor_config.json",)
    theirs = rows.theirs(original)
    assert_equal(rows.ours(model), theirs, rows.mask)
    exported = send_back(model, "model", "paligemma2" if version == 2 else "paligemma", tmp_path / "published")
    again = PaliGemmaForConditionalGeneration.from_pretrained(exported, attn_implementation="eager")
    assert_equal(rows.theirs(again), theirs, rows.mask)


NAME_VERSIONS = {
    "as published": (("vision_tower.", "vision_tower.vision_model."),),
    "in memory of transformers 5": (
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("language_model.model.", "model.language_model."),
    ),
}


@pytest.mark.parametrize("names", NAME_VERSIONS)
def test_import_reads_all_published_versions_of_paligemma_tensor_names(names: str, tmp_path: Path) -> None:
    original, rows = publish(original_of(1), tmp_path / "published"), Rows()
    file = tmp_path / "published" / "model.safetensors"
    tensors = load_file(file)
    tied = tensors["language_model.model.embed_tokens.weight"].clone()
    for old, new in NAME_VERSIONS[names]:
        tensors = {name.replace(old, new, 1) if name.startswith(old) else name: t for name, t in tensors.items()}
    head = "language_model.lm_head.weight" if names == "as published" else "lm_head.weight"
    save_file(tensors | {head: tied}, file)
    model, report = load(ours(1), tmp_path / "published", "model")
    assert report.parts[0].tied == ("language_model.lm_head.weight",)
    assert_equal(rows.ours(model), rows.theirs(original), rows.mask)


def lakesight(*arguments: str) -> Any:
    """Run a `lakesight` command and return the command's JSON report."""
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_commands_import_weights_and_export_weights_transfer_a_complete_model_with_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    backend = byte_fallback()
    backend.add_special_tokens(["<image>"])
    vocab_size, mark = backend.get_vocab_size(), backend.token_to_id("<image>")
    original = publish(original_of(1, vocab_size, mark), Path("published"))
    backend.save("published/tokenizer.json")
    settings = ours(1).model_dump(mode="json")
    settings["text"] = {"kind": "json", "vocab_size": vocab_size, "bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}
    Path("conf/model").mkdir(parents=True)
    Path("conf/model/mine.yml").write_text(yaml.safe_dump(settings))

    lakesight("import-weights", "published", "--model", "mine", "--out", "checkpoint")
    model, tokenizer = load_model(Path("checkpoint"))
    assert model.config == load_named("mine")
    assert tokenizer.decode(tokenizer.encode("a cat")) == "a cat"
    lakesight("export-weights", "checkpoint", "--part", "model", "--as", "paligemma", "--out", "exported")
    again = PaliGemmaForConditionalGeneration.from_pretrained("exported", attn_implementation="eager")
    assert again.config.image_token_index == mark
    theirs = AutoTokenizer.from_pretrained("exported")
    assert theirs.encode("a cat", add_special_tokens=False) == tokenizer.encode("a cat")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    kept = original.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in again.state_dict().items())
