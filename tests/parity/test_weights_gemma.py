"""Gemma 1 and 2 give the same logits as in transformers after import and export, even for texts longer than a
window.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_published_models import (
    DEPTH,
    HEADS,
    MLP,
    VOCAB,
    WIDTH,
    assert_equal,
    config,
    load,
    logits,
    publish,
    send_back,
    tokens,
)
from transformers import Gemma2Config, Gemma2ForCausalLM, GemmaConfig, GemmaForCausalLM

from vlm.config import ModelConfig
from vlm.errors import CheckpointError

SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "intermediate_size": MLP,
    "vocab_size": VOCAB,
}
WINDOW = 4


def decoder(version: int) -> dict[str, Any]:
    """Return our config of Gemma's decoder. In Gemma 2, the window is shorter than the texts, and soft caps are on."""
    attention: dict[str, Any] = {"num_heads": HEADS, "num_kv_heads": 1, "head_dim": 6}
    if version == 2:
        attention |= {"windows": [WINDOW, None], "soft_cap": 2.0, "scale": 1 / 3}
    return {
        "transformer": {
            "width": WIDTH,
            "depth": DEPTH,
            "attention": attention,
            "mlp": {"kind": "gated", "mlp_width": MLP, "activation": "gelu_tanh"},
            "norm": {"kind": "rms", "offset": True},
            "position": {"kind": "rotary"},
            "sandwich": version == 2,
        },
        "tie_embeddings": True,
        "scale_embeddings": True,
        "soft_cap": 3.0 if version == 2 else None,
    }


def ours(version: int) -> ModelConfig:
    return config(decoder=decoder(version))


def original_of(version: int, **changes: Any) -> Any:
    if version == 1:
        return GemmaForCausalLM(GemmaConfig(**SIZES, **changes))
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 9}
    return Gemma2ForCausalLM(
        Gemma2Config(**SIZES, **caps, sliding_window=WINDOW, attn_implementation="eager", **changes)
    )


@pytest.mark.parametrize("version", [1, 2])
def test_gemma_gives_the_original_logits_after_import_and_export(version: int, tmp_path: Path) -> None:
    original = publish(original_of(version), tmp_path / "published")
    model, _ = load(ours(version), tmp_path / "published", "decoder")
    ids, mask = tokens(12, 3, 7)
    theirs = original(input_ids=ids, attention_mask=mask).logits
    assert_equal(logits(model, ids), theirs, mask)
    exported = send_back(model, "decoder", "gemma2" if version == 2 else "gemma", tmp_path / "published")
    again = type(original).from_pretrained(exported, attn_implementation="eager")
    assert_equal(again(input_ids=ids, attention_mask=mask).logits, theirs, mask)


@pytest.mark.parametrize(("published", "expected"), [(2, 1), (1, 2)])
def test_the_import_error_for_another_gemma_version_names_the_versions_of_the_weights_and_of_the_model(
    published: int, expected: int, tmp_path: Path
) -> None:
    publish(original_of(published), tmp_path / "published")
    with pytest.raises(CheckpointError) as caught:
        load(ours(expected), tmp_path / "published", "decoder")
    name, other = ("gemma2", "gemma") if published == 2 else ("gemma", "gemma2")
    assert f"family {name}, but the decoder of the model has the architecture of {other}." in str(caught.value)
    assert "decoder.transformer.sandwich" in str(caught.value)


def test_import_error_lists_every_config_value_that_differs(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 500.0}
    publish(original_of(2, rope_parameters=rope, rms_norm_eps=1e-5), tmp_path / "published")
    settings = tmp_path / "published" / "config.json"
    text = settings.read_text().replace('"sliding_window": 4', '"sliding_window": 5')
    settings.write_text(text.replace('"final_logit_softcapping": 3.0', '"final_logit_softcapping": 4.0'))
    with pytest.raises(CheckpointError, match="has other sizes or settings") as caught:
        load(ours(2), tmp_path / "published", "decoder")
    for path in ("position.base", "norm.eps", "attention.windows", "decoder.soft_cap"):
        assert path in str(caught.value)


def test_import_refuses_gemma_weights_with_scaled_rotary_angles(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
    publish(original_of(1, rope_parameters=rope), tmp_path / "published")
    with pytest.raises(CheckpointError, match="linear"):
        load(ours(1), tmp_path / "published", "decoder")


def with_activation(settings: ModelConfig, activation: str) -> ModelConfig:
    values = settings.model_dump()
    values["decoder"]["transformer"]["mlp"]["activation"] = activation
    return ModelConfig.model_validate(values)


def set_keys(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_gemma_2_with_exact_gelu_gives_the_original_logits(tmp_path: Path) -> None:
    original = publish(original_of(2, hidden_activation="gelu"), tmp_path / "published")
    model, _ = load(with_activation(ours(2), "gelu"), tmp_path / "published", "decoder")
    ids, mask = tokens(12, 3, 7)
    assert_equal(logits(model, ids), original(input_ids=ids, attention_mask=mask).logits, mask)
    with pytest.raises(
        CheckpointError, match=r"mlp.activation: hidden_activation in config.json gives 'gelu', the model"
    ):
        load(ours(2), tmp_path / "published", "decoder")


def test_the_key_hidden_act_gelu_of_gemma_1_is_the_tanh_form_as_in_transformers(tmp_path: Path) -> None:
    publish(original_of(1), tmp_path / "published")
    set_keys(tmp_path / "published", hidden_act="gelu")
    original = GemmaForCausalLM.from_pretrained(tmp_path / "published")
    model, _ = load(ours(1), tmp_path / "published", "decoder")
    ids, mask = tokens(12, 3, 7)
    assert_equal(logits(model, ids), original(input_ids=ids, attention_mask=mask).logits, mask)


@pytest.mark.parametrize(("version", "key"), [(1, "hidden_activation"), (2, "hidden_act")])
def test_a_second_activation_key_with_another_function_is_refused_by_name(
    version: int, key: str, tmp_path: Path
) -> None:
    publish(original_of(version), tmp_path / "published")
    set_keys(tmp_path / "published", **{key: "gelu" if version == 1 else "silu"})
    with pytest.raises(CheckpointError, match=f"mlp.activation: {key} in config.json gives"):
        load(ours(version), tmp_path / "published", "decoder")
