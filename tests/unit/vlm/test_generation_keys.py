"""Tests that `vlm.load` applies each generation setting of a published folder, or names the setting in an error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig as TheirConfig

from vlm.config import GenerationConfig
from vlm.errors import CheckpointError
from vlm.weights.accounting import WITHOUT_EFFECT, leaf_values, reason_without_effect
from vlm.weights.generation_keys import CONFIG_KEYS, DEFAULTS, GENERATION, account_generation, read_generation


def read(folder: Path, **settings: Any) -> GenerationConfig:
    (folder / GENERATION).write_text(json.dumps(settings))
    return read_generation(folder)


def read_config(folder: Path, outer: dict[str, Any], text: dict[str, Any]) -> GenerationConfig:
    """Read the generation settings of a folder without generation_config.json."""
    (folder / "config.json").write_text(json.dumps({"model_type": "paligemma", **outer, "text_config": text}))
    return read_generation(folder)


SAMPLE = {"do_sample": True}
FOLLOWED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"max_new_tokens": 3, "max_length": 99}, {"max_new_tokens": 3}),
    ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    ({"num_beams": 4, "length_penalty": 2.0, "early_stopping": False}, {"num_beams": 4, "length_penalty": 2.0}),
    ({"length_penalty": 2.0, "early_stopping": True}, {}),
    (SAMPLE, {"temperature": 1.0, "top_k": 50}),
    ({**SAMPLE, "temperature": 0.7, "top_k": 0, "top_p": 0.8}, {"temperature": 0.7, "top_p": 0.8}),
    ({**SAMPLE, "top_k": 5, "min_p": 0.1}, {"temperature": 1.0, "top_k": 5, "min_p": 0.1}),
    ({"temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.1}, {}),
    ({"stop_strings": ["a", "b"]}, {"stop": ("a", "b")}),
    ({"stop_strings": "end"}, {"stop": ("end",)}),
    ({"suppress_tokens": [], "bad_words_ids": None, "min_new_tokens": 0, "guidance_scale": 1.0, "new": None}, {}),
    ({"use_cache": True, "cache_implementation": "hybrid", "transformers_version": "4", "pad_token_id": 0}, {}),
]


@pytest.mark.parametrize(("settings", "ours"), FOLLOWED)
def test_generation_settings_of_transformers_become_settings_of_lakesight(
    settings: dict[str, Any], ours: dict[str, Any], tmp_path: Path
) -> None:
    assert read(tmp_path, **settings) == GenerationConfig(**ours)


REFUSED: list[dict[str, Any]] = [
    {"suppress_tokens": [281]}, {"begin_suppress_tokens": [1]}, {"bad_words_ids": [[5]]}, {"forced_bos_token_id": 5},
    {"forced_eos_token_id": 1}, {"min_new_tokens": 5}, {"min_length": 5}, {"no_repeat_ngram_size": 2},
    {"max_length": 30}, {"max_time": 1.0}, {"num_return_sequences": 2}, {"renormalize_logits": True},
    {"sequence_bias": [[[5], 1.0]]}, {"guidance_scale": 2.0}, {"watermarking_config": {"bias": 2.0}},
    {"exponential_decay_length_penalty": [5, 1.1]}, {"encoder_repetition_penalty": 2.0}, {"penalty_alpha": 0.6},
    {"num_beam_groups": 2}, {"diversity_penalty": 1.0}, {"dola_layers": "low"}, {"force_words_ids": [[5]]},
    {"remove_invalid_values": True}, {"token_healing": True}, {"cache_implementation": "quantized"},
    {"unknown": 3}, {"max_new_tokens": 0}, {"num_beams": "2"}, {"repetition_penalty": 0}, {"stop_strings": [3]},
    {"stop_strings": ""}, {"do_sample": "yes"}, {"early_stopping": True, "num_beams": 2},
    {"length_penalty": "x", "num_beams": 2}, {"do_sample": True, "num_beams": 2},
    *({key: value, **SAMPLE} for key, value in (
        ("temperature", 0), ("top_k", -1), ("top_p", 0.0), ("min_p", 2), ("typical_p", 0.5), ("top_h", 0.5),
        ("epsilon_cutoff", 0.1), ("eta_cutoff", 0.1),
    )),
]  # fmt: skip


@pytest.mark.parametrize("settings", REFUSED)
def test_a_generation_setting_that_lakesight_does_not_have_is_refused_by_name(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=rf"{next(iter(settings))} in {re.escape(GENERATION)}"):
        read(tmp_path, **settings)


def test_every_key_of_transformers_is_known_and_its_default_is_accepted(tmp_path: Path) -> None:
    theirs = TheirConfig()
    values = {**theirs.to_dict(), **theirs._get_default_generation_params()}
    assert read(tmp_path, **values) == GenerationConfig()
    for key in values:
        with_value = {key: {"some": "object"}}
        (tmp_path / GENERATION).write_text(json.dumps(with_value))
        assert account_generation(tmp_path)[1] == [], f"{key} is not known"
    for key, value in DEFAULTS.items():
        assert theirs._get_default_generation_params().get(key, 0.0) == value


def test_an_import_reports_generation_settings_and_refuses_unknown_keys(tmp_path: Path) -> None:
    (tmp_path / GENERATION).write_text(json.dumps({"num_beams": 4, "suppress_tokens": [5], "eos_token_id": 1}))
    report, problems = account_generation(tmp_path)
    assert problems == []
    assert report is not None
    assert {key for keys in report.without_effect.values() for key in keys} == {
        "num_beams", "suppress_tokens", "eos_token_id"
    }  # fmt: skip
    (tmp_path / GENERATION).write_text(json.dumps({"unknown": 3}))
    _, (problem,) = account_generation(tmp_path)
    assert "unknown in generation_config.json" in problem


# ------------------------------------------------------------------------------------------------ config.json


@pytest.mark.parametrize(("settings", "ours"), FOLLOWED)
def test_without_a_generation_file_the_settings_in_config_json_are_followed(
    settings: dict[str, Any], ours: dict[str, Any], tmp_path: Path
) -> None:
    assert read_config(tmp_path, settings, {}) == GenerationConfig(**ours)
    assert read_config(tmp_path, {}, settings) == GenerationConfig(**ours)
    (tmp_path / GENERATION).write_text("{}")
    assert read_generation(tmp_path) == GenerationConfig()


@pytest.mark.parametrize("settings", [case for case in REFUSED if "unknown" not in case])
def test_a_setting_in_config_json_that_lakesight_does_not_have_is_refused_with_its_name_and_place(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    name = next(iter(settings))
    with pytest.raises(CheckpointError, match=rf"{name} in config\.json is"):
        read_config(tmp_path, settings, {})
    with pytest.raises(CheckpointError, match=rf"{name} in text_config in config\.json is"):
        read_config(tmp_path, {}, settings)


def test_a_setting_outside_text_config_has_precedence_and_null_means_not_set(tmp_path: Path) -> None:
    assert read_config(tmp_path, {"num_beams": 1}, {"num_beams": 4}).num_beams == 1
    assert read_config(tmp_path, {"num_beams": None}, {"num_beams": 4}).num_beams == 4
    assert read_config(tmp_path, {"do_sample": True}, {"temperature": 0.5, "top_k": 0}).temperature == 0.5
    with pytest.raises(CheckpointError, match=r"do_sample in text_config in config\.json"):
        read_config(tmp_path, {"num_beams": 4}, {"do_sample": True})
    assert read_config(tmp_path, {"hidden_size": 3, "min_p": 0.2}, {"vocab_size": 9}) == GenerationConfig()


def test_an_import_knows_each_generation_setting_in_config_json() -> None:
    theirs = TheirConfig()
    named = {*theirs.to_dict(), *theirs._get_default_generation_params()} - {"_from_model_config"}
    assert named <= CONFIG_KEYS
    values = {key: {"some": "object"} if key.endswith("_config") else 3 for key in named}
    paths = [path for path, _ in leaf_values({**values, "text_config": values})]
    tokens = ("bos_token_id", "eos_token_id")
    assert [
        path for path in paths if not path.endswith(tokens) and not reason_without_effect(path, WITHOUT_EFFECT)
    ] == []
