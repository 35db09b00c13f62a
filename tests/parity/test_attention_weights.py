"""Attention maps of PaliGemma 1 and 2 equal transformers' eager attention; published models load without our config."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import torch
from published_tokenizers import byte_fallback
from test_weights_paligemma import MARK, SLOTS, Rows, original_of, ours
from tiny_published_models import DEPTH, load, publish

import vlm
from vlm.errors import CheckpointError
from vlm.generation.attention_maps import attention_maps, rollout
from vlm.generation.generate import Completion, Request
from vlm.text.base import SLOT
from vlm.text.chars import CharTokenizer


@pytest.mark.parametrize("version", [1, 2])
def test_the_attention_weights_of_decoder_and_encoder_equal_the_weights_in_transformers(
    version: int, tmp_path: Path
) -> None:
    original, rows = publish(original_of(version), tmp_path / "published"), Rows()
    model, _ = load(ours(version), tmp_path / "published", "model")
    length, prefix = int(rows.length[0]), int(rows.prefix[0])
    ids = rows.ids[:1, :length]
    request = Request(ids[0, :prefix].tolist(), (rows.pixels[0],))
    completion = Completion(ids[0, prefix:].tolist(), text="")
    maps = attention_maps(model, CharTokenizer(string.ascii_letters), request, completion)
    pixels = (rows.pixels[:1].permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.inference_mode():
        theirs = original(
            input_ids=torch.where(ids == SLOT, MARK, ids),
            pixel_values=pixels,
            attention_mask=torch.ones_like(ids),
            token_type_ids=(torch.arange(length)[None] >= prefix).long(),
            output_attentions=True,
        ).attentions
        tower = original.model.vision_tower(pixels, output_attentions=True).attentions
    expected_TLHN = torch.stack([layer[0, :, prefix - 1 : length - 1, :SLOTS] for layer in theirs]).permute(2, 0, 1, 3)
    assert expected_TLHN.shape[1] == DEPTH
    assert torch.allclose(maps.decoder_TLHN, expected_TLHN, atol=1e-5, rtol=0)
    assert torch.allclose(maps.rollout_NP, rollout([layer[0] for layer in tower]), atol=1e-5, rtol=0)
    assert float(expected_TLHN.std()) > 0.01


@pytest.mark.parametrize("version", [1, 2])
def test_a_published_model_is_loaded_without_a_lakesight_config(version: int, tmp_path: Path) -> None:
    folder, rows = tmp_path / "published", Rows()
    backend = byte_fallback()
    vocab_size = backend.get_vocab_size()
    publish(original_of(version, vocab_size, vocab_size), folder)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text("{}")
    pictures = {"image_mean": [0.4] * 3, "resample": 2, "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    captioner = vlm.load(folder, device="cpu")
    config = captioner.model.config
    assert (config.image.mean, config.image.filter, config.image.size) == ((0.4, 0.4, 0.4), "bilinear", 16)
    same, _ = load(ours(version).model_copy(update={"image": config.image}), folder, "model", vocab_size)
    assert torch.equal(rows.ours(captioner.model), rows.ours(same))
    assert captioner.tokenizer.newline_after_empty_prompt


def test_a_published_model_with_an_unknown_setting_is_refused_and_the_error_names_the_setting(tmp_path: Path) -> None:
    backend = byte_fallback()
    publish(original_of(1, backend.get_vocab_size(), backend.get_vocab_size()), tmp_path)
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["text_config"]["hidden_act"] = settings["text_config"]["hidden_activation"] = "mish"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"mlp\..*activation"):
        vlm.load(tmp_path)
