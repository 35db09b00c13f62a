"""A published folder has the same generation settings, and gives the same answers, as in transformers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from published_tokenizers import byte_fallback
from test_weights_paligemma import original_of
from tiny_published_models import SIZE, publish
from transformers import GenerationConfig as TheirConfig
from transformers import PaliGemmaForConditionalGeneration

import vlm
from vlm.config import GenerationConfig
from vlm.errors import CheckpointError
from vlm.text.base import SLOT
from vlm.weights.generation_keys import ONLY_DEFAULT, read_generation

VALUES: dict[str, tuple[Any, ...]] = {
    "max_new_tokens": (3, 7),
    "num_beams": (1, 2, 4),
    "do_sample": (True, False),
    "temperature": (0.5, 1.0),
    "top_k": (5, 0, 50),
    "top_p": (0.5, 1.0),
    "min_p": (0.2,),
    "repetition_penalty": (1.3, 1.0),
    "length_penalty": (0.0, 2.0),
    "stop_strings": (["a"],),
    "no_repeat_ngram_size": (2, 0),
    "bad_words_ids": ([[5]],),
    "suppress_tokens": ([5], []),
    "begin_suppress_tokens": ([5],),
    "min_length": (3, 0),
    "min_new_tokens": (2,),
    "forced_bos_token_id": (5,),
    "forced_eos_token_id": (1,),
    "max_length": (30, 20),
    "num_return_sequences": (2, 1),
}
CASES = [
    (key, outer, inner)
    for key, values in VALUES.items()
    for outer, inner in itertools.product((*values, None, "missing"), (*values, None, "missing"))
]


def their_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings that transformers uses for a folder without generation_config.json, or None if transformers
    refuses the settings.
    """
    try:
        found = TheirConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
        found.update(**TheirConfig._get_default_generation_params(), defaults_only=True)
    except ValueError:
        return None
    settings: dict[str, Any] = found.to_dict()
    return settings


def as_ours(theirs: dict[str, Any] | None) -> GenerationConfig | None:
    """Translate settings of transformers to Lakesight's settings. Return None if there are no equivalent settings."""
    if theirs is None:
        return None
    neutral = {**{key: values[0] for key, values in ONLY_DEFAULT.items()}, "forced_bos_token_id": None}
    for key in (*neutral, "forced_eos_token_id"):
        if theirs.get(key) not in (None, neutral.get(key)) and not (key == "max_length" and theirs["max_new_tokens"]):
            return None
    beams = theirs["num_beams"] > 1
    if beams and theirs["do_sample"]:
        return None
    sampling = {key: theirs[key] for key in ("temperature", "top_k", "top_p", "min_p")} if theirs["do_sample"] else {}
    values = {
        "max_new_tokens": theirs["max_new_tokens"] or GenerationConfig().max_new_tokens,
        "num_beams": theirs["num_beams"],
        "repetition_penalty": theirs["repetition_penalty"],
        "length_penalty": theirs["length_penalty"] if beams else 1.0,
        "stop": tuple(theirs["stop_strings"] or ()),
        **{key: value for key, value in sampling.items() if value},
    }
    return GenerationConfig.model_validate(values)


@pytest.mark.parametrize("base", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_the_settings_in_config_json_and_text_config_are_the_settings_of_transformers_or_are_refused(
    base: dict[str, Any], tmp_path: Path
) -> None:
    outcomes = {True: 0, False: 0}
    for key, outer, inner in CASES:
        sections = [{key: value} if value != "missing" else {} for value in (outer, inner)]
        config = {"model_type": "paligemma", **base, **sections[0], "text_config": sections[1]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        expected = as_ours(their_settings(tmp_path))
        outcomes[expected is None] += 1
        if expected is None:
            with pytest.raises(CheckpointError, match=r"in (text_config in )?config\.json is"):
                read_generation(tmp_path)
        else:
            assert read_generation(tmp_path) == expected, config
    assert min(outcomes.values()) > 20


@pytest.mark.parametrize("settings", [{"num_beams": 2000}, {"repetition_penalty": 1e-200}], ids=str)
def test_a_setting_outside_our_range_is_refused_with_the_name_of_the_setting(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=next(iter(settings))):
        read_generation(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 3, "length_penalty": 0.5}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}],
    ids=str,
)
@pytest.mark.parametrize("section", ["", "text_config"])
def test_a_loaded_folder_generates_the_same_tokens_as_in_transformers_without_any_arguments(
    settings: dict[str, Any], section: str, tmp_path: Path
) -> None:
    backend = byte_fallback()
    image_id = backend.token_to_id("<image>")
    publish(original_of(1, backend.get_vocab_size(), image_id), tmp_path)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    config["text_config"] |= ids
    target = config[section] if section else config
    target |= {"max_new_tokens": 8, **settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if "no_repeat_ngram_size" in settings:
        with pytest.raises(CheckpointError, match="no_repeat_ngram_size in "):
            vlm.load(tmp_path, device="cpu")
        return
    captioner = vlm.load(tmp_path, device="cpu")
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    changed = []
    for pixels in torch.randint(
        0, 256, (6, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    ):
        request = captioner.request([pixels.numpy()], "cat")
        prompt = torch.tensor([[image_id if token == SLOT else token for token in request.prefix]])
        answer = theirs.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            token_type_ids=torch.zeros_like(prompt),
            pixel_values=(pixels.permute(2, 0, 1)[None] / 255 - 0.5) / 0.5,
        )[0, prompt.shape[1] :].tolist()
        tokens = answer[: answer.index(1)] if 1 in answer else answer
        caption = captioner.caption([pixels.numpy()], "cat")[0].caption
        assert caption == captioner.tokenizer.decode(tokens)
        plain = captioner.caption([pixels.numpy()], "cat", num_beams=1, repetition_penalty=1.0)[0].caption
        changed.append(plain != caption)
    assert any(changed)
