"""Tests that a wrong value in any JSON file of a published folder is an error that names the file and the key."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from published_folders import MODELS, Loader, family_of, loaders, publish_folder, weights_of
from safetensors.torch import load_file, save_file

from vlm.config import ModelConfig
from vlm.errors import CheckpointError, LakesightError
from vlm.model import VisionLanguageModel
from vlm.weights.accounting import TrackedSettings
from vlm.weights.key_rules import CONFIG_RULES
from vlm.weights.load import find_family, import_weights
from vlm.weights.published_model import derive_config

WRONG: list[Any] = [
    None, "x", "", -1, 0, True, False, [], [[1, 2], [3]], {}, {"a": 1}, 2.5, 16.0, 3, 64, 10**30, -(10**30), 10**400,
    float("nan"), float("inf"),
]  # fmt: skip
FOLLOWED = {
    "rms_norm_eps", "layer_norm_eps", "rope_theta", "max_position_embeddings", "sliding_window", "layer_types",
    "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "do_sample", "max_new_tokens",
    "repetition_penalty", "stop_strings", "temperature", "top_k", "top_p", "do_normalize", "do_rescale", "image_mean",
    "image_std", "rescale_factor", "pad_token",
}  # fmt: skip
"""Keys that `vlm.load` copies to the config of the model, so that another valid value changes this config."""
Place = tuple[str | int, ...]
"""Keys and list indices on the way to a value of a JSON file."""


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Yield the place of each value and section of a JSON file; of a long list, yield only the first two entries."""
    yield place
    inside = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, part in inside:
        yield from places(part, (*place, key))


def replaced(content: Any, place: Place, value: Any) -> Any:
    if not place:
        return value
    copy = content.copy()
    copy[place[0]] = replaced(copy[place[0]], place[1:], value)
    return copy


def changes(folder: Path) -> Iterator[tuple[Path, Any, Place, Any]]:
    """Yield each JSON file of a folder, its content, and a place in the file with a wrong value for this place."""
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text())
        for place in places(content):
            # The vocabulary of a tokenizer has hundreds of keys, and the library `tokenizers` checks them.
            if file.name == "tokenizer.json" and (len(place) > 2 or place[:2] == ("model", "vocab")):
                continue
            for value in WRONG:
                yield file, content, place, value


def is_named(message: str, file: Path, content: Any, place: Place) -> bool:
    """Return True if an error message names the file and the key of a value.

    For a tokenizer.json, the outermost key is enough. If a section is replaced, a key in the section is enough, because
    all these keys are missing.
    """
    keys = [key for key in place if isinstance(key, str)]
    if file.name == "tokenizer.json":
        return file.name in message and (not keys or keys[0] in message)
    for part in place:
        content = content[part]
    named = [*keys[-1:], *(content if isinstance(content, dict) else ())]
    return file.name in message and (not place or any(key in message for key in named))


def check_family(name: str, root: Path, *, one_in: int) -> None:
    """Load a folder with each wrong value in turn, and check that the value is refused or does not change the model.

    Args:
        name: name of the weight family.
        root: empty folder.
        one_in: about one in `one_in` changes is tried. With 1, all changes are tried.
    """
    family = family_of(name)
    folder, config = publish_folder(root, name)
    for load in loaders(folder, family.part, config):
        expected = load()
        for file, content, place, value in changes(folder):
            label = f"{load.__name__} {file.name} {place} {value!r:.30}"
            if zlib.crc32(label.encode()) % one_in:
                continue
            before = file.read_text()
            file.write_text(json.dumps(replaced(content, place, value)))
            outcome = result_of(load)
            if isinstance(outcome, LakesightError):
                assert all((outcome.what, outcome.where, outcome.got, outcome.fix)), label
                assert is_named(str(outcome), file, content, place), (label, str(outcome))
            else:
                ours, theirs = weights_of(outcome), weights_of(expected)
                assert ours.keys() == theirs.keys(), label
                assert all(torch.equal(ours[each], theirs[each]) for each in ours), label
                followed = not place or FOLLOWED.intersection(place)
                assert followed or outcome.config == expected.config, label
            file.write_text(before)


def result_of(load: Loader) -> VisionLanguageModel | LakesightError:
    """Return the loaded model, or the error. Any other exception fails the test."""
    try:
        return load()
    except LakesightError as error:
        return error


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_value_in_a_published_file_is_refused_by_name_or_does_not_change_the_model(
    name: str, tmp_path: Path
) -> None:
    check_family(name, tmp_path, one_in=40)


@pytest.mark.matrix
@pytest.mark.parametrize("name", MODELS)
def test_each_wrong_value_in_a_published_file_is_refused_by_name_or_does_not_change_the_model(
    name: str, tmp_path: Path
) -> None:
    check_family(name, tmp_path, one_in=1)


@pytest.mark.parametrize("name", MODELS)
def test_each_key_of_config_json_that_an_import_reads_has_a_rule_for_its_values(name: str) -> None:
    family = family_of(name)
    settings = json.loads(json.dumps(family.to_settings(MODELS[name])))
    keys = {part for path in family.account(settings).compared for part in path.split(".")}
    assert keys <= {*CONFIG_RULES}
    assert family.wrong_values(settings) == []


TIMM = (
    "vit_small_patch16_dinov3", "vit_small_patch16_rope_224", "vit_relpos_small_patch16_224",
    "vit_base_patch16_xp_224", "vit_small_patch16_18x2_224",
)  # fmt: skip
"""An architecture of each timm family that Lakesight imports but does not export."""


@pytest.mark.parametrize("architecture", TIMM)
def test_a_wrong_value_in_the_config_of_a_timm_architecture_is_refused_by_name_or_compared(
    architecture: str, tmp_path: Path
) -> None:
    arguments = {
        "num_heads": 2,
        "embed_dim": 16,
        "img_size": 16,
        "patch_size": 4,
        "act_layer": "gelu",
        "qk_norm": False,
    }
    pictures = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3}
    settings = {"architecture": architecture, "num_features": 16, "model_args": arguments, "pretrained_cfg": pictures}
    assert find_family(settings, tmp_path, "encoder").wrong_values(settings) == []
    refused = 0
    for place in places(settings):
        for value in WRONG if place else ():
            changed = replaced(settings, place, value)
            try:
                find_family(changed, tmp_path, "encoder").mismatches(MODELS["timm"], changed)
            except CheckpointError as error:
                refused += 1
                named = is_named(str(error), Path("config.json"), settings, place)
                assert named, (place, value, str(error))  # noqa: PT017 most of the values raise no error
    assert refused > 100


def test_a_value_that_is_read_but_not_allowed_raises_an_error_with_the_path_of_the_key() -> None:
    settings = TrackedSettings({"vision_config": {"hidden_size": "16"}}, set(), rules=CONFIG_RULES)
    with pytest.raises(ValueError, match=r"vision_config\.hidden_size in config\.json is '16'.*needs an integer"):
        settings["vision_config"]["hidden_size"]
    assert TrackedSettings({"hidden_size": "16"}, set())["hidden_size"] == "16"


# ------------------------------------------------------------------------------------------------ config and tensors

SIZES = {
    "clip": ("hidden_size", "num_hidden_layers", "intermediate_size", "patch_size", "image_size"),
    "gemma": (
        "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size",
    ),
    "gpt2": ("n_embd", "n_layer", "n_positions", "n_inner", "vocab_size"),
    "siglip": ("hidden_size", "num_hidden_layers", "intermediate_size", "patch_size", "image_size"),
    "siglip2": ("hidden_size", "num_hidden_layers", "intermediate_size", "num_patches"),
    "vit": ("hidden_size", "num_hidden_layers", "intermediate_size", "patch_size", "image_size"),
}  # fmt: skip
"""Sizes in config.json that the tensors also determine, for each family."""
SIZES["gemma2"] = SIZES["gemma"]
for whole, text in (("paligemma", "gemma"), ("paligemma2", "gemma2")):
    SIZES[whole] = (
        "projection_dim",
        *(f"vision_config.{key}" for key in SIZES["siglip"]),
        *(f"text_config.{key}" for key in SIZES[text]),
    )


def shapes_of(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    tensors = load_file(folder / "model.safetensors")
    return {ours: tuple(tensors[theirs].shape) for ours, theirs in family_of(name).canonical_names(tensors).items()}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_in_config_json_that_contradicts_the_tensors_is_named_with_both_values(
    name: str, tmp_path: Path
) -> None:
    family = family_of(name)
    folder, _ = publish_folder(tmp_path, name)
    settings, shapes = json.loads((folder / "config.json").read_text()), shapes_of(folder, name)
    assert family.contradictions(settings, shapes) == []
    for path in SIZES[name]:
        *section, key = path.split(".")
        place = tuple(path.split("."))
        before = settings[section[0]][key] if section else settings[key]
        changed = replaced(settings, place, 4 * before)
        sentences = family.contradictions(changed, shapes)
        assert any(key in sentence and "so the value must be" in sentence for sentence in sentences), (path, sentences)
        if "_size / " not in sentences[0] and " * " not in sentences[0]:
            assert f"is {4 * before}, but" in sentences[0]
            assert f"must be {before}" in sentences[0]


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "image_size"])
def test_a_huge_size_in_config_json_is_refused_before_a_model_is_built(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = publish_folder(tmp_path, "paligemma")
    settings = json.loads((folder / "config.json").read_text())
    section = "vision_config" if key == "image_size" else "text_config"
    (folder / "config.json").write_text(json.dumps(replaced(settings, (section, key), 2**30)))
    monkeypatch.setattr(ModelConfig, "model_validate", lambda *_: pytest.fail("a config was built from a wrong size"))
    with pytest.raises(CheckpointError, match=rf"{key}.* of {section} in config\.json is \d+, but"):
        derive_config(folder)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=key):
        import_weights(config, 291, {"model": folder})


def test_a_config_and_a_model_that_agree_but_contradict_the_tensors_are_refused_with_the_key(tmp_path: Path) -> None:
    folder, config = publish_folder(tmp_path, "vit")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if ".layer.2." not in name}, folder / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"num_hidden_layers in config\.json is 3, but .* 2 tensors"):
        import_weights(config, 291, {"encoder": folder})


@pytest.mark.parametrize("weight_map", [None, 5, [], {}, {"a": 5}, {"a": ["b"]}, {"a": None}])
def test_a_shard_index_with_a_wrong_weight_map_is_refused_and_the_error_names_the_key(
    weight_map: object, tmp_path: Path
) -> None:
    folder, config = publish_folder(tmp_path, "vit")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json.*weight_map"):
        import_weights(config, 291, {"encoder": folder})


def test_an_error_for_a_derived_value_names_the_key_of_the_published_file(tmp_path: Path) -> None:
    folder, _ = publish_folder(tmp_path, "paligemma")
    settings = json.loads((folder / "config.json").read_text())
    for section, key, value in (
        ("vision_config", "num_attention_heads", 3),
        ("text_config", "max_position_embeddings", 12),
        ("text_config", "hidden_act", "mish"),
    ):
        (folder / "config.json").write_text(json.dumps(replaced(settings, (section, key), value)))
        with pytest.raises(CheckpointError, match=rf"{section}\..*{key} in config\.json"):
            derive_config(folder)
