"""GPT-2 gives the same logits as in transformers, after import and after export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_published_models import (
    DEPTH,
    HEADS,
    MLP,
    VOCAB,
    WIDTH,
    assert_equal,
    blocks,
    config,
    load,
    logits,
    publish,
    send_back,
    tokens,
)
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from vlm.errors import CheckpointError

OURS = config(decoder={"transformer": blocks(activation="gelu_tanh"), "tie_embeddings": True})
SIZES = {
    "n_embd": WIDTH,
    "n_layer": DEPTH,
    "n_head": HEADS,
    "n_inner": MLP,
    "n_positions": 48,
    "vocab_size": VOCAB,
}


def gpt2(**changes: Any) -> GPT2Config:
    return GPT2Config(**SIZES, bos_token_id=1, eos_token_id=2, **changes)


def test_gpt2_gives_the_original_logits_after_import_and_export(tmp_path: Path) -> None:
    original = publish(GPT2LMHeadModel(gpt2()), tmp_path / "published")
    model, _ = load(OURS, tmp_path / "published", "decoder")
    ids, mask = tokens(12, 5, 1)
    theirs = original(input_ids=ids, attention_mask=mask).logits
    assert_equal(logits(model, ids), theirs, mask)
    exported = send_back(model, "decoder", "gpt2", tmp_path / "published")
    again = GPT2LMHeadModel.from_pretrained(exported)
    assert_equal(again(input_ids=ids, attention_mask=mask).logits, theirs, mask)


def test_import_and_export_of_gpt2_keep_an_untied_output_head(tmp_path: Path) -> None:
    original = publish(GPT2LMHeadModel(gpt2(tie_word_embeddings=False)), tmp_path / "published")
    untied = OURS.model_copy(update={"decoder": OURS.decoder.model_copy(update={"tie_embeddings": False})})
    model, _ = load(untied, tmp_path / "published", "decoder")
    ids, mask = tokens(7)
    theirs = original(input_ids=ids).logits
    assert_equal(logits(model, ids), theirs, mask)
    exported = send_back(model, "decoder", "gpt2", tmp_path / "published")
    assert_equal(GPT2LMHeadModel.from_pretrained(exported)(input_ids=ids).logits, theirs, mask)


def test_import_reads_the_first_published_format_of_gpt2(tmp_path: Path) -> None:
    """In the first format of GPT-2, tensor names have no prefix, and the file contains the causal masks."""
    original = publish(GPT2Model(gpt2()), tmp_path / "published")
    file = tmp_path / "published" / "model.safetensors"
    tensors = load_file(file)
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 48, 48) for layer in range(DEPTH)}
    masks |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(DEPTH)}
    save_file(tensors | masks, file)
    model, report = load(OURS, tmp_path / "published", "decoder")
    ids, mask = tokens(9, 4)
    hidden = model.decoder(model.decoder.embed(ids), mask=None)
    assert_equal(hidden, original(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
    assert sorted(report.parts[0].dropped.values()) == [
        ("transformer.h.{0..2}.attn.bias",),
        ("transformer.h.{0..2}.attn.masked_bias",),
    ]


@pytest.mark.parametrize("same", [True, False])
def test_import_with_tied_embeddings_accepts_only_an_output_head_that_equals_the_embeddings(
    same: bool, tmp_path: Path
) -> None:
    publish(GPT2LMHeadModel(gpt2()), tmp_path / "published")
    file = tmp_path / "published" / "model.safetensors"
    tensors = load_file(file)
    head = tensors["transformer.wte.weight"].clone()
    head[0, 0] += 0 if same else 1
    save_file(tensors | {"lm_head.weight": head}, file)
    if same:
        assert load(OURS, tmp_path / "published", "decoder")[1].parts[0].tied == ("lm_head.weight",)
        return
    with pytest.raises(CheckpointError, match="separate output head"):
        load(OURS, tmp_path / "published", "decoder")
