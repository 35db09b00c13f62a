"""Generation settings of a published folder, in generation_config.json or config.json.

As in transformers, config.json and its section `text_config` count only if the folder has no generation_config.json. A
key outside `text_config` has precedence over the same key in `text_config`.

`vlm.load` applies the generation settings. `import-weights` does not apply them, because the model config has its own
generation settings in the section `generation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlm.config import GenerationConfig, read_error_message
from vlm.errors import CheckpointError
from vlm.weights.files import CONFIG, read_other_settings
from vlm.weights.key_rules import FileReport, KeyRule, account_keys, number, only, without_null

GENERATION = "generation_config.json"
DEFAULTS: dict[str, Any] = {
    "do_sample": False, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0,
    "repetition_penalty": 1.0, "length_penalty": 1.0, "early_stopping": False,
}  # fmt: skip
"""Values that transformers uses for keys that are not set."""

RULES: dict[str, KeyRule] = {
    "max_new_tokens": number("an integer above 0", lambda value: value > 0, whole=True),
    "do_sample": only(True, False),
    "num_beams": number("an integer above 0", lambda value: value > 0, whole=True),
    "temperature": number("a number above 0", lambda value: value > 0),
    "top_k": number("an integer, 0 or more", lambda value: value >= 0, whole=True),
    "top_p": number("a number above 0 and at most 1", lambda value: 0 < value <= 1),
    "min_p": number("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "repetition_penalty": number("a number above 0", lambda value: value > 0),
    "length_penalty": number("a number", lambda _: True),
    "early_stopping": only(False),
    "stop_strings": KeyRule("a text or a list of texts", lambda value: bool(_texts(value)) and all(_texts(value))),
    "cache_implementation": KeyRule("a cache that is not quantized", lambda value: value != "quantized"),
}
"""Rules of the keys whose values `vlm.load` uses or checks."""
ONLY_DEFAULT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("bad_words_ids", "begin_suppress_tokens", "force_words_ids", "constraints"), ([],)),
    "suppress_tokens": ([],),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff", "penalty_alpha"), (0,)),
    **dict.fromkeys(("num_beam_groups", "num_return_sequences", "encoder_repetition_penalty", "typical_p"), (1,)),
    **dict.fromkeys(("remove_invalid_values", "renormalize_logits", "token_healing", "use_mtp"), (False,)),
    "diversity_penalty": (0,),
    "guidance_scale": (1,),
    "low_memory": (False,),
    "max_length": (20,),
    "sequence_bias": ({}, []),
}
"""Keys for which Lakesight supports only transformers' default, each with the values that mean the same as null."""
_ONLY_NULL = (
    "assistant_early_exit", "assistant_ensemble_weight", "cache_config", "continuous_batching_config", "dola_layers",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "max_time",
    "prompt_lookup_num_tokens", "speculation_type", "top_h", "watermarking_config",
)  # fmt: skip
"""Keys for which Lakesight supports only null."""

WITHOUT_EFFECT = {
    **dict.fromkeys(
        (
            "_commit_hash", "_from_model_config", "_original_object_hash", "transformers_version",
        ),
        "describes the file",
    ),
    **dict.fromkeys(
        (
            "compile_config", "disable_compile", "max_cache_len", "output_attentions", "output_hidden_states",
            "output_logits", "output_scores", "prefill_chunk_size", "return_dict_in_generate", "use_cache",
        ),
        "does not change the numbers that the model computes",
    ),
    **dict.fromkeys(
        (
            "assistant_confidence_threshold", "assistant_lookbehind", "is_assistant", "max_matching_ngram_size",
            "num_assistant_tokens", "num_assistant_tokens_schedule", "target_lookbehind",
        ),
        "is used only with a second, faster model",
    ),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), "is compared with the tokenizer of the model"),
    "pad_token_id": "is the id of a padding token, which no attention reads",
    "decoder_start_token_id": "is for models with a text encoder",
}  # fmt: skip
"""Keys that have no effect on the answers of an imported model, and the reason for each key."""
CONFIG_KEYS = {*RULES, *ONLY_DEFAULT, *_ONLY_NULL, *WITHOUT_EFFECT}
"""Keys of config.json and of its section `text_config` that transformers reads as generation settings."""
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAMS = ("length_penalty", "early_stopping")


def read_generation(folder: Path) -> GenerationConfig:
    """Read the generation settings of a published folder. A setting that the folder lacks gets transformers' default.
    Only `max_new_tokens` then gets Lakesight's default.

    Raises:
        CheckpointError: a file cannot be read, has an unknown key, or has a value that Lakesight does not support.
            The error names the file and every refused key.
    """
    sources = _find_settings(folder)
    effective = DEFAULTS.copy()
    for found in sources.values():
        effective |= found
    sampling, beams = effective["do_sample"] is True, effective["num_beams"] != 1
    problems: list[str] = []
    for place, found in sources.items():
        problems += account_keys(place, found, _rules(beams=beams), _reasons(effective), {})[1]
    if problems:
        raise CheckpointError(
            "the published model has generation settings that Lakesight does not support",
            where=str(folder),
            got=problems,
            fix="import the model with `lakesight import-weights`, which uses the generation settings of conf/model/",
        )
    values: dict[str, Any] = {
        key: effective[key]
        for key in ("max_new_tokens", "num_beams", "repetition_penalty", "length_penalty")
        if key in effective
    }
    if not beams:
        del values["length_penalty"]
    if sampling:
        values |= {key: effective[key] for key in ("temperature", "top_p", "min_p")}
        values["top_k"] = effective["top_k"] or None
    try:
        return GenerationConfig(**values, stop=tuple(_texts(effective.get("stop_strings", []))))
    except ValidationError as error:
        raise CheckpointError(
            "the published model has generation settings that Lakesight does not support",
            where=str(folder),
            got=read_error_message(error, GenerationConfig),
            fix="import the model with `lakesight import-weights`, which uses the generation settings of conf/model/",
        ) from None


def write_generation(settings: GenerationConfig) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Convert generation settings to keys of generation_config.json. `read_generation` is the inverse function.

    Returns:
        The keys, and the settings that the file cannot describe, as a dict from the reason to the settings.
    """
    keys: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "do_sample": settings.temperature > 0,
        "num_beams": settings.num_beams,
        "repetition_penalty": settings.repetition_penalty,
    }
    if settings.num_beams > 1:
        keys |= {"length_penalty": settings.length_penalty, "early_stopping": False}
    if settings.temperature > 0:
        keys |= {"temperature": settings.temperature, "top_k": settings.top_k or 0, "top_p": settings.top_p}
        keys |= {"min_p": settings.min_p} if settings.min_p else {}
    if settings.stop:
        keys["stop_strings"] = list(settings.stop)
    seeded = settings.temperature > 0
    return keys, {"transformers uses the seed of the process": ("generation.seed",)} if seeded else {}


def _find_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """Return a dict from the name of a file or section to the generation settings in this place, without nulls."""
    if (folder / GENERATION).is_file():
        return {GENERATION: without_null(read_other_settings(folder / GENERATION))}
    config = without_null(read_other_settings(folder / CONFIG))
    text = config.get("text_config")
    outer = {key: value for key, value in config.items() if key in CONFIG_KEYS}
    inner = {
        key: value
        for key, value in without_null(text if isinstance(text, Mapping) else {}).items()
        if key in CONFIG_KEYS and key not in outer
    }
    return {CONFIG: outer, f"text_config in {CONFIG}": inner}


def account_generation(folder: Path) -> tuple[FileReport | None, list[str]]:
    """List the keys of generation_config.json for an import, which does not use the generation settings.

    Returns:
        A report, or None if the file is missing or sets no key, and one sentence for each unknown key.
    """
    found = without_null(read_other_settings(folder / GENERATION))
    known = dict.fromkeys(
        (*RULES, *ONLY_DEFAULT, *_ONLY_NULL), "is a generation setting; the model config sets `generation`"
    )
    report, problems = account_keys(GENERATION, found, {}, WITHOUT_EFFECT | known, {})
    return (report if found else None), problems


def _rules(*, beams: bool) -> dict[str, KeyRule]:
    rules = {**RULES, **{key: only(*values) for key, values in ONLY_DEFAULT.items()}}
    rules |= dict.fromkeys(_ONLY_NULL, KeyRule("null", lambda _: False))
    if beams:
        rules["do_sample"] = KeyRule("False with num_beams above 1", lambda value: value is False)
    return rules


def _reasons(effective: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys without effect. Some of these keys have no effect because of the value of another generation
    setting.
    """
    reasons = dict(WITHOUT_EFFECT)
    if effective["do_sample"] is False:
        reasons |= dict.fromkeys(_SAMPLING, "is used only if do_sample is true")
    if effective["num_beams"] == 1:
        reasons |= dict.fromkeys(_BEAMS, "is used only if num_beams is above 1")
    if "max_new_tokens" in effective:
        reasons["max_length"] = "is replaced by max_new_tokens"
    return reasons


def _texts(value: Any) -> list[Any]:
    """Return the stop texts of a value, which is one text or a list. A value that is not a text becomes an empty text,
    which the rule refuses.
    """
    values = value if isinstance(value, list) else [value]
    return [each if isinstance(each, str) else "" for each in values]
