"""Tests that an import compares, deliberately ignores or refuses each key of a published config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from published_folders import MODELS, family_of
from published_tokenizers import published
from tiny_published_models import blocks, config

from vlm import text
from vlm.config import ModelConfig
from vlm.errors import CheckpointError
from vlm.weights.accounting import leaf_values
from vlm.weights.family import NOT_COMPARED, Family
from vlm.weights.special_tokens import check_special_tokens
from vlm.weights.tables import families

DETERMINED_BY_TENSORS = {
    "vision_use_head", "num_patches", "image_size", "depth", "patch_size", "class_token", "reg_tokens", "pre_norm",
    "img_size", "mlp_ratio", "init_values", "no_embed_class", "final_norm", "fc_norm", "global_pool", "num_classes",
    "num_features", "qkv_bias", "proj_bias", "input_size", "crop_pct",
}  # fmt: skip
"""Keys that an import does not compare with our config.

For some keys, a different value changes the names or shapes of the tensors, which the import compares. For the other
keys, the value may differ from our config.
"""
IMPLIED = {"architecture": "vit_base_patch16_clip_224"}
"""A second valid value for each key whose value is a name."""


def family_of_architecture(name: str) -> Family:
    (family,) = (each for each in families() if each.select_settings({"architecture": name}) is not None)
    return family


def changed(settings: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(settings))
    *sections, key = path.split(".")
    place = copy
    for section in sections:
        place = place[section]
    place[key] = value
    return copy


def another(path: str, value: Any) -> Any:
    if path in IMPLIED:
        return IMPLIED[path]
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, list):
        return [another(path, value[0]), *value[1:]]
    return value + 1 if isinstance(value, int | float) else f"other_{value}"


def names_key(sentences: list[str], path: str) -> bool:
    return any(path.rpartition(".")[2] in sentence for sentence in sentences)


@pytest.mark.parametrize("name", MODELS)
def test_a_changed_key_in_a_published_config_is_named_in_an_error_unless_it_does_not_affect_the_model(
    name: str,
) -> None:
    family, model = family_of(name), MODELS[name]
    settings = json.loads(json.dumps(family.to_settings(model)))
    assert family.mismatches(model, settings) == []
    account = family.account(settings)
    without_effect = {path for paths in account.without_effect.values() for path in paths}
    assert account.unknown == {}
    assert set(account.compared) | without_effect == {path for path, _ in leaf_values(settings)}
    for path, value in leaf_values(settings):
        key = path.rpartition(".")[2]
        if path in without_effect or key in DETERMINED_BY_TENSORS or path.endswith("model_type"):
            continue
        sentences = family.mismatches(model, changed(settings, path, another(path, value)))
        assert names_key(sentences, path), (path, sentences)


@pytest.mark.parametrize("name", MODELS)
def test_an_unknown_key_in_any_section_is_refused_and_the_error_names_the_key(name: str) -> None:
    family, model = family_of(name), MODELS[name]
    settings = json.loads(json.dumps(family.to_settings(model)))
    sections = [key for key, value in settings.items() if isinstance(value, dict) and key != "pretrained_cfg"]
    for key, value in (("new_option", True), ("new_option", {"kind": "x"}), ("quantization_config", {"bits": 4})):
        for section in ("", *(f"{section}." for section in sections)):
            sentences = family.mismatches(model, changed(settings, section + key, value))
            assert any(f"{section}{key}" in sentence for sentence in sentences), (section, sentences)
    assert family.mismatches(model, {**settings, "new_option": None}) == []


DEAD = {"n_special": 0, "predict_special_tokens": True, "output_past": True, "tf_legacy_loss": False}
"""Keys of published files that transformers no longer reads, or reads only with TensorFlow."""


@pytest.mark.parametrize("name", MODELS)
def test_keys_of_old_published_files_that_no_library_reads_do_not_prevent_an_import(name: str) -> None:
    family, model = family_of(name), MODELS[name]
    settings = json.loads(json.dumps(family.to_settings(model)))
    nested = {key: {**value, **DEAD} for key, value in settings.items() if key.endswith("_config")}
    assert family.mismatches(model, settings | nested | DEAD) == []


def whole_clip() -> dict[str, Any]:
    """Return the settings of CLIP's vision encoder as a section of the config.json of a whole CLIP model."""
    vision = json.loads(json.dumps(family_of("clip").to_settings(MODELS["clip"])))
    return {"model_type": "clip", "vision_config": vision, "text_config": {}}


def test_a_section_vision_config_dict_that_repeats_vision_config_does_not_prevent_an_import() -> None:
    family, model, settings = family_of("clip"), MODELS["clip"], whole_clip()
    given = {key: settings["vision_config"][key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    given |= {key: settings["vision_config"][key] for key in ("num_attention_heads", "patch_size", "image_size")}
    copied = settings | {"vision_config_dict": given, "text_config_dict": {"hidden_size": 5}}
    assert family.mismatches(model, copied) == []
    assert {f"vision_config_dict.{key}" for key in given} <= set(family.account(copied).compared)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 99}, "vision_config_dict makes transformers use 99"),
        ({"hidden_act": "gelu"}, "vision_config_dict makes transformers use 'gelu'"),
        ({"hidden_size": None}, "vision_config_dict makes transformers use None"),
        ({"new_option": 1}, "vision_config_dict.new_option in config.json is 1"),
    ],
)
def test_a_section_vision_config_dict_that_differs_from_vision_config_is_refused_by_key(
    change: dict[str, Any], message: str
) -> None:
    family, model, settings = family_of("clip"), MODELS["clip"], whole_clip()
    sentences = family.mismatches(model, settings | {"vision_config_dict": settings["vision_config"] | change})
    assert [sentence for sentence in sentences if message in sentence], sentences


def test_a_key_that_vision_config_dict_lacks_has_the_default_value_of_transformers() -> None:
    family, model, settings = family_of("clip"), MODELS["clip"], whole_clip()
    settings["vision_config"]["layer_norm_eps"] = 1e-3
    copy = {key: value for key, value in settings["vision_config"].items() if key != "layer_norm_eps"}
    sentences = family.mismatches(model, settings | {"vision_config_dict": copy})
    assert any("layer_norm_eps" in sentence and "makes transformers use 1e-05" in sentence for sentence in sentences)


TEXT, VISION = "text_config.", "vision_config."
REFUSED: list[tuple[str, str, Any]] = [
    ("gemma", "use_bidirectional_attention", True),
    ("gemma2", "use_bidirectional_attention", True),
    ("paligemma", f"{TEXT}use_bidirectional_attention", False),
    ("gemma", "sliding_window", 5),
    ("gemma", "query_pre_attn_scalar", 9),
    ("gemma", "rope_scaling", {"type": "linear", "factor": 2.0}),
    ("gemma2", "rope_theta", 5000.0),
    ("gemma", "attention_bias", True),
    ("gemma", "hidden_activation", "relu"),
    ("gemma2", "hidden_act", "silu"),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "is_decoder", True),
    ("gpt2", "auto_map", {"AutoModel": "code.py"}),
    ("vit", "image_size", [16, 24]),
    ("vit", "image_size", 18),
    ("vit", "patch_size", [4, 8]),
    ("vit", "num_channels", 1),
    ("clip", "image_size", [16, 24]),
    ("clip", "pruned_heads", {"0": [1]}),
    ("siglip", "image_size", 18),
    ("siglip2", "num_patches", 24),
    ("paligemma", f"{VISION}image_size", 18),
    ("paligemma", "tie_word_embeddings", False),
    ("timm", "model_args.img_size", [16, 24]),
    ("timm", "model_args.img_size", 18),
    ("timm", "model_args.qk_norm", True),
    ("timm", "model_args.block_fn", "ResPostBlock"),
    ("timm", "pretrained_cfg.input_size", [3, 16, 24]),
    ("timm", "pretrained_cfg.mean", [0.1, 0.2, 0.3]),
    ("timm", "pretrained_cfg.interpolation", "bilinear"),
    ("timm", "pretrained_cfg.crop_mode", "center"),
    ("timm", "pretrained_cfg.crop_mode", "border"),
]


@pytest.mark.parametrize(("name", "path", "value"), REFUSED)
def test_a_setting_that_our_model_does_not_have_is_refused_and_the_error_names_the_setting(
    name: str, path: str, value: Any
) -> None:
    family, model = family_of(name), MODELS[name]
    settings = json.loads(json.dumps(family.to_settings(model)))
    sentences = family.mismatches(model, changed(settings, path, value))
    assert names_key(sentences, path), sentences


HARMLESS: list[tuple[str, str, Any]] = [
    ("gpt2", "initializer_range", 0.5),
    ("gpt2", "torch_dtype", "bfloat16"),
    ("gpt2", "attn_pdrop", 0.3),
    ("vit", "image_size", [32, 32]),
    ("vit", "id2label", {"0": "cat", "1": "dog"}),
    ("siglip", "dtype", "float16"),
    ("gemma", "use_bidirectional_attention", None),
    ("gemma", "rope_scaling", None),
    ("gemma", "rope_theta", 10000),
    ("paligemma", f"{TEXT}num_image_tokens", 16),
    ("paligemma2", "hidden_size", 2048),
    ("timm", "pretrained_cfg.crop_pct", 0.9),
    ("timm", "model_args.drop_path_rate", 0.1),
]


@pytest.mark.parametrize(("name", "path", "value"), HARMLESS)
def test_a_published_config_key_without_any_effect_is_accepted_with_any_value(name: str, path: str, value: Any) -> None:
    family, model = family_of(name), MODELS[name]
    settings = json.loads(json.dumps(family.to_settings(model)))
    assert family.mismatches(model, changed(settings, path, value)) == []


def test_the_report_of_a_timm_import_lists_a_key_as_compared_only_if_its_value_was_compared() -> None:
    family, model = family_of("timm"), MODELS["timm"]
    settings = json.loads(json.dumps(family.to_settings(model)))
    account = family.account(settings)
    pictures = {f"pretrained_cfg.{key}" for key in ("mean", "std", "input_size", "interpolation", "crop_mode")}
    assert {*account.compared} >= {*pictures, "model_args.num_heads"}
    assert {*account.without_effect[NOT_COMPARED]} >= {"model_args.qkv_bias", "model_args.depth"}
    assert family.unchecked(settings) == []
    cropped = changed(settings, "pretrained_cfg.crop_pct", 0.9)
    assert "pretrained_cfg.crop_mode" not in family.account(cropped).compared
    assert family.unchecked(cropped) == [
        "image.resize (pretrained_cfg.crop_mode is compared only if crop_pct is 1)",
        "image.crop_start",
    ]


# ------------------------------------------------------------------------------------------------ start and end tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder in which all files have the same start and end tokens as the tokenizer."""
    write(tmp_path, "config.json", {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0})
    write(tmp_path, "generation_config.json", {"bos_token_id": 2, "eos_token_id": [1]})
    write(tmp_path, "tokenizer_config.json", {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>"})
    return tmp_path


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def edit(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: write(folder, name, {**json.loads((folder / name).read_text()), **values})


def tokenizer(folder: Path) -> text.Tokenizer:
    return text.learn(published(folder, "byte_fallback"), ())


def test_files_that_agree_on_the_start_and_end_tokens_are_accepted(folder: Path) -> None:
    found = check_special_tokens(folder, tokenizer(folder))
    assert "generation_config.json: eos_token_id" in found
    assert "tokenizer_config.json: bos_token" in found
    assert len(found) == 6


def disagreements() -> Iterator[tuple[str, Callable[[Path], None]]]:
    yield "eos_token_id in config.json is 5", edit("config.json", eos_token_id=5)
    yield "eos_token_id in config.json is [1, 5]", edit("config.json", eos_token_id=[1, 5])
    yield "eos_token_id in generation_config.json is [1, 107]", edit("generation_config.json", eos_token_id=[1, 107])
    yield "bos_token_id in generation_config.json is 0", edit("generation_config.json", bos_token_id=0)
    yield "eos_token in tokenizer_config.json is 2", edit("tokenizer_config.json", eos_token="<bos>")
    yield "eos_token_id of text_config in config.json is 9", edit("config.json", text_config={"eos_token_id": 9})


@pytest.mark.parametrize(("sentence", "change"), disagreements())
def test_a_file_that_disagrees_on_a_start_or_end_token_is_refused(
    sentence: str, change: Callable[[Path], None], folder: Path
) -> None:
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        check_special_tokens(folder, tokenizer(folder))
    assert sentence in caught.value.got


IMPORTED_ONLY = {"timm_eva": "vit_small_patch16_dinov3", "timm_rope": "vit_small_patch16_rope_224"}


@pytest.mark.parametrize("name", IMPORTED_ONLY)
def test_importing_a_family_that_cannot_be_exported_compares_positions_and_refuses_unknown_config_keys(
    name: str,
) -> None:
    family, settings = family_of(name), {"architecture": IMPORTED_ONLY[name], "num_features": 16}
    position = {"kind": "axial", "coordinates": "centred" if name == "timm_eva" else "index"}
    first = {"first": "row" if name == "timm_eva" else "column"}
    eps = 1e-5 if name == "timm_eva" else 1e-6

    def mismatches(arguments: dict[str, Any], **changes: Any) -> list[str]:
        model = config(vision={"transformer": blocks(eps=eps, position={**position, **first, **changes})})
        return family.mismatches(model, {**settings, "model_args": {"num_heads": 2, **arguments}})

    assert mismatches({}) == []
    for change in ({"base": 50.0}, {"offset": 1.0}, {"grid": 4}, {"learned": True}):
        (sentence,) = mismatches({}, **change)
        assert f"position.{next(iter(change))}" in sentence
    for arguments in ({"new_option": True}, {"qk_norm": True}, {"num_heads": 4}):
        assert any(next(iter(arguments)) in sentence for sentence in mismatches(arguments))


RELATIVE = {"position": {"kind": "relative", "mlp_width": 8}}
MIXED_LEARNED = {"position": {"kind": "mixed", "learned": True}}
AFTER = {"sandwich": True, "input_norms": False}
XP = {"parallel": True, "norm": {"kind": "rms", "eps": 1e-6}}
OTHER_BLOCKS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("vit_small_patch16_rope_mixed_224", {"position": {"kind": "mixed"}}, {"position": {"kind": "axial"}}, "kind"),
    ("vit_small_patch16_rope_mixed_ape_224", MIXED_LEARNED, {"position": {"kind": "mixed"}}, "position.learned"),
    ("vit_relpos_small_patch16_224", RELATIVE, {"position": {"kind": "learned"}}, "position.kind"),
    ("vit_srelpos_small_patch16_224", {"position": {"kind": "relative", "shared": True}}, RELATIVE, "shared"),
    ("vit_relpos_small_patch16_rpn_224", {**RELATIVE, **AFTER}, {"input_norms": True}, "input_norms"),
    ("vit_base_patch16_rpn_224", AFTER, RELATIVE, "position.kind"),
    ("vit_base_patch16_224", {}, AFTER, "input_norms"),
    ("vit_pwee_patch16_reg1_gap_256", {"parallel": True}, {"parallel": False}, "parallel"),
    ("vit_base_patch16_xp_224", XP, {"norm": {"kind": "layer", "eps": 1e-6}}, "norm.kind"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "own", "change", "named"), OTHER_BLOCKS)
def test_a_timm_architecture_is_refused_for_a_model_with_other_blocks_or_positions_and_the_difference_is_named(
    name: str, own: dict[str, Any], change: dict[str, Any], named: str
) -> None:
    settings = {"architecture": name, "num_features": 16, "model_args": {"num_heads": 2}}
    family = family_of_architecture(name)
    transformer = {**blocks(eps=1e-6), **own}
    transformer["attention"] = {**transformer["attention"], "qk_norm": "_xp_" in name}
    assert family.mismatches(config(vision={"transformer": transformer}), settings) == []
    other = config(vision={"transformer": {**transformer, **change}})
    assert any(named in sentence for sentence in family.mismatches(other, settings))
    unknown = {**settings, "model_args": {"num_heads": 2, "new_option": True}}
    assert any("new_option" in sentence for sentence in family.mismatches(other, unknown))


def test_an_architecture_with_two_branches_needs_twice_as_many_heads_in_the_model() -> None:
    settings = {"architecture": "vit_small_patch16_18x2_224", "num_features": 16, "model_args": {"num_heads": 1}}
    model = config(vision={"transformer": blocks(eps=1e-6)})
    assert family_of("timm_branches").mismatches(model, settings) == []
    sentences = family_of("timm_branches").mismatches(model, {**settings, "model_args": {"num_heads": 2}})
    assert names_key(sentences, "num_heads")


def test_this_file_tests_models_of_all_weight_families() -> None:
    imported_only = {*IMPORTED_ONLY, "timm_branches", *(family_of_architecture(row[0]).name for row in OTHER_BLOCKS)}
    assert {*MODELS} | imported_only == {family.name for family in families()}
    assert {family.name for family in families() if not family.exportable} == imported_only - {*MODELS}
    assert all(isinstance(model, ModelConfig) for model in MODELS.values())
